package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// A SocketOption lets other users than the user of this process use a unix socket. The zero
// SocketOption has no effect.
type SocketOption struct{ apply func(*socketConfig) }

type socketConfig struct {
	mode       fs.FileMode
	uids, gids []int
	refused    func(error) // called for each refused peer; may be nil
}

func newSocketConfig(opts []SocketOption) socketConfig {
	c := socketConfig{mode: 0o600}
	for _, o := range opts {
		if o.apply != nil {
			o.apply(&c)
		}
	}
	return c
}

// SocketMode sets the mode of the socket file, for ListenUnix. The default is 0600. To connect, a
// user needs the permission to write. PeerCredentials checks the user too: see AllowUIDs and
// AllowGIDs.
func SocketMode(mode fs.FileMode) SocketOption {
	return SocketOption{func(c *socketConfig) { c.mode = mode }}
}

// AllowUIDs lets processes of the users use the socket, for PeerCredentials. The user of this
// process and root may always use the socket.
func AllowUIDs(uids ...int) SocketOption {
	uids = slices.Clone(uids)
	return SocketOption{func(c *socketConfig) { c.uids = append(c.uids, uids...) }}
}

// AllowGIDs lets processes that are in one of the groups use the socket, for PeerCredentials. On
// Linux, the supplementary groups of the process count too.
func AllowGIDs(gids ...int) SocketOption {
	gids = slices.Clone(gids)
	return SocketOption{func(c *socketConfig) { c.gids = append(c.gids, gids...) }}
}

// stopGrace is how long running calls may take after the end of the context of ServeUnix.
const stopGrace = 5 * time.Second

// ServeUnix serves both services on a unix socket, until ctx ends: ListenUnix, and a gRPC server
// with PeerCredentials. A caller on the socket has no ceiling. The peers need no key.
//
// When ctx ends, ServeUnix ends the calls of WatchEvents, gives other calls 5 seconds, removes the
// socket, and returns nil. If ServeUnix cannot listen, it returns the error of ListenUnix. Run
// ServeUnix in a goroutine, beside the server for clients, and end ctx before you close the store.
func (s *Server) ServeUnix(ctx context.Context, path string, opts ...SocketOption) error {
	listener, err := ListenUnix(path, opts...)
	if err != nil {
		return err
	}
	logRefused := SocketOption{func(c *socketConfig) {
		c.refused = func(err error) {
			s.logLine(ctx, slog.LevelWarn, "admin peer refused", "error", err)
		}
	}}
	server := grpc.NewServer(
		grpc.Creds(PeerCredentials(append(slices.Clone(opts), logRefused)...)),
		grpc.ChainStreamInterceptor(endWatches(ctx)),
	)
	s.Register(server)
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		timer := time.AfterFunc(stopGrace, server.Stop)
		defer timer.Stop()
		server.GracefulStop()
	})
	err = server.Serve(listener)
	if !stop() {
		<-stopped
		return nil // Serve returns nil or grpc.ErrServerStopped
	}
	server.Stop()
	return err
}

// endWatches returns an interceptor that ends the streams of WatchEvents with ctx. A watch has no
// end, so the server would wait for the watch.
func endWatches(ctx context.Context) grpc.StreamServerInterceptor {
	return func(
		srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
	) error {
		if info.FullMethod != adminpb.KeyService_WatchEvents_FullMethodName {
			return handler(srv, ss)
		}
		watching, cancel := context.WithCancel(ss.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		err := handler(srv, &watchStream{ss, watching})
		if ctx.Err() != nil {
			return stoppingStatus.Err()
		}
		return err
	}
}

type watchStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *watchStream) Context() context.Context { return s.ctx }

// maxSocketPath is the length of the longest path of a socket, in bytes. The system keeps the path
// with a zero byte.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// ListenUnix listens on a unix socket that only the user of this process can connect to, from the
// first moment on: see SocketMode. If the directory of the path is missing, ListenUnix makes the
// directory, with mode 0700. Close of the listener removes the socket.
//
// If no process listens on a socket at the path, because its process was killed, ListenUnix
// replaces the socket. Otherwise ListenUnix replaces nothing: the error says what the path holds.
// Two processes that call ListenUnix at the same time do not replace each other's socket:
// ListenUnix locks the directory for a moment. So the directory must not be the directory of a key
// store, which is locked.
//
// The mode is not enough to protect a server: use PeerCredentials. On a system other than Linux,
// macOS and the BSDs, the error is errors.ErrUnsupported.
func ListenUnix(path string, opts ...SocketOption) (net.Listener, error) {
	l, err := listenUnix(path, newSocketConfig(opts))
	if err != nil {
		return nil, fmt.Errorf("admin: listen on the socket %s: %w", path, err)
	}
	return l, nil
}

func listenUnix(path string, c socketConfig) (l *unixListener, err error) {
	switch {
	case path == "":
		return nil, errors.New("the path is empty")
	case strings.HasPrefix(path, "@"):
		return nil, errors.New("a path that begins with @ means an abstract socket, which every " +
			"user can connect to: write ./ before the path")
	case len(path) > maxSocketPath:
		return nil, fmt.Errorf("the path has %d bytes: a socket can have %d at most, so use a "+
			"shorter path", len(path), maxSocketPath)
	case c.mode&^fs.ModePerm != 0:
		return nil, fmt.Errorf("the mode %v has more than permissions: use 0600 or 0660", c.mode)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := checkFree(path); err != nil {
		return nil, err
	}
	// A socket gets its mode only after the bind. So the socket is bound in a directory that no
	// other user can enter, and moves to its path with its mode.
	fresh, err := os.MkdirTemp(dir, ".") // has mode 0700
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(fresh)
	bound := filepath.Join(fresh, "s")
	address, done, err := shortPath(fresh, bound)
	if err != nil {
		return nil, err
	}
	defer done()
	socket, err := net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
	if err != nil {
		return nil, err
	}
	socket.SetUnlinkOnClose(false) // the socket moves
	defer func() {
		if err != nil {
			socket.Close()
		}
	}()
	if err := os.Chmod(bound, c.mode); err != nil {
		return nil, err
	}
	info, err := os.Lstat(bound)
	if err != nil {
		return nil, err
	}
	if err := os.Rename(bound, path); err != nil {
		return nil, err
	}
	return &unixListener{UnixListener: socket, path: path, info: info}, nil
}

// checkFree returns nil if there is nothing at the path, or a socket on which no process listens.
func checkFree(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("the path holds a %s, which is not replaced: use another path, or remove "+
			"it", kindOf(info.Mode()))
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		conn.Close()
		return errors.New("another process listens on the socket: stop it, or use another path")
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil // the process of the socket has ended
	default:
		return fmt.Errorf("the path holds a socket, and it is not known whether a process listens "+
			"on it: %w", err)
	}
}

func kindOf(mode fs.FileMode) string {
	switch mode.Type() {
	case 0:
		return "file"
	case fs.ModeDir:
		return "directory"
	case fs.ModeSymlink:
		return "symbolic link"
	default:
		return "file of another kind"
	}
}

// A unixListener removes its socket when it is closed, unless another socket is there by then.
type unixListener struct {
	*net.UnixListener
	path  string
	info  fs.FileInfo
	close sync.Once
}

// Addr returns the path.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	l.close.Do(func() {
		unlock, err := lockDir(filepath.Dir(l.path))
		if err != nil {
			return // the directory is gone
		}
		defer unlock()
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.info) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
