// Orders is the program to deploy: one server of several that share their API keys. The guide to
// replicas on Kubernetes deploys this program. To share the keys in PostgreSQL, replace the engine
// by that of the package postgres beside the package etcd.
package main

import (
	"context"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/grpc-api-key/grpc-api-key/examples/replicas/server"
	"github.com/grpc-api-key/grpc-api-key/examples/replicas/server/etcd"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := server.Run(ctx, os.Args[1:], new(etcd.Engine)); err != nil {
		log.Fatal("orders: ", err)
	}
}
