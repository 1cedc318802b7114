package backendtest

import (
	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Shared is a store in memory that several processes can have open at the same time: a reference
// implementation of backend.Feeder, for tests. Each process of a test has a handle from Open. The
// methods are safe for concurrent use.
//
// A Shared starts no goroutine and does no I/O, so a Shared works in a bubble of testing/synctest.
type Shared struct{ store *memory.Shared }

// NewShared returns an empty store without handles.
func NewShared() *Shared { return &Shared{memory.NewShared()} }

// Open returns a new handle. Close of the handle ends the calls and the feeds of this handle only.
// The store keeps the entries, even if no handle is open.
func (s *Shared) Open() backend.Feeder { return s.store.Open() }

// Last returns the position of the last Apply. If there was no Apply, Last returns the position
// before the first Apply.
func (s *Shared) Last() backend.Position { return s.store.Last() }

// Trim drops the changes from the log, up to and including the last change. A Feed that has not
// read these changes ends with ErrGap.
func (s *Shared) Trim() { s.store.Trim() }

// Save returns a function that restores the store to the present entries and position. Afterwards
// the store has another history: new changes get the positions that other changes had before. So
// each Feed ends with ErrGap, and an entry may have a lower revision than before.
func (s *Shared) Save() (restore func()) { return s.store.Save() }
