package badgerdb

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"github.com/dgraph-io/badger/v4"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A request is one call of Apply on its way through the committer.
type request struct {
	changes []backend.Change
	writes  []layout.Write // the stored form of each change; empty for a Check
	sums    []uint64       // the checksum of each entry
	size    int            // the number of bytes that the changes write
	urgent  bool           // see backend.Change
	done    chan error     // receives the outcome; buffered: the committer does not wait for Apply
	err     error          // the outcome, unless the commit fails; owned by the committer
}

// Apply implements backend.Backend. Apply waits for the committer to take the changes. If ctx ends
// before the committer takes the changes, nothing was changed. Taken changes cannot be withdrawn:
// from then on Apply waits for the outcome, even if ctx ends.
func (db *DB) Apply(ctx context.Context, changes ...backend.Change) error {
	r := &request{changes: changes, done: make(chan error, 1)}
	if err := r.check(db); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-db.closing: // even if the committer could take one more request
		return backend.ErrClosed
	default:
	}
	select {
	case db.queue <- r:
		return <-r.done
	case <-db.closing:
		return backend.ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// check checks the changes, and sets the fields that follow from the changes. The callers of Apply
// do this work at the same time, and the committer does not wait for it.
func (r *request) check(db *DB) error {
	if err := backend.CheckChanges(r.changes); err != nil {
		return fmt.Errorf("badgerdb: %w", err)
	}
	r.size = len(r.changes) * perWrite
	r.writes = make([]layout.Write, len(r.changes))
	r.sums = make([]uint64, len(r.changes))
	for i := range r.changes {
		c := &r.changes[i]
		if c.Check {
			continue
		}
		r.writes[i], r.sums[i] = layout.StoredWrite(*c)
		r.size += len(c.Key) + len(c.Value)
		r.urgent = r.urgent || c.Restricts
	}
	return nil
}

// committer takes requests and commits the requests in groups. The requests that arrive while one
// group is on its way to the disk form the next group. A request that arrives alone is committed
// immediately.
func (db *DB) committer() {
	defer close(db.stopped)
	var group []*request
	var left *request // was taken, but did not fit into the last group
	for commits := 1; ; commits++ {
		first := left
		if first == nil {
			select {
			case first = <-db.queue:
			case <-db.closing:
				return
			}
		}
		group, left = db.gather(first, len(group))
		err := db.commit(group)
		for _, r := range group {
			if err != nil {
				r.err = err
			}
			r.done <- r.err
		}
		if commits%discardEvery == 0 {
			db.discard()
		}
	}
}

// gather returns a group that begins with first, and a request that did not fit into the group.
// previous is the size of the group before.
//
// The callers that got the result of the last commit may be about to call Apply again. So the
// committer lets other goroutines run, up to maxWaits times, until the group is as large as the
// last group. Without these waits, the committer would take the first of 64 writers alone, sync the
// first request, and find the other requests only then.
func (db *DB) gather(first *request, previous int) (group []*request, left *request) {
	group, size := []*request{first}, first.size
	for waits := 0; len(group) < maxGroup; {
		select {
		case r := <-db.queue:
			if size+r.size > db.space.group {
				return group, r
			}
			group, size = append(group, r), size+r.size
		default:
			if len(group) >= previous || waits == maxWaits {
				return group, nil
			}
			waits++
			runtime.Gosched()
		}
	}
	return group, nil
}

const maxWaits = 4

// discard lets Badger drop the versions that no reader needs; see readers. The second turn brings
// the discard timestamp to durable if no read is under way.
func (db *DB) discard() {
	for range 2 {
		if floor, ok := db.readers.advance(db.durable.Load()); ok {
			db.badger.SetDiscardTs(floor)
		}
	}
}

// commit makes a group durable. An error of commit is the outcome of every request. Otherwise each
// request has its own outcome in err. A conflict is reported only after the commit. The conflict
// may be with a write of the same group, and no caller may learn of the write before the write is
// durable.
func (db *DB) commit(requests []*request) error {
	if err := db.failed.Load(); err != nil {
		return *err
	}
	usual, urgent := db.space.forCommit()
	txn := db.badger.NewTransactionAt(db.durable.Load(), true)
	defer txn.Discard()
	state := db.newGroupState(requests)
	defer state.txn.Discard()
	next := commitfile.Record{Summary: db.summary}
	next.Seq++
	changes := 1 // of the summary
	for _, r := range requests {
		changes += len(r.changes)
	}
	next.Writes = make([]layout.Write, 0, changes)
	entries := make([]badger.Entry, 0, changes)
	var olds []found
	for _, r := range requests {
		if r.err = usual; r.urgent {
			r.err = urgent
		}
		if r.err != nil {
			continue
		}
		r.err = db.guard(func() (err error) {
			olds, err = state.expected(r.changes, olds[:0])
			return err
		})
		if r.err != nil {
			continue
		}
		for i, c := range r.changes {
			if c.Check {
				continue
			}
			w, sum := r.writes[i], r.sums[i]
			entries = append(entries, badger.Entry{Key: w.Key, Value: w.Value})
			if err := txn.SetEntry(&entries[len(entries)-1]); err != nil {
				// Changes within the limits cannot cause this error. Nothing of the group was
				// committed.
				return fmt.Errorf("badgerdb: write: %w", err)
			}
			state.wrote(c, sum)
			next.Writes = append(next.Writes, w)
			next.Sum += sum - olds[i].sum
			if c.Expect == 0 {
				next.Entries++
			}
			if c.Delete {
				next.Entries--
			}
		}
	}
	if err := db.compactions.waitVerified(); err != nil {
		return err // the reads in expected may be wrong
	}
	if len(next.Writes) == 0 {
		return nil
	}
	h := layout.Write{Key: layout.SummaryKey, Value: next.Summary.Append(nil)}
	if err := txn.SetEntry(badger.NewEntry(h.Key, h.Value)); err != nil {
		return fmt.Errorf("badgerdb: write: %w", err)
	}
	next.Writes = append(next.Writes, h)
	if err := db.writeCommit(txn, next); err != nil {
		return err
	}
	for _, w := range next.Writes[:len(next.Writes)-1] {
		db.ends.extend(w.Key[1:])
	}
	db.space.committed(next.Writes)
	if err := db.present(); err != nil {
		return db.fail("commit", err)
	}
	return nil
}

// writeCommit commits the transaction to Badger, and the record to LAST, at the same time. The
// transaction holds the writes of the record.
func (db *DB) writeCommit(txn *badger.Txn, s commitfile.Record) error {
	written := make(chan error, 1)
	go func() { written <- db.writeCommitFile(s) }()
	err := errors.Join(txn.CommitAt(s.Seq, nil), <-written)
	if err == nil && db.commitFault != nil {
		err = db.commitFault()
	}
	if err != nil {
		return db.fail("commit", err)
	}
	db.summary = s.Summary
	db.durable.Store(s.Seq)
	return nil
}

func badgerText(format string, args []any) string {
	return "badger: " + strings.TrimSpace(fmt.Sprintf(format, args...))
}
