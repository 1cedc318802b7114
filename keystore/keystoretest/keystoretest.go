// Package keystoretest opens a key store for a test and closes the store when the test ends. For
// most tests, call New.
//
// New runs the production code of the store over a backend in memory. New takes about a millisecond
// and needs no directory. New works in a bubble of testing/synctest, where a test can let a key
// expire without waiting.
//
// Only a test of a restart needs a directory: see Open.
package keystoretest

import (
	"testing"

	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// New returns a store in memory, and closes the store when the test and its subtests have ended. If
// opts is nil, the store has the default options. The test fails if the options are invalid.
//
// In a bubble of testing/synctest, call New with the T of the bubble.
func New(tb testing.TB, opts *keystore.Options) *keystore.Store {
	tb.Helper()
	store, err := keystore.New(memory.New(), opts)
	return closed(tb, store, err)
}

// Open opens a store in a directory, such as tb.TempDir(), and closes the store when the test and
// its subtests have ended. If opts is nil, the store has the default options. The test fails if the
// store does not open or does not close.
//
// Open takes about 100 milliseconds, and does not work in a bubble of testing/synctest. To open the
// directory again, call Close first. The second Close, at the end of the test, does nothing.
func Open(tb testing.TB, dir string, opts *keystore.Options) *keystore.Store {
	tb.Helper()
	store, err := keystore.Open(dir, opts)
	return closed(tb, store, err)
}

// closed closes the store when the test ends, and fails the test if err is not nil.
func closed(tb testing.TB, store *keystore.Store, err error) *keystore.Store {
	tb.Helper()
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

// MustCreate creates a key, or fails the test. A key without a name in spec gets the name of the
// test.
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
