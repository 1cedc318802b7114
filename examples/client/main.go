// Client calls the server of examples/server with an API key. The key comes from the environment
// variable API_KEY, because a flag would be visible in the process table.
//
//	API_KEY=oil_… go run ./examples/client          # one call
//	API_KEY=oil_… go run ./examples/client -watch   # a stream, until the key is revoked
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

func main() {
	log.SetFlags(0)
	addr := flag.String("addr", "127.0.0.1:50051", "address of the server")
	ca := flag.String("ca", "server.pem", "PEM file with the certificate of the server")
	watch := flag.Bool("watch", false, "open a stream and keep it open, instead of one call")
	flag.Parse()
	if err := run(*addr, *ca, *watch); err != nil {
		log.Fatal("client: ", explain(err))
	}
}

func run(addr, ca string, watch bool) error {
	roots, err := credentials.NewClientTLSFromFile(ca, "")
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient(addr,
		grpc.WithTransportCredentials(roots),
		grpc.WithPerRPCCredentials(keycreds.New(os.Getenv("API_KEY"))))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)

	if !watch {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		reply, err := client.Check(ctx, &healthpb.HealthCheckRequest{})
		if err != nil {
			return err
		}
		fmt.Println(reply.Status)
		return nil
	}
	stream, err := client.Watch(context.Background(), &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	for {
		update, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Println(update.Status)
	}
}

// explain returns the text of err, with the reason from the server if there is one.
func explain(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return fmt.Sprintf("%v (%s)", err, info.Reason)
		}
	}
	return err.Error()
}
