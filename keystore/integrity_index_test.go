package keystore

import (
	"context"
	"fmt"
	"hash/maphash"
	"iter"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// checkBySum runs the first part of a CheckIntegrity, and reports whether both sums are equal.
func checkBySum(t *testing.T, s *Store) (owners, events bool) {
	t.Helper()
	c := &integrityCheck{store: s, seed: maphash.MakeSeed()}
	require.NoError(t, c.readSnapshot(t.Context()))
	require.Empty(t, c.damage)
	return c.owners.is == c.owners.should, c.events.is == c.events.should
}

// The sums are equal for every store, so that CheckIntegrity takes one scan: for a store with a
// long life, for a store that was restored, and for a store that was migrated.
func TestSumsOfIndexesAreEqual(t *testing.T) {
	for name, b := range map[string]backend.Backend{
		"empty":    backendtest.NewMemory(),
		"lived":    populated(t, 600),
		"migrated": withoutIndexes(t, populated(t, 600)),
	} {
		t.Run(name, func(t *testing.T) {
			s := newStoreOn(t, b)
			defer s.Close()
			check := func(s *Store) {
				t.Helper()
				owners, events := checkBySum(t, s)
				require.True(t, owners)
				require.True(t, events)
				require.NoError(t, s.CheckIntegrity(t.Context()))
			}
			check(s)
			for seed := range uint64(3) {
				live(t, s, rand.New(rand.NewPCG(seed, 1)), 100)
				check(s)
			}
			var saved strings.Builder
			require.NoError(t, s.Backup(t.Context(), &saved))
			other := newStoreOn(t, backendtest.NewMemory())
			defer other.Close()
			for seed := range uint64(3) {
				require.NoError(t, other.Restore(t.Context(), strings.NewReader(saved.String())))
				check(other)
				live(t, other, rand.New(rand.NewPCG(seed, 2)), 100)
				check(other)
			}
		})
	}
}

// CheckIntegrity names a missing index entry, a forged index entry, and a purged key that is there.
func TestCheckIntegrityNamesDamagedIndexes(t *testing.T) {
	ctx := t.Context()
	for name, tt := range map[string]struct {
		damage func(t *testing.T, b backend.Backend, id token.ID)
		text   string
	}{
		"no owner entry": {func(t *testing.T, b backend.Backend, id token.ID) {
			remove(t, b, ownerKey("a", id))
		}, "the owner index does not lead to key"},
		"a forged owner entry": {func(t *testing.T, b backend.Backend, id token.ID) {
			require.NoError(t, b.Apply(ctx, backend.Change{Key: ownerKey("b", id)}))
		}, "has another owner"},
		"an owner entry of no key": {func(t *testing.T, b backend.Backend, id token.ID) {
			id[15]++
			require.NoError(t, b.Apply(ctx, backend.Change{Key: ownerKey("a", id)}))
		}, "which does not exist"},
		"the owner entry of another key": {func(t *testing.T, b backend.Backend, id token.ID) {
			remove(t, b, ownerKey("a", id))
			id[15]++
			require.NoError(t, b.Apply(ctx, backend.Change{Key: ownerKey("a", id)}))
		}, "the owner index does not lead to key"},
		"no event entry": {func(t *testing.T, b backend.Backend, id token.ID) {
			for key, e := range read(t, b, eventIndexSpace) {
				if token.ID(e.Key[1:]) == id {
					remove(t, b, []byte(key))
				}
			}
		}, "the event index does not lead to the event of"},
		"a forged event entry": {func(t *testing.T, b backend.Backend, id token.ID) {
			require.NoError(t, b.Apply(ctx, backend.Change{Key: eventIndexKey(id, 1)}))
		}, "the event index leads to an event of"},
		"an event entry of another key": {func(t *testing.T, b backend.Backend, id token.ID) {
			for _, e := range read(t, b, eventIndexSpace) {
				if got, stamp, _ := parseEventIndexKey(e); got != id {
					require.NoError(t, b.Apply(ctx, backend.Change{Key: eventIndexKey(id, stamp)}))
				}
			}
		}, "the event index leads to an event of"},
		"no event of the creation": {func(t *testing.T, b backend.Backend, id token.ID) {
			e, err := b.Get(ctx, storageKey(id))
			require.NoError(t, err)
			kr, err := parseKeyRecord(e)
			require.NoError(t, err)
			kr.record.CreatedAt++
			value, err := record.Encode(kr.record)
			require.NoError(t, err)
			change := backend.Change{Key: e.Key, Value: value, Expect: e.Revision}
			require.NoError(t, b.Apply(ctx, change))
		}, "the event index does not lead to the event of"},
		"a lost event of the creation": {func(t *testing.T, b backend.Backend, id token.ID) {
			remove(t, b, eventKey(createdIn(t, b, storageKey(id))))
		}, "the event of the creation of key"},
		"a value in an index": {func(t *testing.T, b backend.Backend, id token.ID) {
			change := backend.Change{Key: ownerKey("a", id), Value: []byte("x"), Expect: 1}
			require.NoError(t, b.Apply(ctx, change))
		}, "is not in the form of the owner index"},
		"a grave of a key": {func(t *testing.T, b backend.Backend, id token.ID) {
			value, err := record.Encode(&record.Record{Status: record.Status_STATUS_PURGED,
				PurgedAt: 1})
			require.NoError(t, err)
			require.NoError(t, b.Apply(ctx, backend.Change{Key: graveKey(id), Value: value}))
		}, "is purged, and is still there"},
		"a grave with a key": {func(t *testing.T, b backend.Backend, id token.ID) {
			e, err := b.Get(ctx, storageKey(id))
			require.NoError(t, err)
			require.NoError(t, b.Apply(ctx, backend.Change{Key: graveKey(id), Value: e.Value}))
		}, "not purged"},
	} {
		t.Run(name, func(t *testing.T) {
			b := backendtest.NewMemory()
			s := newStoreOn(t, b)
			defer s.Close()
			live(t, s, rand.New(rand.NewPCG(1, 1)), 100)
			issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
			require.NoError(t, err)
			require.NoError(t, s.Revoke(ctx, issued.Key.ID, ""))
			require.NoError(t, s.CheckIntegrity(ctx))
			id, err := parseID("", issued.Key.ID)
			require.NoError(t, err)
			tt.damage(t, b, id)
			err = s.CheckIntegrity(ctx)
			require.ErrorIs(t, err, ErrCorrupt)
			require.ErrorContains(t, err, tt.text)
		})
	}
}

// CheckIntegrity names each key whose event of the creation is lost, also if the event was the only
// event, or the first, or if the key is purged. The events that a sweep has removed are not lost.
func TestCheckIntegrityFindsLostCreations(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	var keys [4]*Key
	for i := range keys {
		issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
		require.NoError(t, err)
		keys[i] = issued.Key
	}
	require.NoError(t, s.Revoke(ctx, keys[1].ID, ""))
	n, err := s.Purge(ctx, time.Now())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, s.CheckIntegrity(ctx))
	for i, k := range keys {
		remove(t, b, eventKey(k.CreatedAt.UnixNano()))
		err = s.CheckIntegrity(ctx)
		require.ErrorIs(t, err, ErrCorrupt)
		for _, lost := range keys[:i+1] {
			require.ErrorContains(t, err, "the event of the creation of key "+lost.ID+" is missing")
		}
		for _, kept := range keys[i+1:] {
			require.NotContains(t, err.Error(), kept.ID)
		}
	}
	sweep(t, s, time.Now())
	require.NoError(t, s.CheckIntegrity(ctx), "the sweep would have removed the events")
}

// After sweeps with any retention, after a Restore, and with the clock set back, no event counts as
// lost.
func TestCheckIntegrityKnowsOfSweeps(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	for i := range 8 {
		issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
		require.NoError(t, err)
		if i%2 == 0 {
			require.NoError(t, s.Revoke(ctx, issued.Key.ID, ""))
		}
	}
	_, err := s.Purge(ctx, time.Now())
	require.NoError(t, err)
	sweep(t, s, time.Now())
	require.Empty(t, read(t, b, eventSpace, eventIndexSpace))
	require.NoError(t, s.CheckIntegrity(ctx))
	var saved strings.Builder
	require.NoError(t, s.Backup(ctx, &saved))
	require.NoError(t, s.Close())

	// The next Open keeps events forever.
	s = newStoreOn(t, b)
	defer s.Close()
	owners, events := checkBySum(t, s)
	require.True(t, owners)
	require.True(t, events)
	issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
	require.NoError(t, err)
	ahead := time.Now().Add(time.Hour).UnixNano()
	require.NoError(t, s.sequencer.Resume(func(from, to int64) (int64, error) {
		if from <= ahead && ahead < to {
			return ahead, nil
		}
		return -1, nil
	}))
	_, err = s.Create(ctx, Spec{Name: "n", Owner: "a"})
	require.NoError(t, err)
	require.NoError(t, s.CheckIntegrity(ctx))
	remove(t, b, eventKey(issued.Key.CreatedAt.UnixNano()))
	require.ErrorContains(t, s.CheckIntegrity(ctx), issued.Key.ID)

	other := newStoreOn(t, backendtest.NewMemory())
	defer other.Close()
	require.NoError(t, other.Restore(ctx, strings.NewReader(saved.String())))
	_, err = other.Purge(ctx, time.Now())
	require.NoError(t, err)
	require.NoError(t, other.CheckIntegrity(ctx))
	c := &integrityCheck{store: other}
	require.NoError(t, c.readSince(ctx))
	require.NoError(t, c.findCreations(ctx))
	require.Empty(t, c.damage, "the events of the creations are in the first store")
}

// createdIn returns the CreatedAt of a record.
func createdIn(t *testing.T, b backend.Backend, key []byte) int64 {
	t.Helper()
	e, err := b.Get(t.Context(), key)
	require.NoError(t, err)
	kr, err := parseKeyRecord(e)
	require.NoError(t, err)
	return kr.record.CreatedAt
}

// An index entry is missing, surplus, or has the wrong form. CheckIntegrity says how to mend the
// index, and an Open with RebuildIndexes mends the index.
func TestRebuildIndexes(t *testing.T) {
	ctx := t.Context()
	write := func(t *testing.T, b backend.Backend, key []byte, value string, expect uint64) {
		t.Helper()
		change := backend.Change{Key: key, Value: []byte(value), Expect: expect}
		require.NoError(t, b.Apply(ctx, change))
	}
	first := func(t *testing.T, b backend.Backend, space byte) backend.Entry {
		t.Helper()
		all := sorted(read(t, b, space))
		require.NotEmpty(t, all)
		return all[len(all)/2]
	}
	for name, damage := range map[string]func(t *testing.T, b backend.Backend, id token.ID){
		"a missing owner entry": func(t *testing.T, b backend.Backend, id token.ID) {
			remove(t, b, ownerKey("a", id))
		},
		"a surplus owner entry": func(t *testing.T, b backend.Backend, id token.ID) {
			write(t, b, ownerKey("another", id), "", 0)
		},
		"an owner entry of no key": func(t *testing.T, b backend.Backend, id token.ID) {
			write(t, b, ownerKey("a", token.ID{}), "", 0)
		},
		"an owner entry with a value": func(t *testing.T, b backend.Backend, id token.ID) {
			write(t, b, ownerKey("a", id), "x", 1)
		},
		"an owner entry that is too short": func(t *testing.T, b backend.Backend, id token.ID) {
			write(t, b, ownerPrefix("a"), "", 0)
		},
		"a missing event entry": func(t *testing.T, b backend.Backend, _ token.ID) {
			remove(t, b, first(t, b, eventIndexSpace).Key)
		},
		"a surplus event entry": func(t *testing.T, b backend.Backend, id token.ID) {
			write(t, b, eventIndexKey(id, 7), "", 0)
		},
		"an event entry with a value": func(t *testing.T, b backend.Backend, _ token.ID) {
			write(t, b, first(t, b, eventIndexSpace).Key, "x", 1)
		},
		"an event entry that is too long": func(t *testing.T, b backend.Backend, id token.ID) {
			write(t, b, append(eventIndexKey(id, 7), 0), "", 0)
		},
		"no index entry": func(t *testing.T, b backend.Backend, _ token.ID) {
			for key := range read(t, b, ownerIndexSpace, eventIndexSpace) {
				remove(t, b, []byte(key))
			}
		},
		"only surplus entries": func(t *testing.T, b backend.Backend, id token.ID) {
			for key := range read(t, b, ownerIndexSpace, eventIndexSpace) {
				remove(t, b, []byte(key))
			}
			write(t, b, ownerKey("another", id), "", 0)
			write(t, b, eventIndexKey(id, 7), "", 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := populated(t, 300)
			s := newStoreOn(t, b)
			issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
			require.NoError(t, err)
			require.NoError(t, s.Disable(ctx, issued.Key.ID, ""))
			id, err := parseID("", issued.Key.ID)
			require.NoError(t, err)
			require.NoError(t, s.CheckIntegrity(ctx))
			damage(t, b, id)
			err = s.CheckIntegrity(ctx)
			require.ErrorIs(t, err, ErrCorrupt)
			require.ErrorContains(t, err, "open the store once with Options.RebuildIndexes")
			require.NoError(t, s.Close())

			s = newStoreOn(t, b)
			require.ErrorIs(t, s.CheckIntegrity(ctx), ErrCorrupt)
			require.NoError(t, s.Close())
			s, err = New(open{b}, &Options{RebuildIndexes: true})
			require.NoError(t, err)
			defer s.Close()
			require.NoError(t, s.CheckIntegrity(ctx))
			requireIndexed(t, b)
			requireSameAnswers(t, s)
			live(t, s, rand.New(rand.NewPCG(5, 6)), 50)
			requireIndexed(t, b)
			require.NoError(t, s.CheckIntegrity(ctx))
		})
	}
}

// Damage that RebuildIndexes cannot mend is named without the advice.
func TestCheckIntegrityAdvisesARebuildOnlyOfIndexes(t *testing.T) {
	b := populated(t, 50)
	e := anyOf(t, b, keySpace)
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: e.Key, Value: []byte("x"),
		Expect: e.Revision}))
	s := newStoreOn(t, b)
	defer s.Close()
	err := s.CheckIntegrity(t.Context())
	require.ErrorIs(t, err, ErrCorrupt)
	require.NotContains(t, err.Error(), "RebuildIndexes")
}

func remove(t *testing.T, b backend.Backend, key []byte) {
	t.Helper()
	e, err := b.Get(t.Context(), key)
	require.NoError(t, err)
	change := backend.Change{Key: key, Expect: e.Revision, Delete: true}
	require.NoError(t, b.Apply(t.Context(), change))
}

// A disturbed backend makes a change of the store before every read: between the scan and the
// look-ups, and between the look-ups of a CheckIntegrity.
type disturbed struct {
	backend.Backend
	mu     sync.Mutex
	change func() // nil: none
}

func (b *disturbed) step() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if change := b.change; change != nil {
		b.change = nil // the change reads too
		b.mu.Unlock()
		change()
		b.mu.Lock()
		b.change = change
	}
}

func (b *disturbed) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if key[0] != stateSpace { // the background reads the state at the end of each minute
		b.step()
	}
	return b.Backend.Get(ctx, key)
}

func (b *disturbed) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range b.Backend.Scan(ctx, from, to) {
			b.step()
			if !yield(e, err) {
				return
			}
		}
	}
}

// Others change the keys while CheckIntegrity looks up the entries of the indexes. CheckIntegrity
// takes no change for damage.
func TestCheckIntegrityBesideChanges(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := &disturbed{Backend: backendtest.NewMemory()}
			s := newStoreOn(t, b)
			defer s.Close()
			r := rand.New(rand.NewPCG(seed, 3))
			live(t, s, r, 40)
			changes := 0
			b.change = func() {
				if changes++; changes < 400 {
					live(t, s, r, 1)
				}
			}
			c := &integrityCheck{store: s}
			require.NoError(t, c.compareOwners(t.Context()))
			require.NoError(t, c.compareEvents(t.Context()))
			require.Empty(t, c.damage)
			require.NoError(t, s.CheckIntegrity(t.Context()))
			require.Greater(t, changes, 20)
		})
	}
}

// The same with changes of the very keys that CheckIntegrity looks up.
func TestCheckIntegrityBesideChangesOfTheKey(t *testing.T) {
	ctx := t.Context()
	for name, last := range map[string]func(s *Store) error{
		"renamed": func(*Store) error { return nil },
		"swept": func(s *Store) error {
			sweep(t, s, time.Now())
			return nil
		},
		"purged": func(s *Store) error {
			_, err := s.RevokeAll(ctx, Query{}, "", &RevokeAllOptions{All: true})
			if err != nil {
				return err
			}
			_, err = s.Purge(ctx, time.Now())
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := &disturbed{Backend: backendtest.NewMemory()}
			s := newStoreOn(t, b)
			defer s.Close()
			var ids []string
			for range 20 {
				issued, err := s.Create(ctx, Spec{Name: "n", Owner: "a"})
				require.NoError(t, err)
				ids = append(ids, issued.Key.ID)
			}
			n := 0
			b.change = func() {
				switch n++; {
				case n < 25:
					for _, id := range ids {
						_, err := s.Update(ctx, id, func(spec *Spec) error {
							spec.Owner = fmt.Sprint("owner ", n%3)
							return nil
						})
						require.NoError(t, err)
					}
				case n == 25:
					require.NoError(t, last(s))
				}
			}
			c := &integrityCheck{store: s}
			require.NoError(t, c.compareOwners(ctx))
			require.NoError(t, c.compareEvents(ctx))
			require.Empty(t, c.damage)
			require.Greater(t, n, 25)
			b.change = nil
			require.NoError(t, s.CheckIntegrity(ctx))
			requireIndexed(t, b.Backend)
		})
	}
}
