package cluster

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"iter"
	"log/slog"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// write replaces the value of an entry of the table, as another program would, once no process is
// about to write the entry.
func (w *world) write(t *testing.T, key, value []byte) {
	synctest.Wait()
	b := w.engine.Open()
	e, err := b.Get(t.Context(), key)
	if !errors.Is(err, backend.ErrNotFound) {
		require.NoError(t, err)
	}
	require.NoError(t, b.Apply(t.Context(),
		backend.Change{Key: key, Value: value, Expect: e.Revision}))
}

// memberKeyOf returns the key of the member record of a process.
func memberKeyOf(t *testing.T, p *process) []byte {
	guard, err := p.c.Guard()
	require.NoError(t, err)
	return append([]byte{memberSpace}, guard.Key[1:]...)
}

// acks is the member record of a process that has acked everything, for good.
func acks(t *testing.T) []byte {
	value, err := record.EncodeMember(&record.Member{Heartbeat: 1 << 40, Applied: 1 << 60})
	require.NoError(t, err)
	return value
}

// A member record that no process writes again is removed, whatever the record and the guard entry
// hold, and whether the record was there before the other processes joined. Until then, changes
// take until the deadline, and events wait.
func TestDamagedMemberRecordIsRemoved(t *testing.T) {
	key := append([]byte{memberSpace}, make([]byte, 16)...)
	for name, guards := range map[string]int{"no guard entry": 0, "a guard entry": 1, "another": 2} {
		for _, early := range []bool{true, false} {
			bubble(t, func(t *testing.T, w *world) {
				a := w.add("a", 1)
				var lines bytes.Buffer
				a.log = slog.New(slog.NewTextHandler(&lines, nil))
				if !early {
					w.joinAndClose(t, a)
				}
				w.write(t, key, []byte("damage"))
				for range guards {
					w.write(t, guardKeyOf(key), nil)
				}
				if early {
					w.joinAndClose(t, a)
				}
				synctest.Wait()
				require.Equal(t, Bound(testFreshness),
					took(func() { require.NoError(t, a.change(t.Context(), "ka")) }), name)
				require.NoError(t, a.readEvents(t.Context()))
				synctest.Wait()
				require.Equal(t, 2, w.table(), name)
				require.EqualValues(t, 1, a.c.Stats().Evictions)
				require.Equal(t, 1, bytes.Count(lines.Bytes(), []byte("damaged member record")))
				require.Contains(t, lines.String(), hex.EncodeToString(key))
				require.Zero(t, took(func() { require.NoError(t, a.change(t.Context(), "ka")) }))
			})
		}
	}
}

// A damaged member record is no ack, even if the damage looks like an ack of everything: a process
// that has cached the key, and cannot ack, is waited for.
func TestDamagedMemberRecordIsNoAck(t *testing.T) {
	for _, late := range []bool{true, false} {
		bubble(t, func(t *testing.T, w *world) {
			all := w.joined(t, "a", "b")
			a, b := all[0], all[1]
			require.NoError(t, a.change(t.Context(), "ka"))
			_, err := b.admit(t.Context(), "ka", false)
			require.NoError(t, err)
			b.link.set(func(f *fault) { f.dropCalls = true })
			w.write(t, memberKeyOf(t, b), acks(t))
			if late { // the process has read the record from the table
				a = w.joined(t, "late")[0]
			}
			time.Sleep(time.Millisecond) // two events never have the same stamp
			require.True(t, b.fresh())
			require.Equal(t, Bound(testFreshness),
				took(func() { require.NoError(t, a.change(t.Context(), "ka")) }))
			_, err = b.admit(t.Context(), "ka", false)
			require.ErrorIs(t, err, errRefused)
		})
	}
}

// While the header is damaged, no process joins. The members work on, and evict silent processes.
// The eviction replaces the header, because the header has to carry a floor on.
func TestDamagedHeader(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b")
		a, b := all[0], all[1]
		w.write(t, []byte{memberSpace}, []byte("damage"))
		c := w.add("c", 1)
		var err error
		require.Zero(t, took(func() { err = c.join(t.Context(), 0) }), "no use to wait")
		require.ErrorIs(t, err, backend.ErrCorrupt)
		require.EqualError(t, err, `cluster: header of the membership table: the stored data is `+
			`corrupt: stop all processes of the store, delete the entry "m", and start the `+
			`processes again: the first process writes the entry anew: invalid record: not a `+
			`protobuf message`)
		for _, p := range all {
			time.Sleep(time.Millisecond) // two events never have the same stamp
			require.NoError(t, p.change(t.Context(), "ka"))
		}
		b.link.set(func(f *fault) { f.dropCalls = true })
		require.NoError(t, a.readEvents(t.Context()), "waits for the eviction of b")
		require.NoError(t, c.join(t.Context(), 0))
		require.Equal(t, testFreshness, c.c.Freshness())
		c.c.Close()
	})
}

// A fragile backend treats each entry with the value lost as an entry whose revision is damaged, as
// etcdstore does.
type fragile struct{ backend.Feeder }

const lost = "lost"

func (f fragile) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := f.Feeder.Get(ctx, key)
	if err == nil && string(e.Value) == lost {
		return backend.Entry{}, backend.ErrCorrupt
	}
	return e, err
}

func (f fragile) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range f.Feeder.Scan(ctx, from, to) {
			if err == nil && string(e.Value) == lost {
				yield(backend.Entry{}, backend.ErrCorrupt)
				return
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

func (f fragile) Apply(ctx context.Context, changes ...backend.Change) error {
	own := make([]backend.Change, len(changes))
	for i, c := range changes {
		own[i] = c
		e, err := f.Feeder.Get(ctx, c.Key)
		switch {
		case err != nil || string(e.Value) != lost:
		case !c.Delete || c.Expect != math.MaxUint64:
			return backend.ErrCorrupt
		default:
			own[i].Expect = e.Revision
		}
	}
	return f.Feeder.Apply(ctx, own...)
}

func (f fragile) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			for i, e := range b.Changes {
				if string(e.Value) == lost {
					b.Changes[i] = backend.Entry{Key: e.Key, Revision: math.MaxUint64}
				}
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// addFragile makes a process on a fragile backend.
func (w *world) addFragile(name string) *process {
	p := w.add(name, 1)
	p.link.Feeder = fragile{p.link.Feeder}
	return p
}

// A process whose member record has lost its revision removes the record, and joins again.
func TestMemberRecordWithoutARevision(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.addFragile("a")
		w.joinAndClose(t, a)
		w.write(t, memberKeyOf(t, a), []byte(lost))
		synctest.Wait()
		require.NoError(t, a.c.Barrier(t.Context()))
		a.awaitFresh()
		require.EqualValues(t, 2, a.c.Stats().Memberships)
		require.Equal(t, 2, w.table())
	})
}

// No process joins while the table has a record without a revision. The other processes remove the
// record. If there is no other process, Start says what to do.
func TestJoinBesideAMemberRecordWithoutARevision(t *testing.T) {
	key := append([]byte{memberSpace}, make([]byte, 16)...)
	bubble(t, func(t *testing.T, w *world) {
		a := w.addFragile("a")
		w.joinAndClose(t, a)
		w.write(t, key, []byte(lost))
		b := w.addFragile("b")
		wait := took(func() { w.joinAndClose(t, b) })
		require.Greater(t, wait, 2*Bound(testFreshness))
		require.Less(t, wait, 4*testFreshness)
		synctest.Wait()
		require.EqualValues(t, 1, a.c.Stats().Evictions)
		require.NoError(t, a.readEvents(t.Context()))
	})
	bubble(t, func(t *testing.T, w *world) {
		w.write(t, key, []byte(lost))
		a := w.addFragile("a")
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		err := a.join(ctx, testFreshness)
		require.ErrorIs(t, err, backend.ErrCorrupt)
		require.ErrorContains(t, err, "if there are none, stop all processes of the store, and "+
			"delete the entry")
		b := w.engine.Open()
		e, err := b.Get(t.Context(), key)
		require.NoError(t, err)
		require.NoError(t, b.Apply(t.Context(),
			backend.Change{Key: key, Expect: e.Revision, Delete: true}))
		require.NoError(t, a.join(t.Context(), testFreshness))
		a.c.Close()
	})
}

// The header without a revision stops each process that joins, with what to do.
func TestHeaderWithoutARevision(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		w.write(t, []byte{memberSpace}, []byte(lost))
		err := w.addFragile("a").join(t.Context(), 0)
		require.ErrorIs(t, err, backend.ErrCorrupt)
		require.ErrorContains(t, err, `delete the entry "m"`)
	})
}
