package keystore_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// An oldForm is what a program without indexes has left: a directory, a backup of the store in form
// 1, and the answers to List and Events. The store has keys of several owners, of which some were
// changed, revoked and purged.
type oldForm struct {
	dir    string
	backup []byte

	Keys   []*keystore.Key
	Events []keystore.Event
}

func newOldForm(t *testing.T) *oldForm {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Open(filepath.Join("testdata", "without-indexes.tar.gz"))
	require.NoError(t, err)
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	require.NoError(t, err)
	files := tar.NewReader(unzipped)
	for {
		h, err := files.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			require.NoError(t, os.Mkdir(path, 0o700))
			continue
		}
		content, err := io.ReadAll(files)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(path, content, 0o600))
	}
	old := &oldForm{dir: filepath.Join(dir, "store")}
	old.backup, err = os.ReadFile(filepath.Join(dir, "backup"))
	require.NoError(t, err)
	answers, err := os.ReadFile(filepath.Join(dir, "answers.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(answers, old))
	return old
}

func (old *oldForm) keysOf(owner string) (keys []*keystore.Key) {
	for _, k := range old.Keys {
		if k.Owner == owner {
			keys = append(keys, k)
		}
	}
	return keys
}

func (old *oldForm) eventsOf(id string) (events []keystore.Event) {
	for _, e := range old.Events {
		if e.KeyID == id {
			events = append(events, e)
		}
	}
	return events
}

func keysIn(t *testing.T, s *keystore.Store, q keystore.Query) (keys []*keystore.Key) {
	t.Helper()
	for k, err := range s.List(t.Context(), q) {
		require.NoError(t, err)
		keys = append(keys, k)
	}
	return keys
}

// Open builds the indexes of a directory that a program without indexes has made. All answers stay
// the same.
func TestOpenOfADirectoryWithoutIndexes(t *testing.T) {
	needsDirectory(t)
	old := newOldForm(t)
	s := keystoretest.Open(t, old.dir, nil)
	for range 2 {
		require.Len(t, old.Keys, 87)
		require.Equal(t, old.Keys, keysIn(t, s, keystore.Query{}))
		require.Equal(t, old.Events, events(t, s, keystore.EventQuery{}))
		owned := 0
		for _, owner := range []string{"owner 0", "owner 1", "owner 2", "owner 3", "owner 4",
			"owner 5", "owner 6"} {
			require.Equal(t, old.keysOf(owner), keysIn(t, s, keystore.Query{Owner: owner}))
			owned += len(old.keysOf(owner))
		}
		require.Greater(t, owned, 70)
		seen := make(map[string]bool)
		for _, e := range old.Events {
			if !seen[e.KeyID] {
				require.Equal(t, old.eventsOf(e.KeyID),
					events(t, s, keystore.EventQuery{KeyID: e.KeyID}))
			}
			seen[e.KeyID] = true
		}
		require.Len(t, seen, 100)
		require.NoError(t, s.CheckIntegrity(t.Context()))
		require.NoError(t, s.Close())
		s = keystoretest.Open(t, old.dir, nil)
	}
	n, err := s.RevokeAll(t.Context(), keystore.Query{Owner: "owner 1"}, "", nil)
	require.NoError(t, err)
	require.Positive(t, n)
	require.NoError(t, s.CheckIntegrity(t.Context()))
}

// A backup in form 1 holds the purged keys among the keys. Restore buries these keys.
func TestRestoreOfABackupWithoutGraves(t *testing.T) {
	old := newOldForm(t)
	s := keystoretest.New(t, nil)
	require.NoError(t, s.Restore(t.Context(), bytes.NewReader(old.backup)))
	require.Equal(t, old.Keys, keysIn(t, s, keystore.Query{}))
	require.Equal(t, old.keysOf("owner 1"), keysIn(t, s, keystore.Query{Owner: "owner 1"}))
	require.Len(t, events(t, s, keystore.EventQuery{}), 100, "one for each key, purged or not")

	var saved bytes.Buffer
	require.NoError(t, s.Backup(t.Context(), &saved))
	again := keystoretest.New(t, nil)
	require.NoError(t, again.Restore(t.Context(), bytes.NewReader(saved.Bytes())))
	require.Equal(t, old.Keys, keysIn(t, again, keystore.Query{}))
	n, err := again.Purge(t.Context(), time.Now())
	require.NoError(t, err)
	require.Positive(t, n)
	require.NoError(t, again.Restore(t.Context(), bytes.NewReader(saved.Bytes())))
	require.NoError(t, again.Restore(t.Context(), bytes.NewReader(old.backup)))
	require.Len(t, keysIn(t, again, keystore.Query{}), len(old.Keys)-n)
}
