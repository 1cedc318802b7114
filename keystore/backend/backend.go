// Package backend is the contract between a key store and the engine that keeps its records. To
// implement a backend, implement [Backend], and run the conformance suite in package
// [github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest] against the implementation.
//
// A backend is an ordered map from short keys to small values. Each value has a revision. A backend
// knows nothing about API keys. Five methods are enough for an embedded engine, a SQL table or
// etcd. The methods of [DownScanner], [AllGetter] and [Checker] are optional. Without ScanDown, the
// store cannot list the newest first. Without GetAll, the store reads the keys of an owner one by
// one. Without Check, CheckIntegrity checks what Scan yields, and nothing else.
//
// # Consistency
//
// Get and Apply are linearizable: once Apply has returned nil, every Get that starts later, from
// any goroutine, returns the change. Get never returns a change that could still be lost. The
// store's guarantee about revocation depends on this rule.
//
// # Durability
//
// A nil error from Apply means that the change survives a crash of the process and of the machine.
//
// # Errors
//
// A backend returns [ErrNotFound], [ErrConflict], [ErrTooLarge], [ErrFull], [ErrClosed],
// [ErrFailed] and [ErrCorrupt], plain or wrapped, and the error of the context if the context ended
// the call. Any other error means that the backend could not serve the call now. After an error
// from Apply other than ErrConflict, ErrTooLarge and ErrFull, the outcome is unknown: the change
// may have happened.
//
// # Several processes
//
// A backend that several processes may have open at the same time implements [Feeder] too. All that
// this page says about goroutines then holds for the goroutines of all these processes: an Apply in
// one process is seen by every Get that starts later in another process. A Feeder never returns
// ErrFailed.
package backend

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"syscall"
)

// MaxKeySize and MaxValueSize are the sizes of the largest key and value, in bytes. Every backend
// accepts keys and values of these sizes.
const (
	MaxKeySize   = 256
	MaxValueSize = 32 << 10
)

// MaxChanges is the largest number of changes in one Apply, and MaxApplySize is the largest total
// size of the keys and values of these changes, in bytes. Every backend accepts an Apply of this
// size.
const (
	MaxChanges   = 128
	MaxApplySize = 128 << 10
)

var (
	// ErrNotFound is returned by Get if the key has no entry.
	ErrNotFound = errors.New("not found")
	// ErrConflict is returned by Apply if an entry does not have the revision that a change
	// expects. Apply has changed nothing.
	ErrConflict = errors.New("the entry has changed")
	// ErrTooLarge is returned by Apply if a key, a value or the set of changes exceeds the limits.
	// Apply has changed nothing.
	ErrTooLarge = errors.New("too large to store")
	// ErrClosed is returned by every method after a call of Close.
	ErrClosed = errors.New("the store is closed")
	// ErrFailed is returned after the backend failed to make a write durable. The backend serves no
	// calls until the backend is opened again, because its memory and the disk may differ.
	ErrFailed = errors.New("the store has failed and must be reopened")
	// ErrCorrupt is returned if stored data differs from the data that was written.
	ErrCorrupt = errors.New("the stored data is corrupt")
	// ErrFull is returned by Apply if the disk has no space for the changes. Apply has changed
	// nothing, and the backend continues to work. The same Apply may succeed once the disk has
	// space again. ErrFull wraps syscall.ENOSPC.
	ErrFull = fmt.Errorf("the disk is full: %w", syscall.ENOSPC)
	// ErrLocked is returned by the function that opens a backend, if the backend is already open,
	// in this process or in another process.
	ErrLocked = errors.New("the store is open elsewhere")
	// ErrGap is yielded by Feed if the backend no longer knows the changes after the position, or
	// if the engine was restored and has another history.
	ErrGap = errors.New("some changes after the position are no longer known")
)

// An Entry is a key with its value and revision.
type Entry struct {
	Key   []byte
	Value []byte
	// Revision counts the writes of the key: Revision is 1 after the first write, and increases by
	// one with each write, unless a Change sets another revision. Revision is never 0, and never
	// decreases while the entry exists.
	Revision uint64
}

// A Change writes one entry, or deletes it.
type Change struct {
	Key   []byte
	Value []byte
	// Expect is the revision that the entry must have now. 0 means that the entry must not exist.
	Expect uint64
	// Revision is the new revision of the entry, and must be greater than Expect. Set Revision to
	// restore an entry with the revision that the entry had. 0 means Expect+1.
	Revision uint64
	// Delete removes the entry. Value must be empty, Revision must be 0, and Expect must not be 0.
	// Afterwards the backend does not remember the entry: the next write expects 0 and makes
	// revision 1. A caller that still expects revision 1 of the deleted entry then succeeds.
	Delete bool
	// Restricts marks a change that takes a permission from an API key, such as a revocation, or a
	// change that later restrictions depend on. A backend reserves disk space for such changes:
	// when the space runs out, the backend refuses all other changes with ErrFull first. If one
	// change of an Apply has Restricts, the reserve is open to all changes of the Apply.
	//
	// Other processes wait for a change with Restricts. So a Feeder delivers such a change to the
	// feeds of all processes without delay.
	Restricts bool
	// Check writes nothing. The Apply conflicts unless the entry is at revision Expect. If Expect
	// is 0, the Apply conflicts unless the entry does not exist. Value must be empty, Revision must
	// be 0, and Delete must be false. At least one other change of the Apply must write or delete.
	Check bool
}

// A Backend keeps entries. The methods are safe for concurrent use.
//
// A method returns soon after its context is done. The backend neither keeps nor modifies slices
// that a caller passes in. Slices that the backend returns belong to the caller.
type Backend interface {
	// Get returns the entry of key, or ErrNotFound.
	Get(ctx context.Context, key []byte) (Entry, error)
	// Apply makes all the changes or none, and returns when the changes are durable. Each key may
	// occur in only one of the changes. The revision of a written entry becomes the Revision of its
	// change, or Expect+1. If a change breaks the rules in the comments of its fields, Apply
	// returns an error and changes nothing.
	Apply(ctx context.Context, changes ...Change) error
	// Scan yields the entries with from <= key < to, in ascending order of the bytes of the key. If
	// to is nil, there is no upper end. Scan reads each entry as Get would at that time, so the
	// entries are not from one point in time. Scan holds no lock while the loop body of the caller
	// runs, so the body may call any method. After an error, which Scan yields with a zero Entry,
	// the iteration ends.
	Scan(ctx context.Context, from, to []byte) iter.Seq2[Entry, error]
	// Snapshot is like Scan, but yields all entries as of one point in time, between the start of
	// the iteration and the first step. Snapshot includes every change whose Apply returned before
	// the start, and no change whose Apply was called after the first step. Snapshot too holds no
	// lock while the loop body of the caller runs. If the body calls Close, the next step yields
	// ErrClosed. Snapshot releases its resources when the loop ends, even by a break or a panic.
	Snapshot(ctx context.Context, from, to []byte) iter.Seq2[Entry, error]
	// Close waits for the running calls, or makes these calls return ErrClosed. Then Close releases
	// all resources. A second call of Close does nothing.
	Close() error
}

// A DownScanner is a Backend that can scan in descending order.
type DownScanner interface {
	// ScanDown is like Scan, but yields the entries of the range in descending order of the bytes
	// of the key. The range is the same: from <= key < to. If from is nil, there is no lower end.
	// If to is nil, there is no upper end.
	ScanDown(ctx context.Context, from, to []byte) iter.Seq2[Entry, error]
}

// An AllGetter is a Backend that reads several entries in less time than one after the other.
type AllGetter interface {
	// GetAll returns the entries of keys, in the order of keys. An entry that does not exist is the
	// zero Entry. Each entry is what Get could have returned during the call, and the rules for Get
	// hold for each entry. If an entry cannot be read, GetAll returns an error and no entries; the
	// caller may then call Get for each key. GetAll accepts MaxChanges keys and fewer, also none,
	// and the same key twice.
	GetAll(ctx context.Context, keys [][]byte) ([]Entry, error)
}

// A Checker is a Backend that can check all of its data for damage.
type Checker interface {
	// Check reads all data, and returns ErrCorrupt if any part differs from what was written.
	Check(ctx context.Context) error
}

// A Position is a place in the single order in which a Feeder makes its changes. A Position is
// never 0.
type Position uint64

// A Feeder is a Backend that several processes may have open at the same time. A Feeder reports
// every committed change to each process.
type Feeder interface {
	Backend
	// Feed yields the changes of keys with from <= key < to, in the order in which the changes are
	// made. If to is nil, there is no upper end. Each Apply that changes at least one of these keys
	// is one Batch. Feed leaves no Batch out, merges no two, and yields none twice. The positions
	// ascend.
	//
	// Feed starts after the position after, which a Feed of the same Feeder has yielded. If after
	// is 0, Feed starts at a moment between the start of the iteration and its first step. The
	// first Batch then has no changes; its Position is the starting point.
	//
	// If one Apply returned nil before another Apply was called, in the same process or in another,
	// the first Apply has the lower position. A Get that starts after Feed has yielded a Batch
	// shows the changes of the Batch, or later changes.
	//
	// Feed ends with ErrGap if Feed cannot continue without a gap, with the error of the context,
	// with ErrClosed, or with any other error. The error comes with a zero Batch. After any other
	// error, the caller may start Feed again after the last position. Feed never ends without an
	// error, unless the caller ends the loop.
	//
	// Feed may stop yielding for good without an error. The reader must detect this silence.
	//
	// A damaged entry does not end Feed. Feed yields the entry without a Value; otherwise one
	// damaged entry would stop every process. If the revision of the entry is not known either,
	// Feed yields the revision math.MaxUint64, and an Apply that deletes the entry at this revision
	// succeeds.
	//
	// Feed holds no lock while the loop body of the caller runs, so the body may call any method.
	// If the body calls Close, Feed ends with ErrClosed.
	Feed(ctx context.Context, from, to []byte, after Position) iter.Seq2[Batch, error]
}

// A Batch is what one Apply changed in the range of a Feed.
type Batch struct {
	Position Position
	// Changes has each entry as the Apply left the entry, in any order. An entry that the Apply
	// deleted has Revision 0 and no Value. A Change with Check is no change.
	Changes []Entry
}
