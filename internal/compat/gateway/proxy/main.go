// Proxy is the gateway of the guide, as a separate program. Proxy translates HTTP requests into
// calls of a gRPC server.
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	_ "google.golang.org/genproto/googleapis/rpc/errdetails" // the reason of a refusal becomes JSON
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/grpc-api-key/grpc-api-key/internal/compat/gateway"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:8080", "address for HTTP")
	server := flag.String("server", "127.0.0.1:50051", "address of the gRPC server")
	flag.Parse()
	handler, err := newGateway(context.Background(), *server)
	if err != nil {
		log.Fatal(err)
	}
	lis, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(lis.Addr())
	log.Fatal(http.Serve(lis, handler))
}

// newGateway returns the handler that translates HTTP into calls of the server at an address.
func newGateway(ctx context.Context, address string) (http.Handler, error) {
	mux := runtime.NewServeMux()
	opts := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if err := gateway.RegisterHealthHandlerFromEndpoint(ctx, mux, address, opts); err != nil {
		return nil, err
	}
	return mux, nil
}
