package backendtest

import (
	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// NewMemory returns an empty backend in memory: a reference implementation, for tests. Close drops
// all entries. The backend starts no goroutine and does no I/O, so the backend works in a bubble of
// testing/synctest.
//
// A test that needs a store and no backend calls
// [github.com/grpc-api-key/grpc-api-key/keystore/keystoretest.New].
func NewMemory() backend.Backend { return memory.New() }
