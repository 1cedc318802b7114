package main

import (
	"context"
	"fmt"
	"log"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func main() {
	store, err := keystore.Open("keys", nil) // a directory that holds nothing else
	check(err)
	auth, err := interceptor.New(store)
	check(err)
	tls, err := credentials.NewServerTLSFromFile("cert.pem", "key.pem")
	check(err)
	server := grpc.NewServer(append(auth.ServerOptions(), grpc.Creds(tls))...)
	healthpb.RegisterHealthServer(server, health.NewServer()) // register your services here
	check(auth.Check(server))                                 // reports misspelt method names
	issued, err := store.Create(context.Background(), keystore.Spec{Name: "first", Owner: "you"})
	check(err)
	fmt.Println("API_KEY=" + issued.Secret.Reveal()) // once: the store keeps only a digest
	listener, err := net.Listen("tcp", "localhost:50051")
	check(err)
	check(server.Serve(listener))
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
