package guides_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// The page quotes an error as **`text … text`**. This test provokes errors. Each quoted text must
// occur in a provoked error, and the page must quote each provoked error.
func TestTroubleshootingQuotesErrors(t *testing.T) {
	quotes := map[string]bool{}
	quoted := regexp.MustCompile("\\*\\*`([^`]+)`\\*\\*")
	for _, quote := range quoted.FindAllStringSubmatch(read(t, "troubleshooting.md"), -1) {
		quotes[strings.Join(strings.Fields(quote[1]), " ")] = false
	}
	require.Greater(t, len(quotes), 25)
	for name, provoke := range provocations {
		t.Run(name, func(t *testing.T) {
			err := provoke(t)
			require.Error(t, err)
			found := false
			for quote := range quotes {
				if has(err.Error(), quote) {
					quotes[quote], found = true, true
				}
			}
			require.True(t, found, "the page does not quote %v", err)
		})
	}
	ofRoot := regexp.MustCompile("belongs to|others than|read-only|disk is full")
	for quote, found := range quotes {
		if !found && os.Getuid() != 0 && ofRoot.MatchString(quote) {
			t.Logf("NOT RUN: only root can provoke %q", quote)
			continue
		}
		require.True(t, found, "no error has the text %q", quote)
	}
}

// has reports whether a text contains the pieces of a quote, in the same order.
func has(text, quote string) bool {
	for _, piece := range strings.Split(quote, "…") {
		_, after, ok := strings.Cut(text, strings.TrimSpace(piece))
		if !ok {
			return false
		}
		text = after
	}
	return true
}

var provocations = map[string]func(t *testing.T) error{
	"later version": func(t *testing.T) error {
		b := populated(t)
		state, err := b.Get(t.Context(), []byte("w"))
		require.NoError(t, err)
		key := first(t, b, "k")
		later := []byte{1 << 3, 99} // the format
		require.NoError(t, b.Apply(t.Context(),
			backend.Change{Key: key.Key, Value: later, Expect: key.Revision},
			backend.Change{Key: state.Key, Expect: state.Revision, Delete: true}))
		_, err = keystore.New(b, nil)
		return err
	},
	"damaged index": func(t *testing.T) error {
		b := populated(t)
		entry := first(t, b, "y")
		require.NoError(t, b.Apply(t.Context(),
			backend.Change{Key: entry.Key, Expect: entry.Revision, Delete: true}))
		return integrity(t, b)
	},
	"lost event": func(t *testing.T) error {
		b := populated(t)
		event := first(t, b, "e")
		require.NoError(t, b.Apply(t.Context(),
			backend.Change{Key: event.Key, Expect: event.Revision, Delete: true}))
		return integrity(t, b)
	},
	"plaintext connection": func(t *testing.T) error {
		_, err := dial(t, "passthrough:nobody", grpc.WithPerRPCCredentials(keycreds.New("key")))
		return err
	},
	"plaintext call": func(t *testing.T) error {
		server := grpc.NewServer()
		healthpb.RegisterHealthServer(server, health.NewServer())
		lis, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		go server.Serve(lis)
		t.Cleanup(server.Stop)
		conn, err := dial(t, lis.Addr().String())
		require.NoError(t, err)
		_, err = healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{},
			grpc.PerRPCCredentials(keycreds.New("key")))
		return err
	},
	"silent connection": func(t *testing.T) error { return credential(t, keycreds.New("key")) },
	"empty":             func(t *testing.T) error { return sent(t, " \n") },
	"quotation marks":   func(t *testing.T) error { return sent(t, `"key"`) },
	"assignment":        func(t *testing.T) error { return sent(t, "API_KEY=oil_1_2") },
	"placeholder":       func(t *testing.T) error { return sent(t, "${API_KEY}") },
	"comma":             func(t *testing.T) error { return sent(t, "key,") },
	"scheme":            func(t *testing.T) error { return sent(t, "Bearer key") },
	"hint": func(t *testing.T) error {
		return sent(t,
			keystoretest.MustCreate(t, keystoretest.New(t, nil), keystore.Spec{}).Key.Hint)
	},
	"missing file": func(t *testing.T) error {
		file := filepath.Join(t.TempDir(), "key")
		return credential(t, keycreds.FromFile(file, keycreds.AllowInsecure()))
	},

	"no store": func(t *testing.T) error {
		return openError(t.TempDir(), &keystore.Options{MustExist: true})
	},
	"unwritable":  func(t *testing.T) error { return mounted(t, "ro") },
	"full":        func(t *testing.T) error { return mounted(t, "size=2m") },
	"a file":      func(t *testing.T) error { return openError("README.md", nil) },
	"not a store": func(t *testing.T) error { return openError(with(t, "notes.txt"), nil) },
	"a database":  func(t *testing.T) error { return openError(with(t, "000001.vlog"), nil) },
	"open": func(t *testing.T) error {
		dir := t.TempDir()
		keystoretest.Open(t, dir, nil)
		return openError(dir, nil)
	},
	"open in another process": func(t *testing.T) error {
		dir, address := made(t, nil), freeAddress(t)
		cmd := exec.Command(program(t), "-keys", dir, "-listen", address)
		require.NoError(t, cmd.Start())
		defer func() {
			require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			require.NoError(t, cmd.Wait())
		}()
		conn, err := dial(t, address)
		require.NoError(t, err)
		_, err = healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{},
			grpc.WaitForReady(true))
		require.NoError(t, err)
		err = openError(dir, nil)
		require.ErrorContains(t, err, fmt.Sprintf("pid %d on host", cmd.Process.Pid))
		return err
	},
	"another pepper": func(t *testing.T) error {
		dir := made(t, pepper(t, "0123456789abcdef"))
		return openError(dir, &keystore.Options{Hasher: pepper(t, "0123456789abcdef\n")})
	},
	"damaged": func(t *testing.T) error {
		dir := made(t, nil)
		tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
		require.NoError(t, err)
		require.NotEmpty(t, tables)
		require.NoError(t, os.Truncate(tables[0], 100))
		return openError(dir, nil)
	},
	"missing LAST": func(t *testing.T) error {
		dir := made(t, nil)
		require.NoError(t, os.Remove(filepath.Join(dir, "LAST")))
		return openError(dir, nil)
	},
	"root of a volume": func(t *testing.T) error {
		return asStranger(t, func(dir string) { require.NoError(t, os.Chmod(dir, 0o777)) })
	},
	"files of root": func(t *testing.T) error {
		return asStranger(t, func(dir string) {
			create(t, dir, nil)
			require.NoError(t, os.Chown(dir, stranger, stranger))
		})
	},
	"directory of root": func(t *testing.T) error {
		return asStranger(t, func(dir string) { create(t, dir, nil) })
	},

	"failed": func(t *testing.T) error {
		opened := new(atomic.Bool)
		store, err := keystore.New(failing{memory.New(), opened}, nil)
		require.NoError(t, err)
		defer store.Close()
		opened.Store(true)
		_, err = store.Get(t.Context(), "01k9x3v7q2f8hr6m5w0c4tzbnd")
		return err
	},
	"closed": func(t *testing.T) error {
		store := keystoretest.New(t, nil)
		require.NoError(t, store.Close())
		return store.Err()
	},

	"misspelt rule": func(t *testing.T) error {
		return check(t, true, interceptor.Public("/grpc.health.v1.Healht/*"))
	},
	"no rule": func(t *testing.T) error {
		return check(t, true, interceptor.RequireRules())
	},
	"one interceptor": func(t *testing.T) error { return check(t, false) },
	"no verifier": func(t *testing.T) error {
		_, err := interceptor.New((*keystore.Store)(nil))
		return err
	},
}

func dial(t *testing.T, address string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	t.Helper()
	opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))
	conn, err := grpc.NewClient(address, opts...)
	if err == nil {
		t.Cleanup(func() { require.NoError(t, conn.Close()) })
	}
	return conn, err
}

// credential returns the error of the credentials when gRPC requests the key.
func credential(t *testing.T, creds interface {
	GetRequestMetadata(context.Context, ...string) (map[string]string, error)
}) error {
	_, err := creds.GetRequestMetadata(t.Context())
	return err
}

func sent(t *testing.T, token string) error {
	return credential(t, keycreds.New(token, keycreds.AllowInsecure()))
}

func openError(dir string, opts *keystore.Options) error {
	store, err := keystore.Open(dir, opts)
	if err == nil {
		err = errors.Join(errors.New("the store opened"), store.Close())
	}
	return err
}

// A staying backend stays open when a store closes.
type staying struct{ backend.Backend }

func (staying) Close() error { return nil }

// populated returns a backend in memory with the keys of a store that was closed.
func populated(t *testing.T) backend.Backend {
	t.Helper()
	b := staying{memory.New()}
	store, err := keystore.New(b, nil)
	require.NoError(t, err)
	for range 5 {
		keystoretest.MustCreate(t, store, keystore.Spec{Name: "test", Owner: "team"})
	}
	require.NoError(t, store.Close())
	return b
}

// first returns the first entry whose storage key begins with a text.
func first(t *testing.T, b backend.Backend, prefix string) backend.Entry {
	t.Helper()
	for e, err := range b.Scan(t.Context(), []byte(prefix), nil) {
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(string(e.Key), prefix))
		return e
	}
	require.FailNow(t, "there is no such entry")
	return backend.Entry{}
}

// integrity returns the error of CheckIntegrity.
func integrity(t *testing.T, b backend.Backend) error {
	t.Helper()
	store, err := keystore.New(b, nil)
	require.NoError(t, err)
	defer store.Close()
	return store.CheckIntegrity(t.Context())
}

// create creates a store with some keys in dir.
func create(t *testing.T, dir string, hasher hashing.Hasher) {
	t.Helper()
	store, err := keystore.Open(dir, &keystore.Options{Hasher: hasher})
	require.NoError(t, err)
	for range 5 {
		keystoretest.MustCreate(t, store, keystore.Spec{Name: "test"})
	}
	require.NoError(t, store.Close())
}

func made(t *testing.T, hasher hashing.Hasher) string {
	t.Helper()
	dir := t.TempDir()
	create(t, dir, hasher)
	return dir
}

// with returns a directory that contains a file.
func with(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, file), []byte("text"), 0o600))
	return dir
}

func pepper(t *testing.T, text string) hashing.Hasher {
	t.Helper()
	hasher, err := hashing.HMACSHA256("2026", []byte(text))
	require.NoError(t, err)
	return hasher
}

// mounted opens a store on a separate file system.
func mounted(t *testing.T, options string) error {
	t.Helper()
	return onDisk(t, options, func(dir string) error { return openError(dir, nil) })
}

// onDisk mounts a file system during a call of a function.
func onDisk(t *testing.T, options string, do func(dir string) error) error {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("NOT RUN: only root can mount a file system")
	}
	dir := t.TempDir()
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", options, "tmpfs", dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	defer func() { require.NoError(t, exec.Command("umount", dir).Run()) }()
	return do(dir)
}

// The page says that 8 MiB are enough on a small disk.
func TestTroubleshootingSmallDisk(t *testing.T) {
	require.Contains(t, read(t, "troubleshooting.md"), "about 8 MiB on a disk of less than 512 MiB")
	require.NoError(t, onDisk(t, "size=8m", func(dir string) error {
		create(t, dir, nil)
		return nil
	}))
}

const stranger = 61234 // the id of a user without files

// asStranger runs the program of the guides as another user, with a directory that belongs to root.
// prepare fills the directory.
func asStranger(t *testing.T, prepare func(dir string)) error {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("NOT RUN: only root can start a program as another user")
	}
	top, err := os.MkdirTemp("", "guides-*") // no other user can enter t.TempDir
	require.NoError(t, err)
	defer os.RemoveAll(top)
	require.NoError(t, os.Chmod(top, 0o755))
	dir := filepath.Join(top, "keys")
	require.NoError(t, os.Mkdir(dir, 0o755))
	prepare(dir)
	text, err := os.ReadFile(program(t))
	require.NoError(t, err)
	copied := filepath.Join(top, "orders")
	require.NoError(t, os.WriteFile(copied, text, 0o755))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id := strconv.Itoa(stranger)
	cmd := exec.CommandContext(ctx, "setpriv", "--reuid="+id, "--regid="+id, "--clear-groups",
		copied, "-keys", dir, "-issue", "test")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.Error(t, cmd.Run())
	return errors.New(stderr.String())
}

var built string

// program returns the program of the guides.
func program(t *testing.T) string {
	t.Helper()
	if built == "" {
		built = filepath.Join(buildDir, "orders")
		out, err := exec.Command("go", "build", "-o", built, "./service").CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	return built
}

var buildDir string

func TestMain(m *testing.M) {
	var err error
	if buildDir, err = os.MkdirTemp("", "guides-*"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(buildDir)
	os.Exit(code)
}

// freeAddress returns a loopback address that no program listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	port, err := freeport.Port()
	require.NoError(t, err)
	return fmt.Sprint("127.0.0.1:", port)
}

// failing is a backend whose disk fails once the backend has served Open.
type failing struct {
	backend.Backend
	opened *atomic.Bool
}

func (f failing) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if f.opened.Load() {
		return backend.Entry{}, backend.ErrFailed
	}
	return f.Backend.Get(ctx, key)
}

// check returns the error of Authenticator.Check for a server with the health service.
func check(t *testing.T, streams bool, opts ...interceptor.Option) error {
	t.Helper()
	auth, err := interceptor.New(keystoretest.New(t, nil), opts...)
	require.NoError(t, err)
	serverOpts := []grpc.ServerOption{grpc.UnaryInterceptor(auth.Unary())}
	if streams {
		serverOpts = auth.ServerOptions()
	}
	server := grpc.NewServer(serverOpts...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	return auth.Check(server)
}

// The table of reasons must agree with package interceptor. The table of words must have a line for
// each denial.
func TestTroubleshootingNamesEachReason(t *testing.T) {
	page := read(t, "troubleshooting.md")
	reasons := func(text, pattern string, code, reason int) map[string]string {
		found := map[string]string{}
		for _, line := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			found[line[reason]] = line[code]
		}
		return found
	}
	want := reasons(read(t, "../../interceptor/doc.go"),
		`(?m)^//\t.* ([A-Z][A-Za-z]+) +([A-Z]+_[A-Z_]+)`, 1, 2)
	require.Greater(t, len(want), 14)
	require.Equal(t, want, reasons(page, "(?m)^\\| `([A-Z_]+)` \\| ([A-Za-z]+) \\|", 2, 1))

	for _, err := range []error{keystore.ErrMalformed, keystore.ErrUnknown, keystore.ErrRevoked,
		keystore.ErrExpired, keystore.ErrDisabled, keystore.ErrNotYetValid,
		keystore.ErrNetworkNotAllowed} {
		require.Contains(t, page, "\n| `"+keystore.Reason(err)+"` | ")
	}
}
