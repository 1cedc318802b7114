package console_test

import (
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"

	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
)

// A console on the same port as other pages. Operators log in with keys that have the scope
// keys:read or keys:admin.
func Example() {
	store, err := keystore.Open("keys", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	c, err := console.New(store, console.Title("Orders, production"))
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	mux := http.NewServeMux()
	mux.Handle("/keys/", http.StripPrefix("/keys", c))
	log.Fatal(http.ListenAndServeTLS(":8443", "cert.pem", "key.pem", mux))
}

// An application that knows its users already. A user who may not look at keys is refused.
func ExampleWithUser() {
	store, err := keystore.New(memory.New(), nil) // in a service: keystore.Open
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	c, err := console.New(store, console.WithUser(
		func(r *http.Request) (actor string, scopes []string, ok bool) {
			switch user := r.Header.Get("X-User"); user { // set by the proxy that logs users in
			case "":
				return "", nil, false
			case "anna":
				return user, []string{"keys:admin"}, true
			default:
				return user, nil, true
			}
		}))
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header.Set("X-User", "ben")
	w := httptest.NewRecorder()
	c.ServeHTTP(w, r)
	fmt.Println(w.Code)
	// Output: 403
}
