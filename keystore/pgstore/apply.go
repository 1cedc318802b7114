package pgstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Each commit waits for a disk, and for a standby, and no other change is made in the meantime. So
// calls of Apply that run at the same time share a commit. A group is one transaction, and one
// round trip.
const (
	// maxGroup and maxGroupChanges are the largest numbers of calls and of changes in a group. A
	// call with more changes is a group.
	maxGroup        = 64
	maxGroupChanges = 512
	// maxWriters is the number of groups under way. The second group waits on the server for the
	// end of the first.
	maxWriters = 2
	// fullPause is the time for which a full disk refuses changes without Restricts.
	fullPause = time.Second
)

// A committer forms groups of the calls of Apply.
//
// Invariants:
//
//  1. No two calls of a group write the same key, and none writes a key that another checks. So the
//     order of the calls in a group makes no difference, and one call may conflict while the others
//     are made.
//  2. A call is in the queue, or in one group. A call that has left the queue without a group was
//     not sent, and will not be sent.
//  3. A group that one of its callers has left is late: another writer may start. A group that all
//     callers have left is canceled. So a connection that is dead delays the callers of one group,
//     and no others.
type committer struct {
	mu      sync.Mutex // guards all below, and the fields of calls and groups that name mu
	queue   []*call
	writers int       // the running writers whose group is not late
	full    time.Time // when the disk was full last
}

// A call is one call of Apply.
type call struct {
	changes []backend.Change // a copy, because the caller may return first
	result  chan error       // receives the result
	group   *group           // guarded by mu; nil: in the queue
}

// A group is some calls that are made together.
type group struct {
	calls   []*call
	cancel  context.CancelFunc
	waiting int  // guarded by mu; the callers that wait
	late    bool // guarded by mu
	sent    bool // guarded by mu; a connection has the group
}

// Apply implements backend.Backend. Apply is one round trip. If a change conflicts, or a change of
// another call in the same group, Apply is two round trips.
func (b *Backend) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := backend.CheckChanges(changes); err != nil {
		return err
	}
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	c := &call{changes: cloneChanges(changes), result: make(chan error, 1)}
	if err := b.enqueue(c); err != nil {
		return err
	}
	select {
	case err = <-c.result:
	case <-joined.Done():
		if b.leave(c) {
			b.writes.reset()
		}
		return b.calls.Ended(ctx)
	}
	switch {
	case err == nil, errors.Is(err, backend.ErrConflict):
		return err
	case codeOf(err) == codeDiskFull:
		return b.fullError(err)
	}
	return b.wrap(ctx, "write", err)
}

func cloneChanges(changes []backend.Change) []backend.Change {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Key = bytes.Clone(changes[i].Key)
		changes[i].Value = bytes.Clone(changes[i].Value)
	}
	return changes
}

func restricts(changes []backend.Change) bool {
	return slices.ContainsFunc(changes, func(c backend.Change) bool { return c.Restricts })
}

// enqueue adds a call to the queue, and starts a writer if fewer than maxWriters run.
func (b *Backend) enqueue(c *call) error {
	m := &b.committer
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.full.IsZero() && time.Since(m.full) < fullPause && !restricts(c.changes) {
		return b.fullError(errors.New("what is free is for changes that restrict keys"))
	}
	m.queue = append(m.queue, c)
	b.startWriterLocked()
	return nil
}

// startWriterLocked starts a writer if there is work for the writer. The caller is a running call.
func (b *Backend) startWriterLocked() {
	if m := &b.committer; m.writers < maxWriters && len(m.queue) > 0 {
		m.writers++
		b.calls.Go(b.write)
	}
}

// leave notes that the caller of a call no longer waits, and reports whether the call was sent.
// Then the server may have been replaced, and the other connections that are open may lead to the
// same server.
func (b *Backend) leave(c *call) (sent bool) {
	m := &b.committer
	m.mu.Lock()
	defer m.mu.Unlock()
	g := c.group
	if g == nil {
		m.queue = slices.DeleteFunc(m.queue, func(other *call) bool { return other == c })
		return false
	}
	if g.waiting--; g.waiting == 0 {
		g.cancel()
	}
	if !g.late {
		g.late = true
		m.writers--
		b.startWriterLocked()
	}
	return g.sent
}

// sends notes that a connection has a group.
func (m *committer) sends(g *group) {
	m.mu.Lock()
	defer m.mu.Unlock()
	g.sent = true
}

// write makes groups until the queue is empty.
func (b *Backend) write() {
	for {
		ctx, cancel := context.WithCancel(b.calls.Context())
		g := b.committer.next(cancel)
		if g == nil {
			cancel()
			return
		}
		failed, err := b.commit(ctx, g)
		cancel()
		if b.committer.finish(g, failed, err) {
			return
		}
	}
}

// next returns the next group, or nil if the writer ends.
func (m *committer) next(cancel context.CancelFunc) *group {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.queue) == 0 {
		m.writers--
		return nil
	}
	g := &group{cancel: cancel}
	uses := make(map[string]bool) // the keys of the group: whether the group writes the key
	size := 0
	m.queue = slices.DeleteFunc(m.queue, func(c *call) bool {
		fits := len(g.calls) == 0 ||
			len(g.calls) < maxGroup && size+len(c.changes) <= maxGroupChanges
		if !fits || !addKeys(uses, c.changes) {
			return false
		}
		c.group = g
		g.calls = append(g.calls, c)
		size += len(c.changes)
		return true
	})
	g.waiting = len(g.calls)
	return g
}

// addKeys adds the keys of changes to those of a group. If invariant 1 does not allow this, addKeys
// returns false and adds nothing.
func addKeys(uses map[string]bool, changes []backend.Change) bool {
	for i := range changes {
		if writes, ok := uses[string(changes[i].Key)]; ok && (writes || !changes[i].Check) {
			return false
		}
	}
	for i := range changes {
		uses[string(changes[i].Key)] = !changes[i].Check
	}
	return true
}

// finish reports the result of a group to the callers, and whether the writer ends.
func (m *committer) finish(g *group, failed []int32, err error) (ends bool) {
	m.mu.Lock()
	if codeOf(err) == codeDiskFull {
		m.full = time.Now()
	} else if err == nil {
		m.full = time.Time{}
	}
	ends = g.late
	g.late = true // the group no longer counts as a writer's
	m.mu.Unlock()
	for i, c := range g.calls {
		switch {
		case codeOf(err) == codeConflict, slices.Contains(failed, int32(i+1)):
			c.result <- backend.ErrConflict
		default:
			c.result <- err
		}
	}
	return ends
}

// commit makes a group, and returns the numbers of the calls that conflict. The calls are numbered
// from 1. If a connection was broken before the group was sent, commit tries another connection.
//
// Few groups have a conflict. So the server looks at the entries before it writes only after it has
// found a conflict by writing.
func (b *Backend) commit(ctx context.Context, g *group) (failed []int32, err error) {
	args := append([]any{!b.unreplicated}, arguments(g.calls)...)
	for attempt := 1; ; attempt++ {
		failed, err = b.tryCommit(ctx, g, args)
		switch code := codeOf(err); {
		case err == nil || ctx.Err() != nil || attempt == maxAttempts:
			return failed, err
		case (code == codeSomeConflict || code == codeUnique) && args[looksArg] == false:
			args[looksArg] = true
		case !pgconn.SafeToRetry(err):
			return failed, err
		}
	}
}

func (b *Backend) tryCommit(
	ctx context.Context, g *group, args []any,
) (failed []int32, err error) {
	conn, err := b.own.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	b.committer.sends(g)
	state := stateOf(conn.Conn().PgConn())
	state.warning = ""
	generation, _, _ := b.history.now()
	var at int64
	var m mark
	err = conn.QueryRow(ctx, b.sql.apply, args...).Scan(&failed, &at, &m.tag)
	switch m.at = backend.Position(at); {
	case err == nil && state.warning != "":
		// The change is committed, and perhaps on no standby.
		return nil, fmt.Errorf("the outcome is unknown: PostgreSQL has warned: %s", state.warning)
	case codeOf(err) == codeReadOnly:
		closeConn(conn.Conn()) // the next connection may lead to another server
	}
	if err == nil {
		b.history.confirmed(generation, m)
	}
	return failed, err
}

// looksArg is the place of the argument looks of the function apply of schema.sql.
const looksArg = 2

// arguments returns the arguments of the function apply of schema.sql, without the first. An array
// without elements is null.
func arguments(calls []*call) []any {
	var rows [][]byte
	var deletes []bool
	var checked, deleted, updated, inserted struct {
		calls              []int32
		keys, values       [][]byte
		expects, revisions []int64
	}
	notify := false
	for i, one := range calls {
		notify = notify || restricts(one.changes)
		row, removes := appendRow(one.changes)
		rows, deletes = append(rows, row), append(deletes, removes)
		for j := range one.changes {
			c := &one.changes[j]
			to := &updated
			switch {
			case c.Check:
				to = &checked
			case c.Delete:
				to = &deleted
			case c.Expect == 0:
				to = &inserted
			}
			to.calls, to.keys = append(to.calls, int32(i+1)), append(to.keys, c.Key)
			if to != &inserted {
				to.expects = append(to.expects, int64(c.Expect))
			}
			if to == &updated || to == &inserted {
				value := c.Value
				if value == nil {
					value = []byte{} // nil is the null of SQL
				}
				to.values = append(to.values, value)
				to.revisions = append(to.revisions, int64(c.NewRevision()))
			}
		}
	}
	return []any{notify, false, rows, deletes,
		checked.calls, checked.keys, checked.expects,
		deleted.calls, deleted.keys, deleted.expects,
		updated.calls, updated.keys, updated.expects, updated.values, updated.revisions,
		inserted.calls, inserted.keys, inserted.values, inserted.revisions}
}
