package keystoretest_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

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

// A test of what happens after 30 days takes no time.
func Example_fakeTime() {
	_ = func(t *testing.T) { // func TestTrialEnds(t *testing.T)
		synctest.Test(t, func(t *testing.T) {
			store := keystoretest.New(t, nil)
			issued := keystoretest.MustCreate(t, store, keystore.Spec{ExpiresAt: time.Now().Add(30 * 24 * time.Hour)})
			time.Sleep(30 * 24 * time.Hour)
			if _, err := store.Verify(t.Context(), issued.Secret.Reveal()); !errors.Is(err, keystore.ErrExpired) {
				t.Errorf("a trial went on after its end: %v", err)
			}
		})
	}
}

// A test of a restart needs a directory.
func ExampleOpen() {
	_ = func(t *testing.T) { // func TestRestart(t *testing.T)
		dir := t.TempDir()
		store := keystoretest.Open(t, dir, nil)
		issued := keystoretest.MustCreate(t, store, keystore.Spec{})
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		store = keystoretest.Open(t, dir, nil)
		if _, err := store.Verify(t.Context(), issued.Secret.Reveal()); err != nil {
			t.Errorf("the key did not survive the restart: %v", err)
		}
	}
}
