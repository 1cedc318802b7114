package otelkeys_test

import (
	"log"
	"log/slog"
	"os"

	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The interceptors of otelkeys run after those of the Authenticator. The stats handler of otelgrpc
// makes the spans.
func Example() {
	store, err := keystore.Open("keys", nil)
	check(err)
	telemetry, err := otelkeys.New(store, &otelkeys.Options{Owner: true})
	check(err)
	defer telemetry.Close()
	auth, err := interceptor.New(store,
		interceptor.Observe(telemetry.Observe),
		interceptor.LogRefusals(slog.New(
			otelkeys.LogHandler(slog.NewJSONHandler(os.Stderr, nil)))))
	check(err)
	var opts []grpc.ServerOption
	// Add here: grpc.StatsHandler(otelgrpc.NewServerHandler())
	opts = append(opts, auth.ServerOptions()...)
	opts = append(opts, telemetry.ServerOptions()...)
	server := grpc.NewServer(opts...)
	_ = server // register your services, and serve
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
