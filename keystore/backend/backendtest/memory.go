package backendtest

import (
	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// NewMemory returns an empty backend that keeps everything in memory, and nothing beyond its Close: a reference, for
// tests. It starts no goroutine and does no I/O, so a bubble of testing/synctest can hold it.
//
// A test that needs a store and no backend calls
// [github.com/grpc-api-key/grpc-api-key/keystore/keystoretest.New].
func NewMemory() backend.Backend { return memory.New() }
