package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

func main() {
	tls, err := credentials.NewClientTLSFromFile("cert.pem", "")
	check(err)
	conn, err := grpc.NewClient("localhost:50051", grpc.WithTransportCredentials(tls),
		grpc.WithPerRPCCredentials(keycreds.New(os.Getenv("API_KEY"))))
	check(err)
	health := healthpb.NewHealthClient(conn)
	reply, err := health.Check(context.Background(), new(healthpb.HealthCheckRequest))
	check(err)
	fmt.Println(reply.Status)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
