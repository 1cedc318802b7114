package keystore

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// events returns the events that a process lists, after a time.
func (m *member) events(after time.Time) (all []Event) {
	m.f.Helper()
	for e, err := range m.Events(m.f.Context(), EventQuery{After: after}) {
		require.NoError(m.f, err)
		all = append(all, e)
	}
	return all
}

// forHours returns options for a test that takes hours: the processes write fewer heartbeats.
func forHours() *Options { return &Options{Freshness: 20 * time.Second, Timeout: time.Minute} }

// Follow yields the events of all processes, each once, soon after the change.
func TestFollowOtherProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx, cancel := context.WithCancel(t.Context())
		a, b := f.open(nil), f.open(nil)
		before := a.create(Spec{})
		followed := make(chan Event, 100)
		follower := start(func() error {
			for e, err := range b.Follow(ctx, EventQuery{}) {
				if err != nil {
					return err
				}
				followed <- e
			}
			return nil
		})
		next := func() (e Event) {
			require.Zero(t, took(func() { e = <-followed }))
			return e
		}
		require.Equal(t, before.Key.ID, next().KeyID)
		time.Sleep(time.Minute)
		for range 3 {
			require.NoError(t, a.Disable(ctx, before.Key.ID, ""))
			require.Equal(t, ActionDisable, next().Action)
			require.NoError(t, b.Enable(ctx, before.Key.ID))
			require.Equal(t, ActionEnable, next().Action)
			other := a.create(Spec{})
			require.Equal(t, other.Key.ID, next().KeyID)
		}
		synctest.Wait()
		require.Empty(t, followed)

		// The follower's process misses changes, and joins again.
		b.link.Set(badlink.Faults{Drop: true, Silent: true})
		missed := a.create(Spec{})
		for a.Stats().Processes > 1 {
			time.Sleep(testFreshness)
		}
		b.link.Set(badlink.Faults{})
		require.Equal(t, missed.Key.ID, (<-followed).KeyID)
		cancel()
		require.ErrorIs(t, follower(), context.Canceled)
	})
}

// Follow ends when its store closes, and after Until.
func TestFollowOfProcessesEnds(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		until := time.Now().Add(time.Minute)
		var followed atomic.Int32 // by both followers
		follow := func(m *member, q EventQuery) func() error {
			return start(func() error {
				for _, err := range m.Follow(t.Context(), q) {
					if err != nil {
						return err
					}
					followed.Add(1)
				}
				return nil
			})
		}
		ends, closes := follow(b, EventQuery{Until: until}), follow(a, EventQuery{})
		a.create(Spec{})
		synctest.Wait() // both have followed the event
		require.NoError(t, a.Close())
		require.ErrorIs(t, closes(), ErrClosed)
		require.NoError(t, ends())
		require.False(t, time.Now().Before(until))
		require.EqualValues(t, 2, followed.Load())
	})
}

// The events of a key ascend with the revision if the clock of one process is an hour ahead, and
// both processes list every change that has returned.
func TestStampsOfOneKeyAscendAcrossClocks(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, b := f.open(nil), f.open(nil)
		ahead := time.Now().Add(time.Hour).UnixNano()
		a.sequencer.Raise(ahead) // as if the clock of a were an hour ahead
		id := a.create(Spec{}).Key.ID
		last := time.Time{}
		for n := range 5 {
			m := []*member{a, b}[n%2]
			require.NoError(t, m.Disable(ctx, id, ""))
			require.NoError(t, m.Enable(ctx, id))
			for _, other := range []*member{a, b} {
				all := other.events(last)
				require.NotEmpty(t, all)
				require.Equal(t, ActionEnable, all[len(all)-1].Action,
					"a list has every change that has returned")
			}
			for _, e := range a.events(last) {
				require.True(t, e.At.After(last))
				require.Greater(t, e.At.UnixNano(), ahead)
				last = e.At
			}
		}
		key, err := a.Get(ctx, id)
		require.NoError(t, err)
		for i, e := range b.events(time.Time{}) {
			require.EqualValues(t, i+1, e.Revision)
		}
		require.EqualValues(t, 11, key.Revision)
	})
}

// No event of a key follows the purge of the key, although the clocks of the processes differ by
// hours, and although each process restores backups of the key from before the purge.
func TestNoEventFollowsAPurge(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		var fast, slow atomic.Int64
		fast.Store(int64(time.Hour))
		slow.Store(-int64(time.Hour))
		a, b := f.openAt(&fast, nil), f.openAt(&slow, nil)
		save := func() io.Reader {
			var backup bytes.Buffer
			require.NoError(t, b.Backup(ctx, &backup))
			return bytes.NewReader(backup.Bytes())
		}
		id := a.create(Spec{}).Key.ID
		other := a.create(Spec{}).Key.ID
		active := save()
		require.NoError(t, a.Revoke(ctx, id, ""))
		revoked := save()
		time.Sleep(time.Second)
		n, err := a.Purge(ctx, time.Now())
		require.NoError(t, err)
		require.Equal(t, 1, n)
		purged := save()
		for _, backup := range []io.Reader{active, revoked, purged} {
			require.NoError(t, b.Restore(ctx, backup))
		}
		require.NoError(t, b.Disable(ctx, other, ""))
		_, err = b.Get(ctx, id)
		require.ErrorIs(t, err, ErrNotFound)
		var actions []Action
		last := time.Time{}
		for _, e := range b.events(time.Time{}) {
			require.True(t, e.At.After(last))
			last = e.At
			if e.KeyID == id {
				actions = append(actions, e.Action)
			}
		}
		require.Equal(t, []Action{ActionCreate, ActionRevoke, ActionPurge}, actions)
	})
}

// RevokeAll revokes a key whose Create in another process was under way when the call began.
func TestRevokeAllWaitsForCreatesOfOtherProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		arrived, proceed := make(chan struct{}), make(chan struct{})
		b.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			if changes[0].Key[0] == keySpace {
				close(arrived)
				<-proceed
			}
			return next(ctx)
		})
		created := start(func() error {
			_, err := b.Create(t.Context(), Spec{Name: "test"})
			return err
		})
		<-arrived
		revoked := make(chan int, 1)
		done := start(func() error {
			n, err := a.RevokeAll(t.Context(), Query{}, "", &RevokeAllOptions{All: true})
			revoked <- n
			return err
		})
		time.Sleep(testFreshness / 2)
		require.Empty(t, revoked, "RevokeAll waits")
		close(proceed)
		require.NoError(t, created())
		require.NoError(t, done())
		require.Equal(t, 1, <-revoked)
	})
}

// Of three processes that use a key in the same minute, no process loses its minute.
func TestUsageOfManyProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		all := []*member{f.open(forHours()), f.open(forHours()), f.open(forHours())}
		var keys []*Issued
		for range 200 {
			keys = append(keys, all[0].create(Spec{}))
		}
		time.Sleep(3*time.Hour + 10*time.Second) // in the middle of a minute
		var writes atomic.Int64
		for _, m := range all {
			m.onApply(func(ctx context.Context, changes []backend.Change,
				next func(context.Context) error) error {
				err := next(ctx)
				for _, c := range changes {
					if c.Key[0] == usageSpace && err == nil {
						writes.Add(1)
					}
				}
				return err
			})
			for _, k := range keys[:199] {
				require.NoError(t, m.uses(k))
			}
		}
		used := time.Now()
		time.Sleep(2 * time.Minute)
		require.EqualValues(t, 199, writes.Load(), "one write for each key and minute")
		for _, m := range all {
			for _, k := range keys[:199] {
				key, err := m.Get(ctx, k.Key.ID)
				require.NoError(t, err)
				require.Equal(t, used.Truncate(time.Minute).UTC(), key.LastUsedAt)
			}
			n, err := m.Count(ctx, Query{UnusedSince: used.Add(-time.Hour)})
			require.NoError(t, err)
			require.Equal(t, 1, n)
		}
	})
}

// Processes that write the same uses at the same time read and write again.
func TestUsageConflict(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, b := f.open(forHours()), f.open(forHours())
		first, second := a.create(Spec{}), a.create(Spec{})
		time.Sleep(time.Hour)
		require.NoError(t, a.uses(first))
		require.NoError(t, a.uses(second))
		require.NoError(t, b.uses(first))
		once := true
		a.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			if changes[0].Key[0] == usageSpace && once {
				once = false
				require.NoError(t, b.flushUsage(ctx))
			}
			return next(ctx)
		})
		require.NoError(t, a.flushUsage(ctx))
		require.False(t, once)
		for _, k := range []*Issued{first, second} {
			key, err := b.Get(ctx, k.Key.ID)
			require.NoError(t, err)
			require.False(t, key.LastUsedAt.IsZero())
		}
	})
}

// The store knows every use since the first process was opened, if each process was closed. If a
// process died, the uses of its last minutes are unknown.
func TestUsesAreKnownUntilAProcessDies(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		unused := func(m *member, since time.Time) error {
			_, err := m.Count(ctx, Query{UnusedSince: since})
			return err
		}
		a := f.open(forHours())
		a.create(Spec{})
		since := time.Now().Add(time.Second)
		time.Sleep(time.Hour)
		b := f.open(forHours())
		require.NoError(t, unused(b, since))
		require.NoError(t, a.Close())
		require.NoError(t, unused(b, since))
		require.NoError(t, b.Close())
		time.Sleep(time.Hour)
		c, d := f.open(forHours()), f.open(forHours())
		require.NoError(t, unused(c, since))
		require.NoError(t, unused(d, since))

		d.link.Set(badlink.Faults{Drop: true, Silent: true})
		for c.Stats().Processes > 1 {
			time.Sleep(testFreshness)
		}
		require.ErrorIs(t, unused(c, since), ErrInvalid)
		time.Sleep(2 * time.Minute)
		e := f.open(forHours())
		require.ErrorIs(t, unused(e, since), ErrInvalid)
		died := time.Now()
		time.Sleep(time.Hour)
		require.NoError(t, unused(c, died))
		require.NoError(t, unused(e, died))
		d.link.Set(badlink.Faults{})
		for _, m := range []*member{c, d, e} {
			require.NoError(t, m.Close())
		}
		require.NoError(t, unused(f.open(forHours()), died))
	})
}

// Two processes that close at the same time leave nothing behind, and all uses are known.
func TestProcessesThatCloseTogether(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(forHours()), f.open(forHours())
		a.create(Spec{})
		since := time.Now().Add(time.Second)
		time.Sleep(time.Hour)
		for _, m := range []*member{a, b} {
			m.link.Set(badlink.Faults{Delay: time.Millisecond})
		}
		first, second := start(a.Close), start(b.Close)
		require.NoError(t, first())
		require.NoError(t, second())
		require.Zero(t, f.entries('m'))
		require.Zero(t, f.entries('n'))
		_, err := f.open(forHours()).Count(t.Context(), Query{UnusedSince: since})
		require.NoError(t, err)
	})
}

// One process removes the old events.
func TestOneProcessSweeps(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		var all []*member
		var sweeps atomic.Int64
		for range 3 {
			opts := forHours()
			opts.EventRetention = time.Hour
			m := f.open(opts)
			m.onApply(func(ctx context.Context, changes []backend.Change,
				next func(context.Context) error) error {
				if c := changes[0]; c.Key[0] == eventSpace && c.Delete {
					sweeps.Add(1)
				}
				return next(ctx)
			})
			all = append(all, m)
		}
		for range 10 {
			all[1].create(Spec{})
		}
		time.Sleep(4 * time.Hour)
		require.Empty(t, all[0].events(time.Time{}))
		require.EqualValues(t, 1, sweeps.Load())
	})
}

// A process that opens the store while another process builds the indexes waits for
// Options.Timeout, and then says what to do. A process that has the store open does not mark the
// indexes as complete.
func TestMigrationBesideOtherProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a := f.open(nil)
		a.create(Spec{Owner: "acme"})
		engine := f.shared.Open()
		running := storeState{since: time.Now(), index: indexState{version: indexVersion,
			phase: phaseKeys, since: time.Now().UnixNano()}}
		write := func() error {
			e, err := engine.Get(ctx, stateKey)
			if err != nil {
				return err
			}
			return engine.Apply(ctx, backend.Change{Key: stateKey, Value: running.encode(),
				Expect: e.Revision})
		}
		require.NoError(t, write())
		working, stop := context.WithCancel(ctx)
		other := start(func() error { // as another process that builds the indexes
			for working.Err() == nil {
				time.Sleep(time.Second)
				if err := write(); err != nil {
					return err
				}
			}
			return nil
		})
		_, err := New(badlink.Open(f.shared), f.options(nil))
		require.ErrorIs(t, err, ErrUnavailable)
		require.EqualError(t, err, "keystore: build the indexes: API key store unavailable: another "+
			"process builds the indexes of the store: open the store again when that process has "+
			"finished")
		require.Equal(t, 1, f.entries('m'))
		require.NoError(t, a.flushUsage(ctx))
		time.Sleep(2 * time.Minute)
		e, err := engine.Get(ctx, stateKey)
		require.NoError(t, err)
		state, err := parseState(e)
		require.NoError(t, err)
		require.EqualValues(t, phaseKeys, state.index.phase)

		stop()
		require.NoError(t, other())
		b := f.open(nil) // the other process has died: b continues its work
		n, err := b.Count(ctx, Query{Owner: "acme"})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, b.CheckIntegrity(ctx))
		_, err = New(badlink.Open(f.shared), f.options(&Options{RebuildIndexes: true}))
		require.EqualError(t, err, "keystore: invalid argument: Options.RebuildIndexes is set, but "+
			"another process has the store open: close the store in the other processes first")
	})
}

// Processes that open an empty store at the same time agree.
func TestProcessesThatOpenTogether(t *testing.T) {
	for range 20 {
		fleetTest(t, func(t *testing.T, f *fleet) {
			var opens []func() error
			for range 5 {
				opens = append(opens, start(func() error {
					link := badlink.Open(f.shared)
					link.Set(badlink.Faults{Delay: time.Millisecond})
					s, err := New(link, f.options(nil))
					if err != nil {
						return err
					}
					if _, err := s.Create(t.Context(), Spec{Name: "test", Owner: "acme"}); err != nil {
						return err
					}
					return s.Close()
				}))
			}
			for _, wait := range opens {
				require.NoError(t, wait())
			}
			a := f.open(nil)
			n, err := a.Count(t.Context(), Query{Owner: "acme"})
			require.NoError(t, err)
			require.Equal(t, 5, n)
			require.NoError(t, a.CheckIntegrity(t.Context()))
		})
	}
}

// A backend that is no Feeder belongs to one Store. A second Store is noticed within a minute.
func TestASecondStoreIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		b := struct{ backend.Backend }{backendtest.NewMemory()}
		first, err := New(b, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
		require.NoError(t, err)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		require.Empty(t, log.String())
		second, err := New(b, nil)
		require.NoError(t, err)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		require.Equal(t, 1, strings.Count(log.String(), "another Store has opened the backend"))
		require.NoError(t, second.Close())
		require.NoError(t, first.Close())
	})
}

// A change that finds no membership waits until the process has joined again.
func TestAChangeWaitsForTheMembership(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a := f.open(nil)
		issued, other := a.create(Spec{}), a.create(Spec{})
		a.link.Set(badlink.Faults{FeedError: backend.ErrGap})
		for a.Stats().Processes > 0 {
			time.Sleep(testFreshness / 8)
		}
		_, err := a.guard()
		require.ErrorIs(t, err, ErrUnavailable)
		require.ErrorIs(t, err, cluster.ErrNoMembership)
		waiting := start(func() error { return a.Revoke(t.Context(), issued.Key.ID, "") })
		created := start(func() error {
			_, err := a.Create(t.Context(), Spec{Name: "late"})
			return err
		})
		time.Sleep(testFreshness)
		a.link.Set(badlink.Faults{})
		require.NoError(t, waiting())
		require.NoError(t, created())

		a.link.Set(badlink.Faults{FeedError: backend.ErrGap})
		time.Sleep(testFreshness)
		err = a.Revoke(t.Context(), other.Key.ID, "")
		require.ErrorIs(t, err, ErrUnavailable)
		require.ErrorIs(t, err, cluster.ErrNoMembership)
		ctx, cancel := context.WithTimeout(t.Context(), testFreshness)
		defer cancel()
		_, err = a.Create(ctx, Spec{Name: "too late"})
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// The record of a key keeps the stamp of its last event, in a store of several processes only.
func TestLastStamp(t *testing.T) {
	stampOfRecord := func(s *Store, id string) int64 {
		parsed, err := parseID("", id)
		require.NoError(t, err)
		kr, err := s.get(t.Context(), parsed)
		require.NoError(t, err)
		return kr.record.LastStamp
	}
	alone, err := New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, alone.Close()) }()
	shared, err := New(backendtest.NewShared().Open(), realTime())
	require.NoError(t, err)
	defer func() { require.NoError(t, shared.Close()) }()
	var backup bytes.Buffer
	for _, s := range []*Store{shared, alone} {
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		require.NoError(t, s.Disable(t.Context(), issued.Key.ID, ""))
		var last Event
		for e, err := range s.Events(t.Context(), EventQuery{KeyID: issued.Key.ID}) {
			require.NoError(t, err)
			last = e
		}
		require.Equal(t, ActionDisable, last.Action)
		if s == alone {
			require.Zero(t, stampOfRecord(s, issued.Key.ID))
			require.NoError(t, s.Restore(t.Context(), &backup))
			for k, err := range s.List(t.Context(), Query{}) {
				require.NoError(t, err)
				require.Zero(t, stampOfRecord(s, k.ID), "restored from a store of several processes")
			}
			continue
		}
		require.Equal(t, last.At.UnixNano(), stampOfRecord(s, issued.Key.ID))
		require.NoError(t, s.Backup(t.Context(), &backup))
	}
}

// AppendLastStamp makes the same bytes as a record with the field.
func TestAppendLastStamp(t *testing.T) {
	r := newRecord(Spec{Name: "test"}, "oil", hashing.SHA256().Digest("text"), time.Now())
	b, err := record.Encode(r)
	require.NoError(t, err)
	r.LastStamp = 1 << 60
	want, err := record.Encode(r)
	require.NoError(t, err)
	require.Equal(t, want, record.AppendLastStamp(b, r.LastStamp))
	require.Len(t, want, len(b)+record.LastStampSize)
}

// An endedObserver calls the store when a session has ended.
type endedObserver struct {
	Observer
	ended func(BindEnd)
}

func (o *endedObserver) Verified(Verification) {}
func (o *endedObserver) Refused(Refusal)       {}
func (o *endedObserver) Changed(Event)         {}
func (o *endedObserver) Ended(e BindEnd)       { o.ended(e) }

// An Observer that changes keys when a session ends, or that is slow, delays no change of another
// process, and closes no gate.
func TestAnObserverDelaysNoOtherProcess(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		observer := new(endedObserver)
		a, b := f.open(nil), f.open(&Options{Observer: observer})
		first, second := a.create(Spec{}), a.create(Spec{})
		done := make(chan error, 1)
		observer.ended = func(e BindEnd) {
			if e.KeyID == first.Key.ID {
				done <- b.Revoke(ctx, second.Key.ID, "")
			}
		}
		session := b.binds(first)
		// A change that has the stamp of another process tries again after a pause.
		require.Less(t, took(func() {
			require.NoError(t, a.Revoke(ctx, first.Key.ID, ""))
			require.ErrorIs(t, session.Cause(), ErrRevoked)
			require.NoError(t, <-done)
		}), testFreshness/4)
		require.ErrorIs(t, a.uses(second), ErrRevoked)

		third := a.create(Spec{})
		proceed := make(chan struct{})
		observer.ended = func(BindEnd) { <-proceed }
		b.binds(third)
		require.Less(t, took(func() { require.NoError(t, a.Revoke(ctx, third.Key.ID, "")) }),
			testFreshness/4)
		time.Sleep(3 * testFreshness)
		require.True(t, b.Stats().Fresh)
		close(proceed)
	})
}

// A process with another pepper is refused while other processes have the store open, even if the
// store has no keys.
func TestAnotherPepperBesideOtherProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		pepper := func(b byte) hashing.Hasher {
			h, err := hashing.HMACSHA256("pepper", bytes.Repeat([]byte{b}, 32))
			require.NoError(t, err)
			return h
		}
		a := f.open(&Options{Hasher: pepper(1)})
		_, err := New(badlink.Open(f.shared), f.options(&Options{Hasher: pepper(2)}))
		require.ErrorIs(t, err, ErrInvalid)
		require.ErrorContains(t, err, "another pepper")
		require.NoError(t, a.Close())
		f.open(&Options{Hasher: pepper(2)})
	})
}

// If the header of the membership table is damaged, New says at once what to do.
func TestNewWithADamagedHeader(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a := f.open(nil)
		issued := a.create(Spec{})
		header, err := f.shared.Open().Get(t.Context(), []byte{memberSpace})
		require.NoError(t, err)
		require.NoError(t, f.shared.Open().Apply(t.Context(), backend.Change{
			Key: header.Key, Value: []byte("damage"), Expect: header.Revision,
		}))
		require.Zero(t, took(func() { _, err = New(f.shared.Open(), f.options(nil)) }))
		require.ErrorIs(t, err, ErrCorrupt)
		require.ErrorContains(t, err, `keystore: join the other processes: cluster: header of the `+
			`membership table: the stored data is corrupt: stop all processes of the store, delete `+
			`the entry "m", and start the processes again`)
		require.NoError(t, a.uses(issued), "the processes that have joined work on")
		require.NoError(t, a.Revoke(t.Context(), issued.Key.ID, ""))
	})
}

// A call whose context ends does not wait for a flush that waits for the storage.
func TestACallDoesNotWaitForAFlush(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		m := f.open(nil)
		require.NoError(t, m.uses(m.create(Spec{})))
		hold := make(chan struct{})
		m.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			if changes[0].Key[0] == usageSpace {
				<-hold
			}
			return next(ctx)
		})
		flushed := make(chan error)
		go func() { flushed <- m.flushUsage(t.Context()) }()
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var backup bytes.Buffer
		require.ErrorIs(t, m.Backup(ctx, &backup), context.DeadlineExceeded)
		require.Zero(t, backup.Len())
		close(hold)
		require.NoError(t, <-flushed)
		require.NoError(t, m.Backup(t.Context(), &backup))
	})
}
