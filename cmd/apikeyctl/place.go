package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/user"
	"strconv"
	"syscall"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	unixcreds "google.golang.org/grpc/credentials/local"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

const groupPlace = "Where the keys are (one of socket, addr, dir)"

func placeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "socket", Category: groupPlace,
			Usage: "the unix socket at `PATH` of a server on this machine [$APIKEYCTL_SOCKET]"},
		&cli.StringFlag{Name: "addr", Category: groupPlace,
			Usage: "the server at `HOST:PORT`, over TLS and with a key [$APIKEYCTL_ADDR]"},
		&cli.StringFlag{Name: "ca", Category: groupPlace, Sources: cli.EnvVars("APIKEYCTL_CA"),
			Usage: "trust the certificates in the PEM `FILE` instead of those of the system"},
		&cli.StringFlag{Name: "key-file", Category: groupPlace,
			Sources: cli.EnvVars("APIKEYCTL_KEY_FILE"),
			Usage:   "the `FILE` with the key for --addr; or set the key itself in APIKEYCTL_KEY"},
		&cli.StringFlag{Name: "dir", Category: groupPlace,
			Usage: "the directory `DIR` of a store that no process has open [$APIKEYCTL_DIR]"},
		pepperFlag(),
		&cli.StringFlag{Name: "prefix", Category: groupPlace,
			Usage: "with --dir: begin a new secret with `PREFIX`, as the server does. If not given, as " +
				"the newest key of the store"},
	}
}

// A place is where the keys are: a socket, an address or a directory. The other two are empty.
type place struct{ socket, addr, dir string }

// String names the place in a sentence.
func (p place) String() string {
	switch {
	case p.socket != "":
		return "the server at " + p.socket
	case p.addr != "":
		return "the server at " + p.addr
	default:
		return "the store in " + p.dir
	}
}

// placeOf returns the place that the flags name, or else the environment.
func placeOf(cmd *cli.Command) (place, error) {
	p := place{cmd.String("socket"), cmd.String("addr"), cmd.String("dir")}
	if p == (place{}) {
		p = place{os.Getenv("APIKEYCTL_SOCKET"), os.Getenv("APIKEYCTL_ADDR"),
			os.Getenv("APIKEYCTL_DIR")}
	}
	n := 0
	for _, text := range []string{p.socket, p.addr, p.dir} {
		if text != "" {
			n++
		}
	}
	switch n {
	case 0:
		return p, usage("it is not known where the keys are: give --socket PATH, --addr HOST:PORT " +
			"or --dir DIR, or set APIKEYCTL_SOCKET")
	case 1:
		if p.dir == "" && len(cmd.StringSlice("pepper-file")) > 0 {
			return p, usage("--pepper-file goes with --dir: a server has the pepper already")
		}
		prefix := cmd.String("prefix")
		if p.dir == "" && prefix != "" {
			return p, usage("--prefix goes with --dir: a server has its own prefix")
		}
		if cmd.IsSet("prefix") && !token.ValidPrefix(prefix) {
			return p, usage("--prefix cannot be used: write 1 to 32 letters, digits and inner " +
				"underscores")
		}
		return p, nil
	default:
		return p, usage("more than one place is given: give one of --socket, --addr and --dir")
	}
}

// A connection is a gRPC connection to the service at a place. Close ends the connection, and the
// service that apikeyctl itself runs for a directory.
type connection struct {
	*grpc.ClientConn
	close func() error
}

// connect connects to the place. The errors are failures.
func (c *call) connect(ctx context.Context) (*connection, error) {
	opts := []grpc.DialOption{
		grpc.WithDisableServiceConfig(),
		grpc.WithChainUnaryInterceptor(c.limit, c.repeat),
	}
	switch p := c.place; {
	case p.socket != "":
		return dialSocket(p.socket, opts)
	case p.addr != "":
		return dialTLS(ctx, c.Command, p.addr, opts)
	default:
		return c.openDir(ctx, opts)
	}
}

// maxSocketPath is the length of the longest path of a socket, in bytes. The system keeps the path
// with a zero byte.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// dialSocket connects to a unix socket. A socket that cannot be used has its own sentence, before
// gRPC tries.
func dialSocket(path string, opts []grpc.DialOption) (*connection, error) {
	if err := checkSocket(path); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///localhost", append(opts,
		grpc.WithTransportCredentials(unixcreds.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}))...)
	if err != nil {
		return nil, local("%v", err)
	}
	return &connection{conn, conn.Close}, nil
}

func checkSocket(path string) error {
	info, err := os.Stat(path)
	switch {
	case len(path) > maxSocketPath:
		return usage("the path of the socket has %d bytes, and a socket can have %d at most: go to "+
			"the directory of the socket, and give its name alone", len(path), maxSocketPath)
	case errors.Is(err, fs.ErrNotExist):
		return &failure{exitServer, codes.Unavailable, "SOCKET_MISSING", fmt.Sprintf(
			"there is no socket at %s: start the server, or look in its settings for the path", path)}
	case errors.Is(err, fs.ErrPermission):
		return &failure{exitDenied, codes.PermissionDenied, "SOCKET_DENIED", fmt.Sprintf(
			"you may not enter the directory of the socket %s: run apikeyctl as the user of the "+
				"server, or as root", path)}
	case err != nil:
		return local("the socket: %v: give another path", err)
	case info.Mode().Type() != fs.ModeSocket:
		return usage("%s is no socket: give the path of the server's socket, or --dir for the "+
			"directory of a store", path)
	}
	err = greet(path)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return place{socket: path}.refused()
	case errors.Is(err, fs.ErrPermission):
		return place{socket: path}.refused()
	case errors.Is(err, syscall.ECONNREFUSED):
		return &failure{exitServer, codes.Unavailable, "SOCKET_WITHOUT_LISTENER", fmt.Sprintf(
			"no process listens on the socket %s, so its server has ended: start the server", path)}
	default:
		return &failure{exitServer, codes.Unavailable, "SOCKET_FAILED", fmt.Sprintf(
			"cannot connect to the socket %s: %v: see whether the server is busy", path,
			withoutOp(err))}
	}
}

// greet makes a connection, and waits for the first byte of the server: an HTTP/2 server speaks
// first. A server that does not accept the user closes the connection. A server that is slow is no
// error here: the call waits for the server.
func greet(path string) error {
	conn, err := net.DialTimeout("unix", path, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	if _, err = conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return err
}

// refused is the failure of a connection that the server does not accept from this user.
func (p place) refused() error {
	owner := "its user"
	mode := ""
	if info, err := os.Stat(p.socket); p.socket != "" && err == nil {
		owner, mode = ownerOf(info), fmt.Sprintf(", mode %04o", info.Mode().Perm())
	}
	return &failure{exitDenied, codes.PermissionDenied, "SOCKET_DENIED", fmt.Sprintf(
		"%s does not accept you: its socket is for %s%s. Run apikeyctl as this user or as root, or "+
			"see AllowUIDs in package admin", p, owner, mode)}
}

// userName returns the name of a user for a sentence: alice (1000).
func userName(uid int) string {
	id := strconv.Itoa(uid)
	if u, err := user.LookupId(id); err == nil {
		return fmt.Sprintf("%s (%s)", u.Username, id)
	}
	return "user " + id
}

// dialTLS connects to a server over TLS, with a key. dialTLS makes one connection beforehand, so
// that an address without a server, and a certificate that is not trusted, have their sentences.
func dialTLS(
	ctx context.Context, cmd *cli.Command, addr string, opts []grpc.DialOption,
) (*connection, error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return nil, usage("--addr is not an address: write HOST:PORT, such as keys.example.com:443")
	}
	config := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2"}}
	if file := cmd.String("ca"); file != "" {
		pem, err := os.ReadFile(file)
		if err != nil {
			return nil, usage("--ca: %v: give a PEM file with certificates", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, usage("--ca: %s holds no certificate: give a PEM file", file)
		}
	}
	var key credentials.PerRPCCredentials
	switch file, text := cmd.String("key-file"), os.Getenv("APIKEYCTL_KEY"); {
	case file != "":
		key = keycreds.FromFile(file)
	case text != "":
		key = keycreds.New(text)
	default:
		return nil, usage("a server at an address needs a key: give --key-file FILE, or set " +
			"APIKEYCTL_KEY or APIKEYCTL_KEY_FILE")
	}
	if err := probe(ctx, addr, config); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, append(opts,
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithPerRPCCredentials(key))...)
	if err != nil {
		return nil, local("%v", err)
	}
	return &connection{conn, conn.Close}, nil
}

// probe makes a TLS connection, and returns a failure that says why the connection failed.
func probe(ctx context.Context, addr string, config *tls.Config) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", addr)
	if err == nil {
		return conn.Close()
	}
	unreachable := func(format string, args ...any) error {
		return &failure{exitServer, codes.Unavailable, "SERVER_UNREACHABLE",
			fmt.Sprintf(format, args...)}
	}
	var dns *net.DNSError
	var certificate *tls.CertificateVerificationError
	var notTLS tls.RecordHeaderError
	switch {
	case errors.As(err, &dns):
		return unreachable("the name of the host in %s is not known: check the address", addr)
	case errors.Is(err, syscall.ECONNREFUSED):
		return unreachable("no server listens at %s: start the server, or check the address", addr)
	case errors.As(err, &certificate):
		return &failure{exitServer, codes.Unavailable, "CERTIFICATE_NOT_TRUSTED", fmt.Sprintf(
			"the certificate of %s is not trusted: %v: give --ca FILE with the right certificate, or "+
				"check the address", addr, certificate.Err)}
	case errors.As(err, &notTLS):
		return unreachable("the server at %s does not speak TLS, so the key is not sent: check the "+
			"port", addr)
	case errors.Is(err, context.DeadlineExceeded):
		return unreachable("the server at %s does not answer: check the address and the network",
			addr)
	default:
		return unreachable("cannot connect to %s: %v: check the address", addr, withoutOp(err))
	}
}

// withoutOp returns the cause of a network error, without the words "dial tcp".
func withoutOp(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}
