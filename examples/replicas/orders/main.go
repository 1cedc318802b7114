// Orders is the program to deploy: one server of several that share their API keys. The guide to
// replicas on Kubernetes deploys this program.
package main

import (
	"context"
	"log"
	"os"
	"os/signal"
	"syscall"

	"github.com/grpc-api-key/grpc-api-key/examples/replicas/server"
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := server.Run(ctx, os.Args[1:]); err != nil {
		log.Fatal("orders: ", err)
	}
}
