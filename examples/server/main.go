// Server is a gRPC server that requires an API key for every method. Server also has a console to
// manage the keys at run time. Only the process that has opened the directory of the store can
// manage the keys.
//
//	go run ./examples/server -issue laptop
//
// The command prints a new key once. The server then serves reflection and the standard health
// service (Check is a unary call, and Watch is a stream), and reads commands from standard input:
//
//	create NAME [OWNER]    list    revoke ID [REASON]    quit
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func main() {
	log.SetFlags(0)
	addr := flag.String("addr", "127.0.0.1:50051", "address to listen on")
	dir := flag.String("dir", "keys", "directory of the key store; it must contain no other files")
	issue := flag.String("issue", "", "create a key with this name and print the key once")
	certFile := flag.String("cert", "",
		"PEM file with the TLS certificate; if empty, make a throw-away certificate and write it "+
			"to -ca")
	keyFile := flag.String("key", "", "PEM file with the private key of -cert")
	caFile := flag.String("ca", "server.pem",
		"file for the throw-away certificate, for clients to trust")
	flag.Parse()
	if flag.NArg() > 0 {
		log.Fatalf("server: unexpected argument %q: flags begin with a hyphen; see -help",
			flag.Arg(0))
	}
	if err := run(*addr, *dir, *issue, *certFile, *keyFile, *caFile); err != nil {
		log.Fatal("server: ", err)
	}
}

func run(addr, dir, issue, certFile, keyFile, caFile string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// Listen first: if another server already runs on this address, this start fails before it
	// changes anything of that server.
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer lis.Close()
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	store, err := keystore.Open(dir, &keystore.Options{Logger: logger})
	if err != nil {
		return err
	}
	defer store.Close()
	console := console{ctx, store, stop}

	auth, err := interceptor.New(store, interceptor.RequireTLS())
	if err != nil {
		return err
	}
	cert, err := certificate(certFile, keyFile, caFile)
	if err != nil {
		return err
	}
	creds := grpc.Creds(credentials.NewServerTLSFromCert(&cert))
	server := grpc.NewServer(append(auth.ServerOptions(), creds)...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	reflection.Register(server)
	if err := auth.Check(server); err != nil {
		return err
	}
	if issue != "" {
		if err := console.create([]string{issue}); err != nil {
			return err
		}
	}
	fmt.Printf("listening on %s\n", lis.Addr())

	go console.read(os.Stdin)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		// Running calls have 5 seconds to finish. Then the server ends the remaining streams with a
		// status that allows clients to retry.
		return interceptor.Shutdown(server, store, 5*time.Second)
	}
}

// certificate loads the certificate from certFile. If certFile is empty, certificate makes a
// throw-away certificate and writes the public part to caFile.
func certificate(certFile, keyFile, caFile string) (tls.Certificate, error) {
	if (certFile == "") != (keyFile == "") {
		return tls.Certificate{}, errors.New("set both -cert and -key, " +
			"or neither for a throw-away certificate")
	}
	if certFile != "" {
		return tls.LoadX509KeyPair(certFile, keyFile)
	}
	cert, pem, err := throwaway.Certificate()
	if err != nil {
		return tls.Certificate{}, err
	}
	if err := os.WriteFile(caFile, pem, 0o644); err != nil {
		return tls.Certificate{}, err
	}
	path, err := filepath.Abs(caFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	fmt.Printf("clients trust the certificate in %s\n", path)
	return cert, nil
}

// A console runs the commands of an administrator.
type console struct {
	ctx   context.Context
	store *keystore.Store
	quit  func()
}

func (c console) read(in io.Reader) {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) == 0 {
			continue
		}
		if err := c.do(words[0], words[1:]); err != nil {
			fmt.Println("error:", err)
		}
	}
	// The server continues after the end of the input, because there may be no terminal.
}

func (c console) do(command string, args []string) error {
	switch {
	case command == "create" && len(args) >= 1:
		return c.create(args)
	case command == "revoke" && len(args) >= 1:
		begin := time.Now()
		if err := c.store.Revoke(c.ctx, args[0], strings.Join(args[1:], " ")); err != nil {
			return err
		}
		fmt.Printf("revoked %s in %v\n", args[0], time.Since(begin).Round(10*time.Microsecond))
		return nil
	case command == "list" && len(args) == 0:
		for key, err := range c.store.List(c.ctx, keystore.Query{}) {
			if err != nil {
				return err
			}
			fmt.Printf("%s  %-8v  %s  %s\n", key.ID, key.Status(), key.Name, key.Owner)
		}
		return nil
	case command == "quit" && len(args) == 0:
		c.quit()
		return nil
	default:
		return errors.New(
			"unknown command: use create NAME [OWNER], list, revoke ID [REASON] or quit",
		)
	}
}

func (c console) create(args []string) error {
	spec := keystore.Spec{Name: args[0], Owner: strings.Join(args[1:], " ")}
	issued, err := c.store.Create(c.ctx, spec)
	if err != nil {
		return err
	}
	fmt.Printf("created %s\nthe key is shown only once:\n%s\n",
		issued.Key.ID, issued.Secret.Reveal())
	return nil
}
