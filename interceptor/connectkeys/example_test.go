package connectkeys_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/connectkeys"
	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A Connect server and its client. Generated code calls connect.NewUnaryHandler and
// connect.NewClient in the same way.
func Example() {
	store, err := keystore.New(backendtest.NewMemory(), nil) // in production: keystore.Open
	if err != nil {
		panic(err)
	}
	defer store.Close()
	auth, err := connectkeys.New(store)
	if err != nil {
		panic(err)
	}
	const method = "/acme.v1.Greeter/Greet"
	mux := http.NewServeMux()
	mux.Handle(method, connect.NewUnaryHandler(method, func(
		ctx context.Context, r *connect.Request[wrapperspb.StringValue],
	) (*connect.Response[wrapperspb.StringValue], error) {
		key, _ := httpkeys.FromContext(ctx)
		return connect.NewResponse(wrapperspb.String(r.Msg.Value + ", " + key.Owner)), nil
	}, connect.WithInterceptors(auth.Interceptor())))
	server := httptest.NewTLSServer(auth.Wrap(mux))
	defer server.Close()

	issued, err := store.Create(context.Background(), keystore.Spec{Name: "shop", Owner: "acme"})
	if err != nil {
		panic(err)
	}
	client := server.Client() // in production: new(http.Client)
	greet := func() {
		greeter := connect.NewClient[wrapperspb.StringValue, wrapperspb.StringValue](
			client, server.URL+method)
		response, err := greeter.CallUnary(context.Background(),
			connect.NewRequest(wrapperspb.String("hello")))
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(response.Msg.Value)
	}
	greet()
	client.Transport = &httpkeys.Transport{
		Base:   client.Transport,
		Source: func(context.Context) (string, error) { return issued.Secret.Reveal(), nil },
		Hosts:  []string{server.Listener.Addr().String()},
	}
	greet()
	// Output:
	// unauthenticated: the request has no API key: send it in a header, authorization: Bearer <key>
	// hello, acme
}
