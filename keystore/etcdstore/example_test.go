package etcdstore_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// A store on three members of etcd, with TLS and a client certificate.
func Example() {
	certificate, err := tls.LoadX509KeyPair("client.crt", "client.key")
	if err != nil {
		slog.Error("read the client certificate", "error", err)
		return
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{
			"https://etcd-0:2379", "https://etcd-1:2379", "https://etcd-2:2379",
		},
		TLS:                  &tls.Config{Certificates: []tls.Certificate{certificate}},
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		PermitWithoutStream:  true,
	})
	if err != nil {
		slog.Error("make the etcd client", "error", err)
		return
	}
	defer client.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	b, err := etcdstore.Open(ctx, client, "/apikeys/prod/", nil)
	if err != nil {
		slog.Error("open the store in etcd", "error", err)
		return
	}
	store, err := keystore.New(b, nil)
	if err != nil {
		slog.Error("open the key store", "error", err)
		return
	}
	defer store.Close() // closes b too

	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		slog.Error("create a key", "error", err)
		return
	}
	fmt.Println(issued.Secret.Reveal())
}
