package keystore

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// withoutIndexes returns a copy of a backend as a program without indexes would have written the
// backend: without index entries, with the purged keys in the key space, and with a creation that
// is a little earlier than its event.
func withoutIndexes(t testing.TB, b backend.Backend) backend.Backend {
	t.Helper()
	c := backendtest.NewMemory()
	for _, e := range read(t, b, eventSpace, graveSpace, checkSpace, keySpace, usageSpace,
		stateSpace) {
		switch e.Key[0] {
		case graveSpace:
			if len(e.Value) == 0 {
				continue
			}
			e.Key[0] = keySpace
			fallthrough
		case keySpace:
			r, err := record.Decode(e.Value)
			require.NoError(t, err)
			if r.CreatedAt -= 1000; r.Status == record.Status_STATUS_PURGED {
				r.CreatedAt = 0
			}
			e.Value, err = record.Encode(r)
			require.NoError(t, err)
		case stateSpace:
			e.Value = e.Value[:9]
		}
		change := backend.Change{Key: e.Key, Value: e.Value, Revision: e.Revision}
		require.NoError(t, c.Apply(t.Context(), change))
	}
	return c
}

// populated returns a backend with a store whose keys have had a life.
func populated(t testing.TB, changes int) backend.Backend {
	t.Helper()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	live(t, s, rand.New(rand.NewPCG(1, 2)), changes)
	require.NoError(t, s.Close())
	return b
}

// After a recovery, which removes the state, the indexes are built again, also if they need many
// writes.
func TestIndexesAreBuiltAgain(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	for range 2 * backend.MaxChanges {
		key, err := s.Create(t.Context(), Spec{Name: "n", Owner: "o"})
		require.NoError(t, err)
		require.NoError(t, s.Disable(t.Context(), key.Key.ID, ""))
	}
	require.NoError(t, s.Close())
	state, err := b.Get(t.Context(), stateKey)
	require.NoError(t, err)
	require.NoError(t, b.Apply(t.Context(), backend.Change{
		Key: stateKey, Expect: state.Revision, Delete: true,
	}))
	s = newStoreOn(t, b)
	require.NoError(t, s.CheckIntegrity(t.Context()))
	require.NoError(t, s.Close())
	requireIndexed(t, b)
}

// Open builds the indexes of a store that has none, and the answers stay the same.
func TestMigration(t *testing.T) {
	b := populated(t, 400)
	first := newStoreOn(t, b)
	events := eventsOf(t, first, EventQuery{})
	require.NoError(t, first.Close())
	old := withoutIndexes(t, b)
	var log bytes.Buffer
	s, err := New(open{old}, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	require.Contains(t, log.String(), "has built its indexes")
	requireIndexed(t, old)
	requireSameAnswers(t, s)
	require.Equal(t, events, eventsOf(t, s, EventQuery{}))
	live(t, s, rand.New(rand.NewPCG(3, 4)), 200)
	require.NoError(t, s.Close())
	requireIndexed(t, old)

	// The second Open does nothing.
	log.Reset()
	s, err = New(open{old}, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	require.NotContains(t, log.String(), "indexes")
	require.NoError(t, s.Close())
}

// A new store has no migration, and records that its indexes are complete.
func TestNewStoreIsIndexed(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	e, err := b.Get(t.Context(), stateKey)
	require.NoError(t, err)
	require.EqualValues(t, 1, e.Revision)
	state, err := parseState(e)
	require.NoError(t, err)
	require.Equal(t, completeIndexes(0), state.index)
}

var errKilled = errors.New("killed")

// A migration is killed before or after any of its writes. Each Open continues, and the result is
// the result of a migration that nothing has disturbed.
func TestMigrationIsKilledAtEachStep(t *testing.T) {
	old := withoutIndexes(t, populated(t, 1500))
	whole := copyOf(t, old)
	writes := 0
	s, err := New(open{&stepped{
		Backend: whole,
		before:  func([]backend.Change) error { writes++; return nil },
		after:   func() error { return nil },
	}}, nil)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.Greater(t, writes, 6)
	want := read(t, whole)
	delete(want, string(stateKey))

	for _, made := range []bool{false, true} {
		b := copyOf(t, old)
		for opened := 1; ; opened++ {
			// The store is killed at the second write of each Open, so that each Open makes one
			// step. If made is true, the last write is made, and the store does not learn of the
			// write.
			n := 0
			failing := &stepped{Backend: b}
			failing.before = func([]backend.Change) error {
				if n++; n == 2 && !made || n > 2 {
					return errKilled
				}
				return nil
			}
			failing.after = func() error {
				if n == 2 && made {
					return errKilled
				}
				return nil
			}
			s, err := New(open{failing}, nil)
			if err == nil {
				require.NoError(t, s.Close())
				require.Greater(t, opened, 3)
				break
			}
			require.ErrorIs(t, err, errKilled)
		}
		have := read(t, b)
		delete(have, string(stateKey))
		require.Equal(t, want, have)
		requireIndexed(t, b)
	}
}

// A rebuild of damaged indexes is killed before or after any of its writes. The next Open continues
// the rebuild, also without RebuildIndexes, and no store serves before the indexes are complete.
func TestRebuildIsKilledAtEachStep(t *testing.T) {
	b := populated(t, 1500)
	for _, space := range []byte{ownerIndexSpace, eventIndexSpace} {
		for _, e := range sorted(read(t, b, space))[:10] {
			remove(t, b, e.Key)
		}
	}
	for _, made := range []bool{false, true} {
		for kill, done := 1, false; !done; kill++ {
			c := copyOf(t, b)
			n := 0
			failing := &stepped{Backend: c}
			failing.before = func([]backend.Change) error {
				if n++; n == kill && !made || n > kill {
					return errKilled
				}
				return nil
			}
			failing.after = func() error {
				if n == kill && made {
					return errKilled
				}
				return nil
			}
			s, err := New(open{failing}, &Options{RebuildIndexes: true})
			if done = err == nil; done {
				require.Greater(t, kill, 6)
				_ = s.Close()
			} else {
				require.ErrorIs(t, err, errKilled)
			}
			state, err := c.Get(t.Context(), stateKey)
			require.NoError(t, err)
			parsed, err := parseState(state)
			require.NoError(t, err)
			if kill == 1 && !made {
				require.Equal(t, byte(phaseDone), parsed.index.phase, "nothing has begun")
				continue
			}
			s = newStoreOn(t, c)
			require.NoError(t, s.CheckIntegrity(t.Context()))
			require.NoError(t, s.Close())
			requireIndexed(t, c)
		}
	}
}

// A second store opens the backend during the migration of the first store. Both stores finish the
// migration together.
func TestTwoStoresMigrate(t *testing.T) {
	b := withoutIndexes(t, populated(t, 600))
	n := 0
	gate := &stepped{Backend: b, after: func() error { return nil }}
	gate.before = func([]backend.Change) error {
		if n++; n == 2 {
			return newStoreOn(t, b).Close()
		}
		return nil
	}
	s := newStoreOn(t, gate)
	require.Greater(t, n, 2)
	require.NoError(t, s.Close())
	requireIndexed(t, b)
}

// A program without indexes opens a store that has indexes, and changes keys. The next Open of a
// program with indexes builds the indexes again. A purged key that the program has restored is gone
// again.
func TestDowngradeAndUpgrade(t *testing.T) {
	ctx := t.Context()
	b := populated(t, 400)
	one := newStoreOn(t, b)
	purged, err := one.Create(ctx, Spec{Name: "n", Owner: "a"})
	require.NoError(t, err)
	var saved bytes.Buffer
	require.NoError(t, one.Backup(ctx, &saved))
	require.NoError(t, one.Revoke(ctx, purged.Key.ID, ""))
	_, err = one.Purge(ctx, time.Now())
	require.NoError(t, err)
	require.NoError(t, one.Close())

	id, err := parseID("", purged.Key.ID)
	require.NoError(t, err)
	// The program without indexes gives keys another owner, and writes its state.
	for _, e := range read(t, b, keySpace) {
		kr, err := parseKeyRecord(e)
		require.NoError(t, err)
		kr.record.Owner = owners[rand.IntN(len(owners))]
		value, err := record.Encode(kr.record)
		require.NoError(t, err)
		require.NoError(t, b.Apply(ctx, backend.Change{Key: e.Key, Value: value,
			Expect: e.Revision}))
	}
	state, err := b.Get(ctx, stateKey)
	require.NoError(t, err)
	require.NoError(t, b.Apply(ctx, backend.Change{Key: stateKey, Value: state.Value[:9],
		Expect: state.Revision}))
	// It restores the purged key too, as it does not know the graveyard.
	r := newRecord(Spec{Name: "n", Owner: "a"}, "p", one.dummyDigest, time.Now())
	value, err := record.Encode(r)
	require.NoError(t, err)
	require.NoError(t, b.Apply(ctx, backend.Change{Key: storageKey(id), Value: value}))

	s := newStoreOn(t, b)
	defer s.Close()
	requireIndexed(t, b)
	requireSameAnswers(t, s)
	_, err = s.Get(ctx, purged.Key.ID)
	require.ErrorIs(t, err, ErrNotFound)
	require.NoError(t, s.Restore(ctx, bytes.NewReader(saved.Bytes())))
	_, err = s.Get(ctx, purged.Key.ID)
	require.ErrorIs(t, err, ErrNotFound)
	requireIndexed(t, b)
}

// A store with indexes of a later version is refused, and nothing is changed.
func TestLaterIndexesAreRefused(t *testing.T) {
	b := populated(t, 20)
	e, err := b.Get(t.Context(), stateKey)
	require.NoError(t, err)
	e.Value[9] = indexVersion + 1
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: stateKey, Value: e.Value,
		Expect: e.Revision}))
	before := read(t, b)
	_, err = New(open{b}, nil)
	require.ErrorIs(t, err, ErrInvalid)
	require.ErrorContains(t, err, "upgrade the program")
	require.Equal(t, before, read(t, b))
}

// A later version has written a key, a grave of a key, or an event. Open refuses to build indexes
// that would lack the entry. The later version continues the migration.
func TestMigrationRefusesEntriesOfALaterVersion(t *testing.T) {
	ctx := t.Context()
	later := protowire.AppendTag(nil, 1, protowire.VarintType)
	later = protowire.AppendVarint(later, record.FormatCredits+1)
	for name, target := range map[string]func(b backend.Backend) backend.Entry{
		"key":   func(b backend.Backend) backend.Entry { return anyOf(t, b, keySpace) },
		"event": func(b backend.Backend) backend.Entry { return anyOf(t, b, eventSpace) },
		"grave": func(b backend.Backend) backend.Entry {
			id := token.ID(anyOf(t, b, keySpace).Key[1:])
			return backend.Entry{Key: graveKey(id)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := withoutIndexes(t, populated(t, 50))
			e := target(b)
			require.NoError(t, b.Apply(ctx, backend.Change{Key: e.Key, Value: later,
				Expect: e.Revision}))
			_, err := New(open{b}, nil)
			require.ErrorIs(t, err, ErrInvalid)
			require.ErrorContains(t, err, "the store was written by a later version of the "+
				"library: upgrade the program")

			written, err := b.Get(ctx, e.Key)
			require.NoError(t, err)
			require.Equal(t, later, written.Value)
			change := backend.Change{Key: e.Key, Value: e.Value, Expect: written.Revision}
			change.Delete = e.Revision == 0
			require.NoError(t, b.Apply(ctx, change))
			s := newStoreOn(t, b)
			defer s.Close()
			requireIndexed(t, b)
		})
	}
}

// anyOf returns an entry of a key space: of a key, an entry whose key is not purged.
func anyOf(t testing.TB, b backend.Backend, space byte) backend.Entry {
	t.Helper()
	for _, e := range read(t, b, space) {
		if kr, err := parseKeyRecord(e); space != keySpace || err == nil && !kr.purged() {
			return e
		}
	}
	require.FailNow(t, "the key space is empty")
	return backend.Entry{}
}

// A damaged record prevents no migration, and the log names the damage.
func TestMigrationPassesDamage(t *testing.T) {
	b := withoutIndexes(t, populated(t, 50))
	damaged := 0
	for _, space := range []byte{keySpace, eventSpace} {
		for _, e := range read(t, b, space) {
			change := backend.Change{Key: e.Key, Value: []byte("nonsense"), Expect: e.Revision}
			require.NoError(t, b.Apply(t.Context(), change))
			damaged++
			break
		}
	}
	var log bytes.Buffer
	s, err := New(open{b}, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	defer s.Close()
	require.Contains(t, log.String(), "damaged entries")
	require.Contains(t, log.String(), "entries=2")
}

// A grave is damaged. The migration still leads from the owner to the key, so that RevokeAll
// revokes the key.
func TestMigrationPassesADamagedGrave(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	key, err := s.Create(ctx, Spec{Name: "n", Owner: "o"})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	id, err := parseID("", key.Key.ID)
	require.NoError(t, err)
	require.NoError(t, b.Apply(ctx, backend.Change{Key: graveKey(id), Value: []byte("x")}))
	for _, e := range read(t, b, stateSpace) {
		require.NoError(t, b.Apply(ctx, backend.Change{Key: e.Key, Expect: e.Revision,
			Delete: true}))
	}

	var log bytes.Buffer
	s, err = New(open{b}, &Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	defer s.Close()
	require.Contains(t, log.String(), "entries=1")
	n, err := s.RevokeAll(ctx, Query{Owner: "o"}, "", nil)
	require.NoError(t, err)
	require.Equal(t, 1, n)
}

// The state of a store is read as it was written, and a damaged state is refused.
func TestState(t *testing.T) {
	since := time.Unix(1, 2).UTC()
	for _, kr := range []storeState{
		{since, true, indexState{}},
		{since, false, completeIndexes(5)},
		{since, true, indexState{indexVersion, phaseKeys, 7, storageKey(token.ID{1})}},
	} {
		parsed, err := parseState(backend.Entry{Key: stateKey, Value: kr.encode()})
		require.NoError(t, err)
		require.Equal(t, kr, parsed)
	}
	whole := storeState{since, false, completeIndexes(7)}.encode()
	unknown := append([]byte{}, whole...)
	unknown[10] = phaseDone + 1
	for _, value := range [][]byte{nil, whole[:8], whole[:10], whole[:18], unknown} {
		_, err := parseState(backend.Entry{Key: stateKey, Value: value})
		require.ErrorIs(t, err, ErrCorrupt)
	}
}

// A store with a damaged state builds its indexes again.
func TestDamagedState(t *testing.T) {
	b := populated(t, 100)
	e, err := b.Get(t.Context(), stateKey)
	require.NoError(t, err)
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: stateKey, Value: []byte("x"),
		Expect: e.Revision}))
	for key := range read(t, b, ownerIndexSpace) {
		require.NoError(t, b.Apply(context.Background(), backend.Change{Key: []byte(key), Expect: 1,
			Delete: true}))
		break
	}
	s := newStoreOn(t, b)
	defer s.Close()
	requireIndexed(t, b)
}
