package keystore

import (
	"bytes"
	"crypto/sha256"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/backupfile"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// backupOf returns a backup that is whole, by its checksum.
func backupOf(t *testing.T, form backupfile.Form, entries ...backend.Entry) []byte {
	var b bytes.Buffer
	w := backupfile.NewWriter(&b, form)
	for _, e := range entries {
		require.NoError(t, w.Write(e))
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

func savedKey(t *testing.T, r *record.Record, revision uint64) backend.Entry {
	value, err := proto.Marshal(r)
	require.NoError(t, err)
	return backend.Entry{Key: storageKey(token.ID{1}), Value: value, Revision: revision}
}

// Backups that are whole, by their checksum, with one record that this version would not have
// written.
func TestBackupsThatNobodyWrote(t *testing.T) {
	for name, tt := range map[string]struct {
		record *record.Record
		want   error
	}{
		"of a later version": {&record.Record{
			Format: record.FormatCredits + 1, Status: record.Status_STATUS_ACTIVE,
		}, ErrInvalid},
		"purged, with a network": {&record.Record{
			Format: 1, Status: record.Status_STATUS_PURGED, PurgedAt: 1,
			AllowedNetworks: []string{"x"},
		}, ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			defer s.Close()
			b := backupOf(t, 1, savedKey(t, tt.record, 2))
			require.ErrorIs(t, s.Restore(t.Context(), bytes.NewReader(b)), tt.want)
		})
	}
}

// Restore takes no key that cannot be revoked any more, and what Restore takes can be changed in
// every way.
func TestRestoredKeysCanBeRevoked(t *testing.T) {
	id := token.ID{1}
	plain := func() *record.Record {
		digest := sha256.Sum256([]byte("token"))
		return &record.Record{
			Format: 1, Status: record.Status_STATUS_ACTIVE, CreatedAt: 1, Name: "n",
			DigestScheme: "sha256", Digest: digest[:],
		}
	}
	filled := func(size int) *record.Record {
		r := plain()
		for proto.Size(r) < size {
			more := strings.Repeat("x", min(100, size-proto.Size(r)))
			r.Metadata = map[string]string{"m": r.Metadata["m"] + more}
		}
		for proto.Size(r) > size { // the length of a length has grown
			r.Metadata["m"] = r.Metadata["m"][1:]
		}
		require.Equal(t, size, proto.Size(r))
		return r
	}
	with := func(edit func(*record.Record)) *record.Record {
		r := plain()
		edit(r)
		return r
	}
	rotated := func(n uint32) *record.Record {
		return with(func(r *record.Record) { r.Rotations = n })
	}
	for name, tt := range map[string]struct {
		record   *record.Record
		revision uint64
		ok       bool
	}{
		"plain":                      {plain(), 1, true},
		"the last revision":          {plain(), math.MaxUint64, false},
		"a revision that is too far": {plain(), maxSavedRevision + 1, false},
		"the highest revision":       {plain(), maxSavedRevision, true},
		"the largest value":          {filled(32 << 10), 1, false},
		"a value that is too large":  {filled(maxSavedSize + 1), 1, false},
		"the largest record":         {filled(maxSavedSize), 1, true},
		"the last rotation":          {rotated(math.MaxUint32), 1, false},
		"too many rotations":         {rotated(maxSavedRotations + 1), 1, false},
		"the most rotations":         {rotated(maxSavedRotations), 1, true},
		"a long reason": {with(func(r *record.Record) {
			r.DisableReason = strings.Repeat("x", maxReason+1)
		}), 1, false},
		"a long reason of a revocation": {with(func(r *record.Record) {
			r.Status, r.RevokedAt = record.Status_STATUS_REVOKED, 1
			r.RevokeReason = strings.Repeat("x", 20<<10)
		}), 1, false},
		"the last revision of a key that is gone": {
			&record.Record{Format: 1, Status: record.Status_STATUS_PURGED, PurgedAt: 1},
			math.MaxUint64, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			defer s.Close()
			ctx := t.Context()
			saved := backupOf(t, 1, savedKey(t, tt.record, tt.revision))
			err = s.Restore(ctx, bytes.NewReader(saved))
			if !tt.ok {
				require.ErrorIs(t, err, ErrCorrupt)
				_, err = s.Get(ctx, id.String())
				require.ErrorIs(t, err, ErrNotFound)
				return
			}
			require.NoError(t, err)
			reason := strings.Repeat("r", maxReason)
			for range 3 {
				require.NoError(t, s.Disable(ctx, id.String(), reason))
				require.NoError(t, s.Enable(ctx, id.String()))
				_, err = s.Rotate(ctx, id.String(), time.Hour)
				require.NoError(t, err)
				_, err = s.Update(ctx, id.String(), func(spec *Spec) error {
					if m := spec.Metadata["m"]; m != "" {
						// The record does not grow. The record may have the largest size.
						spec.Metadata["m"] = m[1:]
					}
					return nil
				})
				require.NoError(t, err)
			}
			require.NoError(t, s.Restore(ctx, bytes.NewReader(saved)))
			require.NoError(t, s.Disable(ctx, id.String(), reason))
			require.NoError(t, s.Revoke(ctx, id.String(), reason))
			key, err := s.Get(ctx, id.String())
			require.NoError(t, err)
			require.Equal(t, StatusRevoked, key.Status())
			n, err := s.Purge(ctx, time.Now())
			require.NoError(t, err)
			require.Equal(t, 1, n)
		})
	}
}

// A restore writes no temporary file: there may be no folder for it, and digests do not belong
// there.
func TestRestoreNeedsNoTemporaryFolder(t *testing.T) {
	needsDirectory(t)
	one, err := New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	defer one.Close()
	for range 1000 {
		_, err := one.Create(t.Context(), Spec{Name: "n"})
		require.NoError(t, err)
	}
	var saved bytes.Buffer
	require.NoError(t, one.Backup(t.Context(), &saved))
	path := filepath.Join(t.TempDir(), "backup")
	require.NoError(t, os.WriteFile(path, append([]byte("before"), saved.Bytes()...), 0o600))
	dir := t.TempDir()
	for _, name := range []string{"TMPDIR", "TMP", "TEMP"} {
		t.Setenv(name, filepath.Join(dir, "there is no such folder"))
	}
	for name, open := range map[string]func() io.Reader{
		"a file, from its middle": func() io.Reader {
			f, err := os.Open(path)
			require.NoError(t, err)
			t.Cleanup(func() { f.Close() })
			_, err = f.Seek(int64(len("before")), io.SeekStart)
			require.NoError(t, err)
			return f
		},
		"a pipe": func() io.Reader {
			r, w, err := os.Pipe()
			require.NoError(t, err)
			go func() {
				defer w.Close()
				_, _ = w.Write(saved.Bytes())
			}()
			t.Cleanup(func() { r.Close() })
			return r
		},
		"a stream": func() io.Reader { return iotest.HalfReader(bytes.NewReader(saved.Bytes())) },
		"a seeker": func() io.Reader { return bytes.NewReader(saved.Bytes()) },
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(filepath.Join(dir, name), nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			require.NoError(t, s.Restore(t.Context(), open()))
			var again bytes.Buffer
			require.NoError(t, s.Backup(t.Context(), &again))
			require.Equal(t, saved.Bytes(), again.Bytes())
		})
	}
	t.Run("held in memory to a limit", func(t *testing.T) {
		s, err := New(backendtest.NewMemory(), nil)
		require.NoError(t, err)
		defer s.Close()
		stream := func() io.Reader { return iotest.HalfReader(bytes.NewReader(saved.Bytes())) }
		err = s.restoreHolding(t.Context(), stream(), saved.Len()-1)
		require.ErrorIs(t, err, ErrInvalid)
		require.ErrorContains(t, err, "in a file")
		require.NoError(t, s.restoreHolding(t.Context(), bytes.NewReader(saved.Bytes()), 0))
		require.NoError(t, s.restoreHolding(t.Context(), stream(), saved.Len()))
	})
}

// A reader that gives something else when it is read again is found out.
func TestRestoreFromAReaderThatChanges(t *testing.T) {
	s, err := New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	defer s.Close()
	record := &record.Record{
		Format: 1, Status: record.Status_STATUS_ACTIVE, CreatedAt: 1,
		DigestScheme: "sha256", Digest: []byte{1},
	}
	first := backupOf(t, 1, savedKey(t, record, 1))
	for name, second := range map[string][]byte{
		"another backup":                     backupOf(t, 1, savedKey(t, record, 2)),
		"a key that could not be revoked":    backupOf(t, 1, savedKey(t, record, math.MaxUint64)),
		"no backup":                          []byte("hello"),
		"half a backup":                      first[:len(first)-40],
		"a backup of a form that is unknown": backupOf(t, 9),
		"nothing":                            nil,
	} {
		r := &changing{Reader: bytes.NewReader(first), second: second}
		err := s.Restore(t.Context(), r)
		require.ErrorIs(t, err, ErrCorrupt, name)
		require.NotContains(t, err.Error(), "nothing was changed", name)
	}
	gone := &changing{Reader: bytes.NewReader(first), err: io.ErrClosedPipe}
	require.ErrorIs(t, s.Restore(t.Context(), gone), io.ErrClosedPipe)
}

// A changing reader has other content, or none, when it is read again.
type changing struct {
	*bytes.Reader
	second []byte
	err    error
}

func (c *changing) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekStart {
		*c.Reader = *bytes.NewReader(c.second)
		return 0, c.err
	}
	return c.Reader.Seek(offset, whence)
}

// A key that an earlier version took with characters which do not show can be read, changed and
// revoked; what is logged of the key is escaped.
func TestStoredHiddenCharactersHinderNothing(t *testing.T) {
	var out bytes.Buffer
	opts := &Options{Logger: slog.New(slog.NewJSONHandler(&out, nil))}
	s, err := New(backendtest.NewMemory(), opts)
	require.NoError(t, err)
	defer s.Close()
	const text = "a\u202eb\u0085c"
	saved := backupOf(t, 1, savedKey(t, &record.Record{
		Format: 1, Status: record.Status_STATUS_ACTIVE, CreatedAt: 1,
		DigestScheme: "sha256", Digest: []byte{1},
		Name: text, Owner: text, Metadata: map[string]string{text: text},
	}, 1))
	require.NoError(t, s.Restore(t.Context(), bytes.NewReader(saved)))
	id := token.ID{1}.String()
	for key, err := range s.List(t.Context(), Query{Owner: text}) {
		require.NoError(t, err)
		require.Equal(t, id, key.ID)
	}
	key, err := s.Update(t.Context(), id, func(spec *Spec) error {
		spec.Scopes = []string{"a"}
		return nil
	})
	require.NoError(t, err)
	require.Equal(t, text, key.Name)
	for _, change := range []func(*Spec){
		func(spec *Spec) { spec.Name += "\u202e" },
		func(spec *Spec) { spec.Owner += "\u202e" },
		func(spec *Spec) { spec.Metadata[text] += "\u202e" },
		func(spec *Spec) { spec.Metadata["\u202e"] = "" },
	} {
		_, err = s.Update(t.Context(), id, func(spec *Spec) error { change(spec); return nil })
		require.ErrorIs(t, err, ErrInvalid)
	}
	require.NoError(t, s.Disable(t.Context(), id, ""))
	require.NoError(t, s.Revoke(t.Context(), id, ""))
	key, err = s.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, StatusRevoked, key.Status())
	require.Contains(t, out.String(), `a\\u202eb\\u0085c`)
	require.NotContains(t, out.String(), "\u202e")
}
