//go:build unix

package admin_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func listen(t testing.TB, path string, opts ...admin.SocketOption) net.Listener {
	t.Helper()
	l, err := admin.ListenUnix(path, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l
}

// isLive reports whether the listener accepts a connection to the path.
func isLive(t testing.TB, path string, l net.Listener) bool {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	defer conn.Close()
	accepted, err := l.Accept()
	if err != nil {
		return false
	}
	return accepted.Close() == nil
}

func modeOf(t testing.TB, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	require.NoError(t, err)
	return info.Mode()
}

func TestAFreshSocket(t *testing.T) {
	dir := socketDir(t)
	path := filepath.Join(dir, "a", "b", "admin.sock")
	l := listen(t, path)
	require.Equal(t, fs.ModeSocket|0o600, modeOf(t, path))
	require.Equal(t, fs.ModeDir|0o700, modeOf(t, filepath.Dir(path)))
	require.Equal(t, fs.ModeDir|0o700, modeOf(t, filepath.Join(dir, "a")))
	require.Equal(t, path, l.Addr().String())
	require.True(t, isLive(t, path, l))
	entries, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, entries, 1, "the temporary directory is gone")
	require.NoError(t, l.Close())
	require.Error(t, l.Close())
	_, err = os.Lstat(path)
	require.ErrorIs(t, err, fs.ErrNotExist)

	listen(t, path, admin.SocketMode(0o660), admin.SocketOption{})
	require.Equal(t, fs.ModeSocket|0o660, modeOf(t, path))
}

// Each thing that stands in the way has its sentence, and stays as it is.
func TestWhatAPathHolds(t *testing.T) {
	dir := socketDir(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	refused := func(path, text string, opts ...admin.SocketOption) {
		t.Helper()
		var before fs.FileInfo
		if !strings.Contains(text, "bytes") {
			before, _ = os.Lstat(path)
		}
		_, err := admin.ListenUnix(path, opts...)
		require.ErrorContains(t, err, text)
		if before != nil {
			after, err := os.Lstat(path)
			require.NoError(t, err)
			require.True(t, os.SameFile(before, after))
			require.Equal(t, before.Mode(), after.Mode())
		}
	}
	live := listen(t, at("live"))
	refused(at("live"), "another process listens on the socket")
	require.True(t, isLive(t, at("live"), live))

	require.NoError(t, os.WriteFile(at("file"), []byte("mine"), 0o600))
	refused(at("file"), "the path holds a file, which is not replaced")
	require.NoError(t, os.Mkdir(at("dir"), 0o700))
	refused(at("dir"), "the path holds a directory")
	require.NoError(t, os.Symlink(at("live"), at("link")))
	refused(at("link"), "the path holds a symbolic link")
	datagrams, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: at("gram"), Net: "unixgram"})
	require.NoError(t, err)
	defer datagrams.Close()
	refused(at("gram"), "it is not known whether a process listens")
	refused("", "the path is empty")
	refused("@abstract", "abstract socket")
	refused(at("mode"), "the mode", admin.SocketMode(fs.ModeSetuid|0o600))
	refused(filepath.Join(at("file"), "x"), "not a directory")

	if maxPath == 107 {
		long := dir + "/" + strings.Repeat("x", 107-len(dir)-1)
		require.Len(t, long, 107)
		l := listen(t, long) // although the name in the temporary directory is longer
		require.True(t, isLive(t, long, l))
	}
	refused(dir+"/"+strings.Repeat("x", maxPath+1-len(dir)-1),
		fmt.Sprintf("the path has %d bytes: a socket can have %d at most", maxPath+1, maxPath))

	needsDirectory(t)
	keystoretest.Open(t, at("keys"), nil)
	refused(at("keys/admin.sock"), "the directory of a key store")
}

const maxPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// leaveStale leaves a socket on which no process listens, as after kill -9.
func leaveStale(t testing.TB, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	require.Equal(t, fs.ModeSocket, modeOf(t, path).Type())
}

func TestAStaleSocketIsReplaced(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	leaveStale(t, path)
	l := listen(t, path)
	require.True(t, isLive(t, path, l))
	require.Equal(t, fs.ModeSocket|0o600, modeOf(t, path))
}

// Of many processes that find a stale socket, one gets the path, and keeps the path.
func TestRacersForAStaleSocket(t *testing.T) {
	for range 30 {
		path := filepath.Join(socketDir(t), "s")
		leaveStale(t, path)
		const racers = 8
		winners := make(chan net.Listener, racers)
		var all sync.WaitGroup
		for range racers {
			all.Go(func() {
				l, err := admin.ListenUnix(path)
				if err == nil {
					winners <- l
				} else if !strings.Contains(err.Error(), "another process listens") {
					t.Error(err)
				}
			})
		}
		all.Wait()
		require.Len(t, winners, 1)
		l := <-winners
		require.True(t, isLive(t, path, l))
		require.NoError(t, l.Close())
	}
}

// A listener does not remove the socket of its successor.
func TestCloseLeavesTheSuccessor(t *testing.T) {
	path := filepath.Join(socketDir(t), "s")
	first := listen(t, path)
	require.NoError(t, os.Remove(path)) // by an impatient person
	second := listen(t, path)
	require.NoError(t, first.Close())
	require.True(t, isLive(t, path, second))
}

// ServeUnix returns soon after its context has ended, although a client watches, and removes the
// socket. A running call ends well.
func TestServeUnixStops(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	srv, err := admin.New(store)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	path := filepath.Join(socketDir(t), "s")
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	served := make(chan error, 1)
	go func() { served <- srv.ServeUnix(ctx, path) }()
	awaitSocket(t, path)
	require.ErrorContains(t, srv.ServeUnix(ctx, path), "another process listens")
	c := dial(t, "unix:"+path, localCreds)
	watch, err := c.WatchEvents(t.Context(), &adminpb.WatchEventsRequest{})
	require.NoError(t, err)
	_, err = watch.Recv()
	require.NoError(t, err)
	writing, write := make(chan struct{}), make(chan struct{})
	gate.onWrites(func(apply func() error) error {
		gate.onWrites(nil)
		close(writing)
		<-write
		return apply()
	})
	created := make(chan error, 1)
	go func() {
		_, err := c.CreateKey(context.Background(),
			&adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "a"}})
		created <- err
	}()
	<-writing
	stop()
	_, err = watch.Recv()
	requireStatus(t, err, codes.Unavailable, "STORE_CLOSED")
	close(write)
	require.NoError(t, <-created)
	require.NoError(t, <-served)
	_, err = os.Lstat(path)
	require.ErrorIs(t, err, fs.ErrNotExist)

	ended, cancel := context.WithCancel(context.Background())
	cancel()
	require.NoError(t, srv.ServeUnix(ended, path))
}

// A process of another user, with a socket that the user may connect to.
func TestAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: this test needs root, to start a process of another user")
	}
	const uid, gid, group = 65534, 65533, 12345
	// The other user must be able to run this program.
	dir, err := os.MkdirTemp("", "s")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	exe, err := os.Executable()
	require.NoError(t, err)
	program, err := os.ReadFile(exe)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "admin.test"), program, 0o755))

	for name, tt := range map[string]struct {
		opts []admin.SocketOption
		code string
		log  string
	}{
		"the default": {nil, "Unavailable", ""},
		"the mode alone": {[]admin.SocketOption{admin.SocketMode(0o666)}, "Unavailable",
			"the user 65534 may not use the socket"},
		"other users": {[]admin.SocketOption{admin.SocketMode(0o666),
			admin.AllowUIDs(1, uid+1), admin.AllowGIDs(group + 1)}, "Unavailable",
			"the user 65534 may not use the socket"},
		"the user":  {[]admin.SocketOption{admin.SocketMode(0o666), admin.AllowUIDs(uid)}, "OK", ""},
		"the group": {[]admin.SocketOption{admin.SocketMode(0o666), admin.AllowGIDs(gid)}, "OK", ""},
		"another group": {[]admin.SocketOption{admin.SocketMode(0o666), admin.AllowGIDs(group)},
			"OK", ""},
	} {
		t.Run(name, func(t *testing.T) {
			var log safeBuilder
			store := keystoretest.New(t, nil)
			srv, err := admin.New(store, admin.Logger(slog.New(slog.NewTextHandler(&log, nil))))
			require.NoError(t, err)
			t.Cleanup(srv.Close)
			path := filepath.Join(dir, "s")
			ctx, stop := context.WithCancel(context.Background())
			served := make(chan error, 1)
			go func() { served <- srv.ServeUnix(ctx, path, tt.opts...) }()
			awaitSocket(t, path)
			cmd := exec.Command(filepath.Join(dir, "admin.test"))
			cmd.Dir = dir
			cmd.Env = []string{"ADMIN_TEST_CHILD=call", "ADMIN_TEST_SOCKET=" + path}
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{
				Uid: uid, Gid: gid, Groups: []uint32{1000001, group, 1000002}}}
			out, err := cmd.Output()
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				t.Log(string(exit.Stderr))
			}
			require.NoError(t, err)
			var got outcome
			require.NoError(t, json.Unmarshal(out, &got))
			require.Equal(t, uid, got.UID)
			require.Equal(t, tt.code, got.Code, got.Text)
			stop()
			require.NoError(t, <-served)
			if tt.log == "" {
				require.NotContains(t, log.String(), "may not use")
			} else {
				require.Contains(t, log.String(), tt.log)
			}
			keys := 0
			for event, err := range store.Events(t.Context(), keystore.EventQuery{}) {
				require.NoError(t, err)
				require.Regexp(t, `^unix:([a-z]+\(65534\)|65534)$`, event.Actor)
				keys++
			}
			require.Equal(t, tt.code == "OK", keys == 1)
		})
	}
}

// A safeBuilder collects a log.
type safeBuilder struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *safeBuilder) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *safeBuilder) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// Only a connection on a unix socket has a user.
func TestPeerCredentialsOnOtherConnections(t *testing.T) {
	creds := admin.PeerCredentials().Clone()
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	_, _, err := creds.ServerHandshake(a)
	require.ErrorContains(t, err, "ListenUnix")
	_, _, err = creds.ClientHandshake(t.Context(), "", b)
	require.ErrorContains(t, err, "credentials/local")
	require.Equal(t, "unix", creds.Info().SecurityProtocol)
}
