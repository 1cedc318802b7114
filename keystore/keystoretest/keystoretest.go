// Package keystoretest gives tests a key store of their own: a real one, in a directory that the test removes.
package keystoretest

import (
	"testing"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// New opens a store in a temporary directory, and closes it when the test and its subtests are over. Nil options are the
// defaults. The test fails if the store cannot be opened, or does not close.
func New(tb testing.TB, opts *keystore.Options) *keystore.Store {
	tb.Helper()
	store, err := keystore.Open(tb.TempDir(), opts)
	if err != nil {
		tb.Fatalf("keystoretest: %v", err)
	}
	tb.Cleanup(func() {
		if err := store.Close(); err != nil {
			tb.Errorf("keystoretest: %v", err)
		}
	})
	return store
}

// MustCreate creates a key, or fails the test. A spec without a name gets that of the test.
func MustCreate(tb testing.TB, store *keystore.Store, spec keystore.Spec) *keystore.Issued {
	tb.Helper()
	if spec.Name == "" {
		spec.Name = tb.Name()
	}
	issued, err := store.Create(tb.Context(), spec)
	if err != nil {
		tb.Fatalf("keystoretest: %v", err)
	}
	return issued
}
