package httpkeys_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A server whose paths need keys, and a client.
func Example() {
	store, err := keystore.New(backendtest.NewMemory(), nil) // in production: keystore.Open
	if err != nil {
		panic(err)
	}
	defer store.Close()
	auth, err := httpkeys.New(store,
		httpkeys.Public("GET /healthz"),
		httpkeys.Require("GET /orders/{id}", "orders:read"))
	if err != nil {
		panic(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		key, _ := httpkeys.FromContext(r.Context())
		fmt.Fprintf(w, "order %s for %s", r.PathValue("id"), key.Owner)
	})
	server := httptest.NewTLSServer(auth.Wrap(mux))
	defer server.Close()

	issued, err := store.Create(context.Background(), keystore.Spec{
		Name: "shop", Owner: "acme", Scopes: []string{"orders:read"}})
	if err != nil {
		panic(err)
	}
	client := server.Client() // in production: new(http.Client)
	get := func() {
		response, err := client.Get(server.URL + "/orders/7")
		if err != nil {
			panic(err)
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		fmt.Println(response.StatusCode, string(body))
	}
	get()
	client.Transport = &httpkeys.Transport{
		Base:   client.Transport,
		Source: func(context.Context) (string, error) { return issued.Secret.Reveal(), nil },
		Hosts:  []string{server.Listener.Addr().String()},
	}
	get()
	if err := store.Revoke(context.Background(), issued.Key.ID, "leaked"); err != nil {
		panic(err)
	}
	get()
	// Output:
	// 401 {"title":"Unauthorized","status":401,"detail":"the request has no API key: send it in a header, authorization: Bearer <key>","reason":"CREDENTIALS_MISSING"}
	//
	// 200 order 7 for acme
	// 401 {"title":"Unauthorized","status":401,"detail":"invalid API key","reason":"API_KEY_INVALID"}
}

// A test of a handler needs neither a server nor a store.
func ExampleNewContext() {
	handler := func(w http.ResponseWriter, r *http.Request) {
		key, _ := httpkeys.FromContext(r.Context())
		fmt.Fprintf(w, "the orders of %s", key.Owner)
	}
	r := httptest.NewRequest("GET", "/orders", nil)
	r = r.WithContext(httpkeys.NewContext(r.Context(), &keystore.Key{Owner: "acme"}))
	w := httptest.NewRecorder()
	handler(w, r)
	fmt.Println(w.Body)
	// Output: the orders of acme
}
