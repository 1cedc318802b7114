package keystoretest_test

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// A test of an application.
func Example() {
	_ = func(t *testing.T) { // func TestRevokedCustomer(t *testing.T)
		store := keystoretest.New(t, nil)
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Owner: "customer"})
		customer := keystore.Query{Owner: "customer"}
		if _, err := store.RevokeAll(t.Context(), customer, "left", nil); err != nil {
			t.Fatal(err)
		}
		_, err := store.Verify(t.Context(), issued.Secret.Reveal())
		if !errors.Is(err, keystore.ErrRevoked) {
			t.Errorf("the key of a customer who left was not refused: %v", err)
		}
	}
}

// A test of a key that expires after 30 days takes no time.
func Example_fakeTime() {
	_ = func(t *testing.T) { // func TestTrialEnds(t *testing.T)
		synctest.Test(t, func(t *testing.T) {
			store := keystoretest.New(t, nil)
			const trial = 30 * 24 * time.Hour
			spec := keystore.Spec{ExpiresAt: time.Now().Add(trial)}
			issued := keystoretest.MustCreate(t, store, spec)
			time.Sleep(trial)
			_, err := store.Verify(t.Context(), issued.Secret.Reveal())
			if !errors.Is(err, keystore.ErrExpired) {
				t.Errorf("an expired key was not refused: %v", err)
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
