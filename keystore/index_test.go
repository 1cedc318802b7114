package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// An open is a backend that stays open when its store is closed, so that a test can read the
// backend and open another store.
type open struct{ backend.Backend }

func (open) Close() error { return nil }

// newStoreOn opens a store on a backend that stays open.
func newStoreOn(t testing.TB, b backend.Backend) *Store {
	t.Helper()
	s, err := New(open{b}, nil)
	require.NoError(t, err)
	return s
}

// read returns the entries of key spaces, or of all key spaces.
func read(t testing.TB, b backend.Backend, spaces ...byte) map[string]backend.Entry {
	t.Helper()
	all := make(map[string]backend.Entry)
	for e, err := range b.Scan(t.Context(), nil, nil) {
		require.NoError(t, err)
		if len(spaces) == 0 || bytes.IndexByte(spaces, e.Key[0]) >= 0 {
			all[string(e.Key)] = e
		}
	}
	return all
}

// copyOf returns a backend in memory with the same entries.
func copyOf(t testing.TB, b backend.Backend) backend.Backend {
	t.Helper()
	c := backendtest.NewMemory()
	for _, e := range read(t, b) {
		change := backend.Change{Key: e.Key, Value: e.Value, Revision: e.Revision}
		require.NoError(t, c.Apply(t.Context(), change))
	}
	return c
}

// requireIndexed checks the invariants of the indexes and of the graveyard: see index.go and
// graveyard.go.
func requireIndexed(t testing.TB, b backend.Backend) {
	t.Helper()
	want := make(map[string]bool)
	created := make(map[token.ID]int64)
	for _, e := range read(t, b, keySpace) {
		kr, err := parseKeyRecord(e)
		require.NoError(t, err)
		require.False(t, kr.purged(), "a purged key lies in the graveyard")
		created[kr.id] = firstStamp(kr.record)
		if kr.record.Owner != "" {
			want[string(ownerKey(kr.record.Owner, kr.id))] = true
		}
	}
	for _, e := range read(t, b, graveSpace) {
		grave, err := parseGrave(e)
		require.NoError(t, err)
		_, ok := created[grave.id]
		require.Equal(t, ok, grave.record == nil, "a key has a record or a full grave")
		if grave.record != nil {
			created[grave.id] = firstStamp(grave.record)
		}
	}
	for _, e := range read(t, b, eventSpace) {
		event, err := parseEvent(e)
		require.NoError(t, err)
		id := token.ID(event.KeyId)
		key := string(eventIndexKey(id, stampOf(e.Key)))
		want[key] = true
		if isFirst(event) && created[id] == stampOf(e.Key) {
			_, err := b.Get(t.Context(), []byte(key))
			want[key] = err == nil // the entry may be missing
		}
	}
	maps.DeleteFunc(want, func(_ string, there bool) bool { return !there })
	have := make(map[string]bool)
	for key, e := range read(t, b, ownerIndexSpace, eventIndexSpace) {
		require.Empty(t, e.Value)
		have[key] = true
	}
	require.Equal(t, want, have)
}

// requireSameAnswers checks that List and Events answer from the indexes as they answer by reading
// everything.
func requireSameAnswers(t testing.TB, s *Store) {
	t.Helper()
	byOwner, byKey := make(map[string][]*Key), make(map[string][]Event)
	for k, err := range s.List(t.Context(), Query{}) {
		require.NoError(t, err)
		byOwner[k.Owner] = append(byOwner[k.Owner], k)
	}
	for e, err := range s.Events(t.Context(), EventQuery{}) {
		require.NoError(t, err)
		byKey[e.KeyID] = append(byKey[e.KeyID], e)
	}
	for owner, want := range byOwner {
		if owner == "" {
			continue
		}
		require.Equal(t, want, listed(t, s, Query{Owner: owner}))
		middle := want[len(want)/2]
		require.Equal(t, want[len(want)/2+1:],
			append([]*Key{}, listed(t, s, Query{Owner: owner, Cursor: middle.ID})...))
		require.Equal(t, want[:1], listed(t, s, Query{Owner: owner, Limit: 1}))
	}
	require.Empty(t, listed(t, s, Query{Owner: "nobody"}))
	for id, want := range byKey {
		require.Equal(t, want, eventsOf(t, s, EventQuery{KeyID: id}))
		middle := want[len(want)/2]
		require.Equal(t, want[len(want)/2+1:],
			append([]Event{}, eventsOf(t, s, EventQuery{KeyID: id, After: middle.At})...))
		require.Equal(t, want[:len(want)/2+1],
			eventsOf(t, s, EventQuery{KeyID: id, Until: middle.At}))
		require.Equal(t, want[:1], eventsOf(t, s, EventQuery{KeyID: id, Limit: 1}))
	}
}

func listed(t testing.TB, s *Store, q Query) (all []*Key) {
	t.Helper()
	for k, err := range s.List(t.Context(), q) {
		require.NoError(t, err)
		all = append(all, k)
	}
	return all
}

func eventsOf(t testing.TB, s *Store, q EventQuery) (all []Event) {
	t.Helper()
	for e, err := range s.Events(t.Context(), q) {
		require.NoError(t, err)
		all = append(all, e)
	}
	return all
}

// sweep removes the events before a time, as the background does.
func sweep(t testing.TB, s *Store, before time.Time) {
	t.Helper()
	_, err := s.sweep(t.Context(), eventKey(0), before.UnixNano())
	require.NoError(t, err)
}

var owners = []string{"", "a", "b", "c", "some owner with a longer name"}

// live makes changes at random in a store, as the life of a store has changes.
func live(t testing.TB, s *Store, r *rand.Rand, changes int) {
	t.Helper()
	ctx := t.Context()
	var saved bytes.Buffer
	var ids []string
	for _, k := range listed(t, s, Query{}) {
		ids = append(ids, k.ID)
	}
	for range changes {
		owner := owners[r.IntN(len(owners))]
		if len(ids) < 5 || r.IntN(4) == 0 {
			issued, err := s.Create(ctx, Spec{Name: "n", Owner: owner})
			require.NoError(t, err)
			ids = append(ids, issued.Key.ID)
			continue
		}
		id := ids[r.IntN(len(ids))]
		var err error
		switch x := r.IntN(40); {
		case x < 10:
			_, err = s.Update(ctx, id, func(spec *Spec) error { spec.Owner = owner; return nil })
		case x < 14:
			_, err = s.Rotate(ctx, id, time.Hour)
		case x < 18:
			err = s.Disable(ctx, id, "")
		case x < 22:
			err = s.Enable(ctx, id)
		case x < 30:
			err = s.Revoke(ctx, id, "")
		case x < 32:
			_, err = s.RevokeAll(ctx, Query{Owner: "c"}, "", nil)
		case x < 34:
			_, err = s.Purge(ctx, time.Now())
		case x < 36:
			saved.Reset()
			err = s.Backup(ctx, &saved)
		case x < 39 && saved.Len() > 0:
			err = s.Restore(ctx, bytes.NewReader(saved.Bytes()))
		case x == 39:
			sweep(t, s, time.Now().Add(-time.Millisecond))
		}
		if !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrKeyRevoked) {
			require.NoError(t, err)
		}
	}
}

// Whatever happens to the keys, the indexes lead to the keys and events that there are, and nowhere
// else.
func TestIndexesFollowTheKeys(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := backendtest.NewMemory()
			s := newStoreOn(t, b)
			r := rand.New(rand.NewPCG(seed, 1))
			live(t, s, r, 200)
			requireIndexed(t, b)
			requireSameAnswers(t, s)

			// A store that has other keys takes the keys of the first store, some of them twice.
			var saved bytes.Buffer
			require.NoError(t, s.Backup(t.Context(), &saved))
			c := backendtest.NewMemory()
			second := newStoreOn(t, c)
			live(t, second, r, 50)
			for range 2 {
				require.NoError(t, second.Restore(t.Context(), bytes.NewReader(saved.Bytes())))
				requireIndexed(t, c)
				requireSameAnswers(t, second)
				live(t, second, r, 50)
			}
			requireIndexed(t, c)
			requireSameAnswers(t, second)
			require.NoError(t, second.Close())
			require.NoError(t, s.Close())
		})
	}
}

// A new key takes one entry in the owner index, and its creation no entry in the event index.
func TestCreateWritesOneIndexEntry(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	issued, err := s.Create(t.Context(), Spec{Name: "n", Owner: "o"})
	require.NoError(t, err)
	require.Len(t, read(t, b, ownerIndexSpace), 1)
	require.Empty(t, read(t, b, eventIndexSpace))
	all := eventsOf(t, s, EventQuery{KeyID: issued.Key.ID})
	require.Len(t, all, 1)
	require.Equal(t, all[0].At, issued.Key.CreatedAt)
}

// After a purge of all keys, a list reads nothing.
func TestPurgedKeysLeaveTheKeySpace(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	for range 100 {
		_, err := s.Create(t.Context(), Spec{Name: "n", Owner: "o"})
		require.NoError(t, err)
	}
	n, err := s.RevokeAll(t.Context(), Query{}, "", &RevokeAllOptions{All: true})
	require.NoError(t, err)
	require.Equal(t, 100, n)
	n, err = s.Purge(t.Context(), time.Now())
	require.NoError(t, err)
	require.Equal(t, 100, n)
	require.Empty(t, read(t, b, keySpace, ownerIndexSpace))
	require.Len(t, read(t, b, graveSpace), 100)
	requireIndexed(t, b)
	requireSameAnswers(t, s)
	require.Len(t, eventsOf(t, s, EventQuery{}), 300)
}

// If the clock is set back, the stamps of events are ahead of the clock. Then the event index leads
// to the creation, and CreatedAt is what the clock shows.
func TestCreateWithTheClockSetBack(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	ahead := time.Now().Add(time.Hour).UnixNano()
	require.NoError(t, s.sequencer.Resume(func(from, to int64) (int64, error) {
		if from <= ahead && ahead < to {
			return ahead, nil
		}
		return -1, nil
	}))
	issued, err := s.Create(t.Context(), Spec{Name: "n", Owner: "o"})
	require.NoError(t, err)
	require.WithinDuration(t, time.Now(), issued.Key.CreatedAt, time.Minute)
	require.Len(t, read(t, b, eventIndexSpace), 1)
	requireIndexed(t, b)
	requireSameAnswers(t, s)
	require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
	_, err = s.Purge(t.Context(), time.Now())
	require.NoError(t, err)
	requireIndexed(t, b)
	require.Len(t, eventsOf(t, s, EventQuery{KeyID: issued.Key.ID}), 3)
}

// Two owners with the same hash: the record decides.
func TestOwnersWithTheSameHash(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	one, err := s.Create(t.Context(), Spec{Name: "n", Owner: "one"})
	require.NoError(t, err)
	two, err := s.Create(t.Context(), Spec{Name: "n", Owner: "two"})
	require.NoError(t, err)
	other, err := parseID("", two.Key.ID)
	require.NoError(t, err)
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: ownerKey("one", other)}))
	all := listed(t, s, Query{Owner: "one"})
	require.Len(t, all, 1)
	require.Equal(t, one.Key.ID, all[0].ID)
	n, err := s.RevokeAll(t.Context(), Query{Owner: "one"}, "", nil)
	require.NoError(t, err)
	require.Equal(t, 1, n)
}

// A damaged index does not prevent changes of a key: the change mends the index.
func TestDamagedOwnerIndexIsMended(t *testing.T) {
	ctx := context.Background()
	for name, change := range map[string]func(s *Store, id string) error{
		"Update": func(s *Store, id string) error {
			_, err := s.Update(ctx, id, func(spec *Spec) error { spec.Owner = "b"; return nil })
			return err
		},
		"Purge": func(s *Store, id string) error {
			if err := s.Revoke(ctx, id, ""); err != nil {
				return err
			}
			_, err := s.Purge(ctx, time.Now())
			return err
		},
	} {
		for _, damage := range []string{"missing", "forged"} {
			t.Run(name+", "+damage, func(t *testing.T) {
				b := backendtest.NewMemory()
				s := newStoreOn(t, b)
				defer s.Close()
				issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
				require.NoError(t, err)
				id, err := parseID("", issued.Key.ID)
				require.NoError(t, err)
				key := ownerKey("a", id)
				if damage == "missing" {
					require.NoError(t, b.Apply(ctx, backend.Change{Key: key, Expect: 1,
						Delete: true}))
				} else {
					require.NoError(t, b.Apply(ctx, backend.Change{Key: key, Expect: 1}))
					require.NoError(t, b.Apply(ctx, backend.Change{Key: ownerKey("c", id)}))
				}
				require.NoError(t, change(s, issued.Key.ID))
				if damage == "forged" { // the change does not know of the entry of another owner
					require.NoError(t, b.Apply(ctx, backend.Change{Key: ownerKey("c", id),
						Expect: 1, Delete: true}))
				}
				requireIndexed(t, b)
			})
		}
	}
}

// A stepped backend calls a function before each Apply.
type stepped struct {
	backend.Backend
	before func(changes []backend.Change) error
	after  func() error
}

func (b *stepped) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := b.before(changes); err != nil {
		return err
	}
	if err := b.Backend.Apply(ctx, changes...); err != nil {
		return err
	}
	return b.after()
}

// A Restore finds neither a record nor a grave. Before the Restore writes, another Restore adds the
// key, and a Purge removes the key. The first Restore must not bring the key back.
func TestRestoreDoesNotRaceAPurge(t *testing.T) {
	ctx := t.Context()
	for name, how := range map[string]func(s *Store, id string) error{
		"purged": func(s *Store, id string) error {
			if err := s.Revoke(ctx, id, ""); err != nil {
				return err
			}
			_, err := s.Purge(ctx, time.Now())
			return err
		},
		"purged in another backup": func(s *Store, id string) error {
			b := backendtest.NewMemory()
			parsed, err := parseID("", id)
			if err != nil {
				return err
			}
			r := &record.Record{Status: record.Status_STATUS_PURGED, PurgedAt: 1}
			value, err := record.Encode(r)
			if err != nil {
				return err
			}
			if err := b.Apply(ctx, backend.Change{Key: graveKey(parsed), Value: value,
				Revision: 7}); err != nil {
				return err
			}
			other, err := New(b, nil)
			if err != nil {
				return err
			}
			defer other.Close()
			var saved bytes.Buffer
			if err := other.Backup(ctx, &saved); err != nil {
				return err
			}
			return s.Restore(ctx, &saved)
		},
	} {
		for _, added := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", added before: ", added), func(t *testing.T) {
				first := newStoreOn(t, backendtest.NewMemory())
				defer first.Close()
				issued, err := first.Create(ctx, Spec{Name: "n", Owner: "o"})
				require.NoError(t, err)
				id := issued.Key.ID
				var saved bytes.Buffer
				require.NoError(t, first.Backup(ctx, &saved))

				b := backendtest.NewMemory()
				other := newStoreOn(t, b)
				defer other.Close()
				gate := &stepped{Backend: b, after: func() error { return nil }}
				raced := 0
				gate.before = func(changes []backend.Change) error {
					if changes[0].Key[0] != keySpace || raced > 0 {
						return nil
					}
					raced++
					if added || name == "purged" {
						if err := other.Restore(ctx, bytes.NewReader(saved.Bytes())); err != nil {
							return err
						}
					}
					return how(other, id)
				}
				s := newStoreOn(t, gate)
				defer s.Close()
				require.NoError(t, s.Restore(ctx, bytes.NewReader(saved.Bytes())))
				require.Equal(t, 1, raced)
				_, err = s.Get(ctx, id)
				require.ErrorIs(t, err, ErrNotFound)
				_, err = s.Verify(ctx, issued.Secret.Reveal())
				require.ErrorIs(t, err, ErrUnknown)
				requireIndexed(t, b)
			})
		}
	}
}

// A key gets another owner after the scan has read the index entry, and before the record is read.
func TestIndexEntriesOfChangedKeysAreSkipped(t *testing.T) {
	ctx := t.Context()
	b := &scanned{Backend: backendtest.NewMemory()}
	s := newStoreOn(t, b)
	defer s.Close()
	var ids []string
	for range 4 {
		issued, err := s.Create(ctx, Spec{Name: "n", Owner: "o"})
		require.NoError(t, err)
		ids = append(ids, issued.Key.ID)
	}
	require.NoError(t, s.Revoke(ctx, ids[1], ""))
	step := 0
	b.found = func(e backend.Entry) {
		if e.Key[0] != ownerIndexSpace {
			return
		}
		var err error
		switch step++; step {
		case 1:
			_, err = s.Update(ctx, ids[0],
				func(spec *Spec) error { spec.Owner = "other"; return nil })
		case 2:
			_, err = s.Purge(ctx, time.Now())
		}
		require.NoError(t, err)
	}
	all := listed(t, s, Query{Owner: "o"})
	require.Len(t, all, 2)
	require.Equal(t, ids[2], all[0].ID)
	require.Equal(t, ids[3], all[1].ID)

	step = 0
	b.found = func(e backend.Entry) {
		if e.Key[0] != eventIndexSpace {
			return
		}
		if step++; step == 1 {
			sweep(t, s, time.Now())
		}
	}
	require.Len(t, eventsOf(t, s, EventQuery{KeyID: ids[1]}), 1,
		"the creation was read before the sweep")
	require.Equal(t, 1, step, "the sweep has removed the index entries too")
}

// A scanned backend calls a function for each entry that a Scan has found, before the caller gets
// the entry.
type scanned struct {
	backend.Backend
	found func(backend.Entry)
}

func (b *scanned) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range b.Backend.Scan(ctx, from, to) {
			if b.found != nil && err == nil {
				b.found(e)
			}
			if !yield(e, err) {
				return
			}
		}
	}
}
