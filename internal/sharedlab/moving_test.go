package sharedlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// The commands of the guide move a store from a directory to an engine, and back. Each key is
// admitted during the whole move, and a revocation is not lost.
func TestMoving(t *testing.T) {
	for name, openEngine := range map[string]func(t *testing.T) backend.Backend{
		"etcd": func(t *testing.T) backend.Backend {
			return open(t, StartEtcd(t, EtcdConfig{Members: 1}).Client(t), newPrefix())
		},
		"PostgreSQL": func(t *testing.T) backend.Backend {
			pool, err := pgxpool.New(t.Context(), pglab.Start(t, pglab.Config{NoSync: true}).URL())
			require.NoError(t, err)
			t.Cleanup(pool.Close)
			b, err := pgstore.Open(t.Context(), pool, "apikeys",
				&pgstore.Options{Unreplicated: true})
			require.NoError(t, err)
			return b
		},
	} {
		t.Run(name, func(t *testing.T) { move(t, openEngine(t)) })
	}
}

func move(t *testing.T, engine backend.Backend) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	blocks := commandsOf(t, "../../examples/guides/moving.md")
	require.Len(t, blocks, 3)
	dir, err := os.MkdirTemp("", "move") // the path of a socket must be short
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Mkdir(filepath.Join(dir, "run"), 0o700))
	build := exec.Command("go", "build", "-o", dir, "./cmd/apikeyctl")
	build.Dir = "../.."
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	run := func(block string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, "bash", "-e", "-c", block)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"))
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s\n%s", block, out)
	}

	before, err := keystore.Open(filepath.Join(dir, "before"), nil)
	require.NoError(t, err)
	defer before.Close()
	shared, err := keystore.New(engine, &keystore.Options{Timeout: patience})
	require.NoError(t, err)
	defer shared.Close()
	serveAt(t, before, filepath.Join(dir, "run", "old.sock"))
	serveAt(t, shared, filepath.Join(dir, "run", "new.sock"))
	create := func(s *keystore.Store, name string) *keystore.Issued {
		t.Helper()
		issued, err := s.Create(ctx, keystore.Spec{Name: name, Owner: "acme"})
		require.NoError(t, err)
		return issued
	}
	admits := func(s *keystore.Store, want error, all ...*keystore.Issued) {
		t.Helper()
		for _, issued := range all {
			_, err := s.Verify(ctx, issued.Secret.Reveal())
			require.ErrorIs(t, err, want, issued.Key.Name)
		}
	}
	var kept []*keystore.Issued
	for n := range 100 {
		kept = append(kept, create(before, fmt.Sprint("kept ", n)))
	}
	revoked, late := create(before, "revoked"), create(before, "revoked too late")

	// A client uses a key of the old service during the move.
	token := kept[0].Secret.Reveal()
	stop, refused := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				refused <- nil
				return
			case <-time.After(time.Millisecond):
			}
			if _, err := before.Verify(ctx, token); err != nil {
				refused <- err
				return
			}
		}
	}()

	run(blocks[0])
	admits(shared, nil, append(kept, revoked, late)...)
	require.NoError(t, before.Revoke(ctx, revoked.Key.ID, "leaked"))
	kept = append(kept, create(before, "created during the move"))
	admits(shared, keystore.ErrUnknown, kept[100])
	run(blocks[1])
	admits(shared, nil, kept...)
	admits(shared, keystore.ErrRevoked, revoked)
	require.NoError(t, before.Revoke(ctx, late.Key.ID, "leaked"))
	admits(shared, nil, late) // as the page says: revoke the key in both
	require.NoError(t, shared.Revoke(ctx, late.Key.ID, "leaked"))
	close(stop)
	require.NoError(t, <-refused)

	kept = append(kept, create(shared, "created in the new store"))
	run(blocks[2])
	after, err := keystore.Open(filepath.Join(dir, "keys"), &keystore.Options{MustExist: true})
	require.NoError(t, err)
	defer after.Close()
	admits(after, nil, kept...)
	admits(after, keystore.ErrRevoked, revoked, late)
}

// commandsOf returns the blocks of commands of a page, without the prompts.
func commandsOf(t *testing.T, page string) (blocks []string) {
	text, err := os.ReadFile(page)
	require.NoError(t, err)
	for _, block := range regexp.MustCompile("(?m)(^ *\\$ .*\n)+").FindAllString(string(text), -1) {
		blocks = append(blocks, regexp.MustCompile(`(?m)^ *\$ `).ReplaceAllString(block, ""))
	}
	return blocks
}

// serveAt serves the admin service of a store on a socket until the end of the test.
func serveAt(t *testing.T, store *keystore.Store, socket string) {
	t.Helper()
	srv, err := admin.New(store)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.ServeUnix(ctx, socket) }()
	t.Cleanup(func() {
		stop()
		require.NoError(t, <-served)
		srv.Close()
	})
	require.Eventually(t, func() bool {
		_, err := os.Stat(socket)
		return !errors.Is(err, os.ErrNotExist)
	}, patience, time.Millisecond)
}
