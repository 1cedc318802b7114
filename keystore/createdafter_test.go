package keystore

import (
	"context"
	"iter"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A readCounter counts the entries that scans yield.
type readCounter struct {
	backend.Backend
	read atomic.Int64
}

func (b *readCounter) count(all iter.Seq2[backend.Entry, error]) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range all {
			b.read.Add(1)
			if !yield(e, err) {
				return
			}
		}
	}
}

func (b *readCounter) Scan(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	return b.count(b.Backend.Scan(ctx, from, to))
}

func (b *readCounter) ScanDown(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	return b.count(b.Backend.(backend.DownScanner).ScanDown(ctx, from, to))
}

// keyOf stores a key with an ID of one time, and a CreatedAt of another.
func keyOf(t *testing.T, b backend.Backend, id, created time.Time, spec Spec) {
	t.Helper()
	key := token.First(id)
	key[15] = 1 // as a new ID has random bits
	value, err := record.Encode(newRecord(spec, "oil", hashing.SHA256().Digest("x"), created))
	require.NoError(t, err)
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: storageKey(key), Value: value}))
}

// With CreatedAfter, a list reads only the keys that it yields, however many older keys there are.
func TestCreatedAfterSeeks(t *testing.T) {
	b := &readCounter{Backend: backendtest.NewMemory()}
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(minute int) time.Time { return start.Add(time.Duration(minute) * time.Minute) }
	for i := range 1000 {
		keyOf(t, b, at(i), at(i), Spec{Name: "n", Owner: []string{"acme", "ajax"}[i%2]})
	}
	s, err := New(b, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	for _, newest := range []bool{false, true} {
		for owner, want := range map[string]int{"": 20, "acme": 10} {
			before := b.read.Load()
			q := Query{CreatedAfter: at(979), Owner: owner, Newest: newest}
			n, err := s.Count(t.Context(), q)
			require.NoError(t, err)
			require.Equal(t, want, n)
			require.LessOrEqual(t, b.read.Load()-before, int64(want+1), "read %+v", q)
		}
	}
}

// The time of an ID and CreatedAt are of two looks at the clock, which may differ.
func TestCreatedAfterFindsKeysOfACorrectedClock(t *testing.T) {
	b := backendtest.NewMemory()
	id := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	for i, differ := range []time.Duration{
		maxLead - 1, time.Millisecond, 1, 0, -1, -time.Millisecond, -time.Hour, -9999 * time.Hour,
	} {
		made := id.Add(time.Duration(i) * time.Minute)
		created := made.Add(differ)
		keyOf(t, b, made, created, Spec{Name: "n", Owner: "acme"})
	}
	s, err := New(b, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	for key, err := range s.List(t.Context(), Query{}) {
		require.NoError(t, err)
		for _, owner := range []string{"", "acme"} {
			for shift, want := range map[time.Duration]bool{
				-1: true, 0: false, -time.Hour: true, time.Hour: false,
			} {
				found := false
				q := Query{Owner: owner, CreatedAfter: key.CreatedAt.Add(shift)}
				for k, err := range s.List(t.Context(), q) {
					require.NoError(t, err)
					found = found || k.ID == key.ID
				}
				require.Equal(t, want, found, "%s with %+v", key.CreatedAt, q)
			}
		}
	}
}

// CreatedAt is less than maxLead after the time of the ID, also if the clock was set back before
// the store was opened, so that the stamps of events are ahead of the clock.
func TestCreatedAtIsNotFarAfterTheTimeOfTheID(t *testing.T) {
	for _, ahead := range []time.Duration{0, maxLead / 2, time.Minute, 1000 * time.Hour} {
		b := backendtest.NewMemory()
		event, err := record.EncodeEvent(&record.Event{
			KeyId: make([]byte, 16), Revision: 1, Action: record.Action_ACTION_UPDATE,
		})
		require.NoError(t, err)
		stamp := time.Now().Add(ahead).UnixNano()
		require.NoError(t, b.Apply(t.Context(), backend.Change{Key: eventKey(stamp), Value: event}))
		s, err := New(b, nil)
		require.NoError(t, err)
		for range 10 {
			issued, err := s.Create(t.Context(), Spec{Name: "n"})
			require.NoError(t, err)
			id, ok := token.ParseID(issued.Key.ID)
			require.True(t, ok)
			require.Less(t, issued.Key.CreatedAt, id.Time().Add(maxLead))
			q := Query{CreatedAfter: issued.Key.CreatedAt.Add(-1)}
			found := false
			for k, err := range s.List(t.Context(), q) {
				require.NoError(t, err)
				found = found || k.ID == issued.Key.ID
			}
			require.True(t, found)
		}
		require.NoError(t, s.CheckIntegrity(t.Context()))
		require.NoError(t, s.Close())
	}
}
