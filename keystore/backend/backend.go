// Package backend is the contract between a key store and what keeps its records.
//
// A backend is an ordered map from short keys to small values, each with a revision, and nothing more: it knows
// nothing of API keys. Five methods are enough for an embedded engine, a SQL table or etcd. Whoever implements one
// runs package [github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest] against it.
//
// # Consistency
//
// Get and Apply are linearizable: once Apply has returned nil, every Get that starts later, from any goroutine, sees
// the change, and a Get never shows a change that could still be lost. The store's promise about revocation stands on
// this sentence.
//
// # Durability
//
// A nil error from Apply means that the change survives the death of the process and of the machine.
//
// # Errors
//
// A backend reports [ErrNotFound], [ErrConflict], [ErrTooLarge], [ErrFull], [ErrClosed], [ErrFailed] and [ErrCorrupt], plain or
// wrapped, and the context's own error when the context ended the call. Any other error means that the call could not
// be served now. An error from Apply other than ErrConflict, ErrTooLarge and ErrFull is indeterminate: the change may
// have happened.
package backend

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"syscall"
)

// MaxKeySize and MaxValueSize are the largest key and value, in bytes, that every backend takes.
const (
	MaxKeySize   = 256
	MaxValueSize = 32 << 10
)

// MaxChanges is the largest number of changes that every backend takes in one Apply, and MaxApplySize the largest sum of
// their keys and values, in bytes.
const (
	MaxChanges   = 128
	MaxApplySize = 128 << 10
)

var (
	// ErrNotFound is what Get returns for a key that has no entry.
	ErrNotFound = errors.New("not found")
	// ErrConflict is what Apply returns when an entry was not at the revision that a change expected. Nothing was
	// changed.
	ErrConflict = errors.New("the entry has changed")
	// ErrTooLarge is what Apply returns for a key, a value or a set of changes beyond the limits. Nothing was changed.
	ErrTooLarge = errors.New("too large to store")
	// ErrClosed is what every method returns once Close has been called.
	ErrClosed = errors.New("the store is closed")
	// ErrFailed is returned after a write could not be made durable. The backend serves nothing more until it is
	// opened again, because what it holds in memory and what is on disk may differ.
	ErrFailed = errors.New("the store has failed and must be reopened")
	// ErrCorrupt is returned for data that is not what was written.
	ErrCorrupt = errors.New("the stored data is corrupt")
	// ErrFull is what Apply returns when there is no room on the disk. Nothing was changed, and the backend goes on: the
	// same may succeed when there is room again. It wraps syscall.ENOSPC.
	ErrFull = fmt.Errorf("the disk is full: %w", syscall.ENOSPC)
	// ErrLocked is what opening a backend returns when another holder has it open.
	ErrLocked = errors.New("the store is open elsewhere")
)

// An Entry is a key, its value, and its revision.
type Entry struct {
	Key   []byte
	Value []byte
	// Revision is 1 after the first write of the key and one more after each further one, unless the Change said what
	// it becomes. It is never 0, and never goes back while the entry exists.
	Revision uint64
}

// A Change writes one entry, or deletes it.
type Change struct {
	Key   []byte
	Value []byte
	// Expect is the revision that the entry must have: 0 means that there must be none.
	Expect uint64
	// Revision is the one that the entry gets, greater than Expect: it is for putting back entries with the revisions
	// that they had. 0 means Expect+1.
	Revision uint64
	// Delete removes the entry. Value is empty then, Revision 0, and Expect not 0. Afterwards it is as if the key had
	// never been written: the next write expects 0 and makes revision 1, which somebody may still expect from before.
	Delete bool
	// Restricts says that the change takes something from a key, such as its validity. A backend that runs out of space
	// keeps some for these, and refuses others with ErrFull before. The changes of one Apply are urgent if one of them
	// is.
	Restricts bool
}

// A Backend keeps entries. Its methods are safe for concurrent use.
//
// A method returns soon after its context is done. Slices passed in are not kept or changed by the backend, and
// slices that it hands out belong to the caller.
type Backend interface {
	// Get returns the entry of key, or ErrNotFound.
	Get(ctx context.Context, key []byte) (Entry, error)
	// Apply makes all the changes or none of them, and returns when they are durable. A key stands in at most one of
	// the changes. The revision of each entry that is written becomes its change's Revision, or Expect+1. Changes that
	// are not as their fields' comments say are an error, and none of them is made.
	Apply(ctx context.Context, changes ...Change) error
	// Scan yields the entries with from <= key < to in ascending order of bytes; a nil to means no upper end. It
	// shows each entry as a Get at that moment would, not all of them as of one moment, and holds no lock while the
	// caller's loop body runs, so that the body may call any method. After an error, which comes with a zero Entry,
	// it ends.
	Scan(ctx context.Context, from, to []byte) iter.Seq2[Entry, error]
	// Snapshot does as Scan does, but shows all entries as of one moment, between the start of the iteration and its
	// first step: it sees every change whose Apply returned before the start, and none whose Apply is called after the
	// first step. It too holds no lock while the caller's loop body runs; after a Close there, the next step yields
	// ErrClosed. What it takes to hold on to the moment is released when the loop ends, be it by a break or a panic.
	Snapshot(ctx context.Context, from, to []byte) iter.Seq2[Entry, error]
	// Close waits for calls that are under way, or makes them return ErrClosed, and releases everything. A second
	// call does nothing.
	Close() error
}

// A Checker is a Backend that can look for damage in all that it holds.
type Checker interface {
	// Check reads everything, and returns ErrCorrupt if any of it is not what was written.
	Check(ctx context.Context) error
}
