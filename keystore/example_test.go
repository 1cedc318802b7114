package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// exampleStore returns a store in a directory that the returned function removes.
func exampleStore() (*keystore.Store, func()) {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	store, err := keystore.Open(dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	return store, func() {
		store.Close()
		os.RemoveAll(dir)
	}
}

// A key is created, used, and revoked.
func Example() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()

	issued, err := store.Create(ctx, keystore.Spec{Name: "ci", Owner: "team-a",
		Scopes: []string{"orders:read"}})
	if err != nil {
		log.Fatal(err)
	}
	token := issued.Secret.Reveal() // it cannot be retrieved later

	key, err := store.Verify(ctx, token)
	fmt.Println(key.Owner, key.HasScope("orders:read"), err)

	if err := store.Revoke(ctx, key.ID, "leaked"); err != nil {
		log.Fatal(err)
	}
	_, err = store.Verify(ctx, token)
	fmt.Println(err)
	fmt.Println(errors.Is(err, keystore.ErrDenied), errors.Is(err, keystore.ErrRevoked))
	// Output:
	// team-a true <nil>
	// API key denied: revoked
	// true true
}

// A context that ends with its key, for what lives longer than a call.
func ExampleStore_Bind() {
	store, done := exampleStore()
	defer done()
	issued, err := store.Create(context.Background(), keystore.Spec{Name: "socket"})
	if err != nil {
		log.Fatal(err)
	}

	session, err := store.Bind(context.Background(), issued.Secret.Reveal())
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	ctx, key := session.Context(), session.Key()
	fmt.Println(ctx.Err())

	if err := store.Revoke(context.Background(), key.ID, "lost"); err != nil {
		log.Fatal(err)
	}
	fmt.Println(context.Cause(ctx))
	// Output:
	// <nil>
	// API key denied: revoked
}

// A key that expires by itself.
func ExampleStore_Create() {
	store, done := exampleStore()
	defer done()
	_, err := store.Create(context.Background(),
		keystore.Spec{Name: "demo", ExpiresAt: time.Now().Add(24 * time.Hour)})
	fmt.Println(err)
	_, err = store.Create(context.Background(), keystore.Spec{})
	fmt.Println(err)
	// Output:
	// <nil>
	// keystore: invalid argument: Spec.Name is empty: give the key a name that people recognize
}

// Keys page by page: the last ID of a page is the cursor for the next.
func ExampleStore_List() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	for _, name := range []string{"a", "b", "c"} {
		if _, err := store.Create(ctx, keystore.Spec{Name: name, Owner: "team-a"}); err != nil {
			log.Fatal(err)
		}
	}
	query := keystore.Query{Owner: "team-a", Status: keystore.StatusActive, Limit: 2}
	for key, err := range store.List(ctx, query) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(key.Name, key.Status())
		query.Cursor = key.ID
	}
	fmt.Println("next page")
	for key, err := range store.List(ctx, query) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(key.Name, key.Status())
	}
	// Output:
	// a active
	// b active
	// next page
	// c active
}

// A key gets a new secret, and the old one works for an hour more.
func ExampleStore_Rotate() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	old, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}

	issued, err := store.Rotate(ctx, old.Key.ID, time.Hour)
	if err != nil {
		log.Fatal(err)
	}
	for _, token := range []string{old.Secret.Reveal(), issued.Secret.Reveal()} {
		_, err := store.Verify(ctx, token)
		fmt.Println(err)
	}

	// A second rotation leaves the newest two.
	if _, err := store.Rotate(ctx, old.Key.ID, time.Hour); err != nil {
		log.Fatal(err)
	}
	_, err = store.Verify(ctx, old.Secret.Reveal())
	fmt.Println(err)
	// Output:
	// <nil>
	// <nil>
	// API key denied: unknown
}

// A scope is taken away from a key: its live contexts end, and may be bound again for what is left.
func ExampleStore_Update() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci", Scopes: []string{"orders:read",
		"orders:write"}})
	if err != nil {
		log.Fatal(err)
	}
	session, err := store.Bind(ctx, issued.Secret.Reveal())
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()

	key, err := store.Update(ctx, issued.Key.ID, func(spec *keystore.Spec) error {
		spec.Scopes = []string{"orders:read"}
		return nil
	})
	fmt.Println(key.HasScope("orders:write"), err)
	fmt.Println(session.Cause())
	// Output:
	// false <nil>
	// API key narrowed
}

// A key is switched off, and on again.
func ExampleStore_Disable() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Disable(ctx, issued.Key.ID, "seen at an odd hour"); err != nil {
		log.Fatal(err)
	}
	_, err = store.Verify(ctx, issued.Secret.Reveal())
	fmt.Println(err)
	if err := store.Enable(ctx, issued.Key.ID); err != nil {
		log.Fatal(err)
	}
	_, err = store.Verify(ctx, issued.Secret.Reveal())
	fmt.Println(err)
	// Output:
	// API key denied: disabled
	// <nil>
}
