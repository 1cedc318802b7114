// Replicas shows three gRPC servers that share their API keys. A key that one server creates is
// valid on all servers. Once Revoke has returned on one server, no server admits the key, and the
// streams of the key have ended on every server: also on a server that was stopped in the meantime.
//
//	cd examples/replicas && go run .
//	go run -C examples/replicas .       # the same, from the root of the repository
//	go run -C examples/replicas . -engine postgres
//
// The servers share their keys in etcd, or, with -engine postgres, in PostgreSQL, which the machine
// must have. Each server, and each of the three members of etcd, is a process, and listens on
// loopback. PostgreSQL is a primary and a standby. Package server is the code of a server. The
// command needs Linux or macOS.
package main

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/examples/replicas/server"
	"github.com/grpc-api-key/grpc-api-key/examples/replicas/server/etcd"
	"github.com/grpc-api-key/grpc-api-key/examples/replicas/server/postgres"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case len(os.Args) > 1 && os.Args[1] == "server":
		err = server.Run(ctx, os.Args[2:], new(etcd.Engine), new(postgres.Engine))
	case len(os.Args) > 1 && os.Args[1] == "member":
		err = runMember(os.Args[2:])
	default:
		err = run(ctx)
	}
	if err != nil {
		log.Fatal("replicas: ", err)
	}
}

// engines start the storage that the servers share.
var engines = map[string]func(*demo, context.Context) (flags []string, err error){
	"etcd":     (*demo).startEtcd,
	"postgres": (*demo).startPostgres,
}

// A demo contains what the command has started.
type demo struct {
	dir       string // for everything that the processes write
	processes []*process
	cleanups  []func()
	servers   []*replica
	balanced  *grpc.ClientConn // to all servers in turn
}

func run(ctx context.Context) (err error) {
	engine := flag.String("engine", "etcd",
		"the storage that the servers share: etcd or postgres")
	flag.Parse()
	startEngine, ok := engines[*engine]
	if !ok || flag.NArg() > 0 {
		return errors.New("the only flag is -engine, and the engines are etcd and postgres")
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "replicas-")
	if err != nil {
		return err
	}
	d := &demo{dir: dir}
	defer func() { err = errors.Join(err, d.stop()) }()

	step("Start %s", *engine)
	flags, err := startEngine(d, ctx)
	if err != nil {
		return err
	}
	step("Start three servers")
	if err := d.startServers(ctx, flags); err != nil {
		return err
	}
	if err := d.revoke(ctx); err != nil {
		return err
	}
	return d.revokeBesideAStoppedServer(ctx)
}

// startServers starts three servers, and connects to each of them and to all of them.
func (d *demo) startServers(ctx context.Context, flags []string) error {
	creds, certFlags, err := d.certificate()
	if err != nil {
		return err
	}
	for _, name := range []string{"one", "two", "three"} {
		args := []string{"server", "-name=" + name, "-listen=127.0.0.1:0", "-console", "-drain=0s"}
		p, err := d.start(append(append(args, flags...), certFlags...)...)
		if err != nil {
			return err
		}
		d.servers = append(d.servers, &replica{process: p, name: name})
	}
	for _, s := range d.servers {
		if s.addr, err = s.answer(ctx, "serving"); err != nil {
			return err
		}
		s.conn, err = grpc.NewClient(s.addr, grpc.WithTransportCredentials(creds))
		if err != nil {
			return err
		}
		say("%-6s  %s  process %d", s.name, s.addr, s.cmd.Process.Pid)
	}
	d.balanced, err = balance(d.servers, creds)
	return err
}

// revoke creates a key on one server, uses the key on all, and revokes the key on another.
func (d *demo) revoke(ctx context.Context) error {
	step("Create a key on server one, and use the key on all servers")
	id, key, err := d.create(ctx, d.servers[0], "first")
	if err != nil {
		return err
	}
	users, err := d.useEverywhere(ctx, key)
	if err != nil {
		return err
	}
	served := make(map[string]int)
	for range 300 {
		name, err := call(ctx, d.balanced, key)
		if err != nil {
			return err
		}
		served[name]++
	}
	say("a client with round robin made 300 calls: server one has answered %d, two %d, three %d",
		served["one"], served["two"], served["three"])
	say("each server has an open stream of the key, and serves one call after the other")

	step("Revoke the key on server two")
	called := time.Now()
	if _, err := d.servers[1].ask(ctx, "revoke "+id, "revoked"); err != nil {
		return err
	}
	returned := time.Now()
	time.Sleep(300 * time.Millisecond) // the calls continue
	say("%-24s  %-13s  %s", "after the call of Revoke", "first refusal", "stream ended")
	for _, u := range users {
		u.stop()
		say("%-24s  %-13v  %v", "server "+u.server.name, since(called, u.refused()),
			since(called, u.ended))
	}
	say("Revoke returned after %v", since(called, returned))
	return report(users, returned)
}

// revokeBesideAStoppedServer stops a server, revokes a key on another, and wakes the server.
func (d *demo) revokeBesideAStoppedServer(ctx context.Context) error {
	step("Stop server three (SIGSTOP), and revoke another key on server one")
	one, three := d.servers[0], d.servers[2]
	id, key, err := d.create(ctx, one, "second")
	if err != nil {
		return err
	}
	users, err := d.useEverywhere(ctx, key)
	if err != nil {
		return err
	}
	if err := three.pause(); err != nil {
		return err
	}
	say("process %d has stopped; its connections stay open", three.cmd.Process.Pid)
	called := time.Now()
	if _, err := one.ask(ctx, "revoke "+id, "revoked"); err != nil {
		return err
	}
	returned := time.Now()
	say("Revoke returned after %v: Revoke waited for server three, until server three",
		since(called, returned))
	say("may admit nothing without contact to the other servers")

	step("Send 100 calls to the stopped server, and wake the server")
	answers := make(chan error)
	for range 100 {
		go func() {
			_, err := call(ctx, three.conn, key)
			answers <- err
		}()
	}
	time.Sleep(300 * time.Millisecond) // the calls reach the sockets of the server
	if err := three.wake(); err != nil {
		return err
	}
	woken := time.Now()
	counts := make(map[codes.Code]int)
	for range 100 {
		counts[status.Code(<-answers)]++
	}
	say("server three has answered: %d admitted, %d refused as Unavailable, %d as Unauthenticated",
		counts[codes.OK], counts[codes.Unavailable], counts[codes.Unauthenticated])
	if counts[codes.OK] > 0 {
		return errors.New("server three has admitted a revoked key")
	}
	_, good, err := d.create(ctx, one, "third")
	if err != nil {
		return err
	}
	for _, err = call(ctx, three.conn, good); err != nil; _, err = call(ctx, three.conn, good) {
		if ctx.Err() != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	say("server three is back %v after it woke up, and admits a key that is valid",
		since(woken, time.Now()))
	for _, u := range users {
		u.stop()
		say("the stream on server %-6s ended %v after the call of Revoke: %v", u.server.name,
			since(called, u.ended), status.Code(u.err))
	}
	return report(users, returned)
}

// report returns an error if a call that began after Revoke had returned was admitted, or if a
// server has not ended its stream.
func report(users []*user, returned time.Time) error {
	admitted, refused := 0, 0
	for _, u := range users {
		a, r := u.count(returned)
		admitted, refused = admitted+a, refused+r
		if status.Code(u.err) == codes.Canceled {
			return fmt.Errorf("the stream on server %s has not ended", u.server.name)
		}
	}
	say("calls that began after Revoke had returned: %d admitted, %d refused", admitted, refused)
	if admitted > 0 {
		return errors.New("a server has admitted a revoked key")
	}
	return nil
}

// create creates a key on a server.
func (d *demo) create(ctx context.Context, s *replica, name string) (id, key string, err error) {
	answer, err := s.ask(ctx, "create "+name, "created")
	id, key, _ = strings.Cut(answer, " ")
	return id, key, err
}

// useEverywhere starts a user of a key for each server.
func (d *demo) useEverywhere(ctx context.Context, key string) (users []*user, err error) {
	for _, s := range d.servers {
		u, err := use(ctx, s, key)
		if err != nil {
			return nil, err
		}
		users = append(users, u)
	}
	return users, nil
}

// certificate makes the certificate of the servers, and returns the credentials for clients, and
// the flags of a server.
func (d *demo) certificate() (credentials.TransportCredentials, []string, error) {
	cert, certPEM, err := throwaway.Certificate()
	if err != nil {
		return nil, nil, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return nil, nil, err
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	certFile, keyFile := filepath.Join(d.dir, "cert.pem"), filepath.Join(d.dir, "key.pem")
	if err := os.WriteFile(certFile, certPEM, 0o600); err != nil {
		return nil, nil, err
	}
	if err := os.WriteFile(keyFile, keyPEM, 0o600); err != nil {
		return nil, nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(certPEM)
	return credentials.NewClientTLSFromCert(roots, "localhost"),
		[]string{"-cert=" + certFile, "-cert-key=" + keyFile}, nil
}

// start starts a process that ends with the demo.
func (d *demo) start(args ...string) (*process, error) {
	p, err := start(args...)
	if err == nil {
		d.processes = append(d.processes, p)
	}
	return p, err
}

// stop ends all processes, the last first, and removes what they have written.
func (d *demo) stop() error {
	for i := range d.processes {
		d.processes[len(d.processes)-1-i].stop()
	}
	for _, cleanup := range slices.Backward(d.cleanups) {
		cleanup()
	}
	return os.RemoveAll(d.dir)
}

// since returns a duration to the tenth of a millisecond.
func since(begin, end time.Time) time.Duration {
	return end.Sub(begin).Round(100 * time.Microsecond)
}

var steps int

func step(format string, args ...any) {
	steps++
	fmt.Printf("\n%d. %s\n", steps, fmt.Sprintf(format, args...))
}

func say(format string, args ...any) { fmt.Printf("   "+format+"\n", args...) }
