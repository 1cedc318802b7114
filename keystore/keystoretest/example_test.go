package keystoretest_test

import (
	"errors"
	"testing"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// What a test of an application looks like.
func Example() {
	_ = func(t *testing.T) { // func TestRevokedCustomer(t *testing.T)
		store := keystoretest.New(t, nil)
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Owner: "customer"})
		if _, err := store.RevokeAll(t.Context(), keystore.Query{Owner: "customer"}, "left", nil); err != nil {
			t.Fatal(err)
		}
		if _, err := store.Verify(t.Context(), issued.Secret.Reveal()); !errors.Is(err, keystore.ErrRevoked) {
			t.Errorf("a customer who has left got in: %v", err)
		}
	}
}
