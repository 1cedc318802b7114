package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A together backend is a backend.AllGetter, as the store's own directory is. The tests run in a
// bubble, where no minute ends, so the background does not use the backend at the same time.
type together struct {
	backend.Backend
	after func() // called after each GetAll has read; nil: none
	read  []int  // the number of keys of each GetAll
	fails error  // what GetAll returns; nil: the entries
}

func (b *together) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	b.read = append(b.read, len(keys))
	if b.fails != nil {
		return nil, b.fails
	}
	all := make([]backend.Entry, len(keys))
	for i, key := range keys {
		e, err := b.Get(ctx, key)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return nil, err
		}
		all[i] = e
	}
	if b.after != nil {
		b.after()
	}
	return all, nil
}

func (b *together) ScanDown(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	return b.Backend.(open).Backend.(backend.DownScanner).ScanDown(ctx, from, to)
}

// newStoreTogether opens a store that reads several keys at a time. The backend stays open.
func newStoreTogether(t *testing.T, b backend.Backend) (*Store, *together) {
	t.Helper()
	all := &together{Backend: open{b}}
	s, err := newStore(nil)
	require.NoError(t, err)
	require.NoError(t, s.start(all))
	return s, all
}

// outcomes returns what a list yields, as text.
func outcomes(t *testing.T, s *Store, q Query) (all []string) {
	t.Helper()
	for k, err := range s.List(t.Context(), q) {
		text := fmt.Sprint(err)
		if err == nil {
			text = fmt.Sprintf("%+v", *k)
			text = text[strings.Index(text, " ID:"):] // the first field is a pointer
		} else {
			require.Nil(t, k)
		}
		all = append(all, text)
	}
	return all
}

// A list by owner yields the same, in the same order, whether the store reads the keys together or
// one by one: with any query, with used keys, and with damage of every kind.
func TestListReadsKeysTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		b := backendtest.NewMemory()
		s, all := newStoreTogether(t, b)
		defer s.Close()
		random := rand.New(rand.NewPCG(1, 2))
		var ids []string
		var secrets []Secret
		for i := range 5 * maxTogether {
			issued, err := s.Create(ctx, Spec{Name: fmt.Sprint("n", i), Owner: "o"})
			require.NoError(t, err)
			ids = append(ids, issued.Key.ID)
			secrets = append(secrets, issued.Secret)
		}
		use := func(n int) {
			t.Helper()
			for range n {
				_, err := s.Verify(ctx, secrets[random.IntN(len(secrets))].Reveal())
				require.NoError(t, err)
			}
		}
		use(20)
		s.usage.minute.Add(-9)
		require.NoError(t, s.flushUsage(ctx))
		use(20)
		session, err := s.Bind(ctx, secrets[3].Reveal())
		require.NoError(t, err)
		defer session.Close()

		same := func() {
			t.Helper()
			for _, q := range []Query{
				{Owner: "o"},
				{Owner: "o", Newest: true},
				{Owner: "o", Limit: 1},
				{Owner: "o", Limit: maxTogether + 1},
				{Owner: "o", Cursor: ids[5]},
				{Owner: "o", Cursor: ids[40], Newest: true, Limit: 3},
				{Owner: "o", Text: "n1", Limit: 5},
				{Owner: "o", Status: StatusRevoked},
				{Owner: "nobody"},
			} {
				all.fails = backend.ErrCorrupt // the store then reads one by one
				want := outcomes(t, s, q)
				wantN, wantErr := s.Count(ctx, q)
				all.fails, all.read = nil, nil
				require.Equal(t, want, outcomes(t, s, q))
				require.Equal(t, q.Owner == "o" && q.Limit != 1, len(all.read) > 0)
				n, err := s.Count(ctx, q)
				require.Equal(t, wantN, n)
				require.Equal(t, fmt.Sprint(wantErr), fmt.Sprint(err))
			}
		}
		same()
		for i, id := range ids {
			if random.IntN(4) == 0 {
				require.NoError(t, s.Revoke(ctx, id, ""))
			}
			if i%7 == 0 {
				_, err := s.Rotate(ctx, id, time.Hour)
				if !errors.Is(err, ErrKeyRevoked) {
					require.NoError(t, err)
				}
			}
		}
		time.Sleep(time.Millisecond) // the revocations are in the past
		_, err = s.Purge(ctx, time.Now())
		require.NoError(t, err)
		same()

		damage := func(key []byte, value string) {
			t.Helper()
			e, err := b.Get(ctx, key)
			if !errors.Is(err, backend.ErrNotFound) {
				require.NoError(t, err)
			}
			require.NoError(t, b.Apply(ctx, backend.Change{Key: key, Value: []byte(value),
				Expect: e.Revision}))
		}
		left := listed(t, s, Query{Owner: "o"})
		for i, k := range left {
			id, err := parseID("", k.ID)
			require.NoError(t, err)
			switch i % 9 {
			case 2:
				damage(storageKey(id), "nonsense")
			case 4:
				damage(usageKey(id), strings.Repeat("\xff", 20))
			case 5:
				damage(append(ownerKey("o", id), 0), "")
			case 6:
				damage(ownerKey("o", id), "x")
			}
		}
		same()
	})
}

// A list that ends early reads no further group, and a Limit bounds the reads.
func TestListReadsTogetherOnlyWhatItNeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		s, all := newStoreTogether(t, backendtest.NewMemory())
		defer s.Close()
		for range 3 * maxTogether {
			_, err := s.Create(ctx, Spec{Name: "n", Owner: "o"})
			require.NoError(t, err)
		}
		n := 0
		for _, err := range s.List(ctx, Query{Owner: "o"}) {
			require.NoError(t, err)
			if n++; n == 3 {
				break
			}
		}
		require.Equal(t, []int{2 * maxTogether}, all.read)
		all.read = nil
		require.Len(t, listed(t, s, Query{Owner: "o", Limit: 3}), 3)
		require.Equal(t, []int{2 * 3}, all.read)
		all.read = nil
		n, err := s.Count(ctx, Query{Owner: "o"})
		require.NoError(t, err)
		require.Equal(t, 3*maxTogether, n)
		require.Equal(t, []int{maxTogether, maxTogether, maxTogether}, all.read,
			"a count needs no last use")
	})
}

// Uses move to the backend, and sessions end, after a list has read the backend. The list misses no
// use.
func TestListReadsTogetherWhileUsesAreWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		s, all := newStoreTogether(t, backendtest.NewMemory())
		defer s.Close()
		var sessions []*Session
		for i := range 8 {
			issued, err := s.Create(ctx, Spec{Name: "n", Owner: "o"})
			require.NoError(t, err)
			if i%2 == 0 {
				_, err = s.Verify(ctx, issued.Secret.Reveal())
				require.NoError(t, err)
				continue
			}
			session, err := s.Bind(ctx, issued.Secret.Reveal())
			require.NoError(t, err)
			sessions = append(sessions, session)
		}
		all.after = func() {
			for _, session := range sessions {
				session.Close()
			}
			for id := range s.usage.used {
				s.usage.used[id] -= 9 // so that the flush need not keep the uses of this minute
			}
			require.NoError(t, s.flushUsage(ctx))
			require.Empty(t, s.usage.used)
		}
		keys := listed(t, s, Query{Owner: "o"})
		require.Len(t, keys, 8)
		for _, k := range keys {
			require.NotZero(t, k.LastUsedAt)
		}
		require.Len(t, all.read, 1)
	})
}

// On a backend of several processes, a list by owner reads sixteen keys at the same time. The list
// has the order of the index, also if a key is damaged. A loop that ends leaves no read behind. A
// read whose goroutine the backend ends is an error.
func TestListReadsKeysAtTheSameTime(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		creator := f.open(nil)
		var ids []string
		for i := range 2*maxTogether + 3 {
			ids = append(ids, creator.create(Spec{Name: fmt.Sprint("n", i), Owner: "o"}).Key.ID)
		}
		damaged, ok := token.ParseID(ids[20])
		require.True(t, ok)
		var running, most atomic.Int64
		var ends atomic.Bool
		link := badlink.Open(f.shared)
		link.OnGet = func(ctx context.Context, key []byte,
			next func(context.Context) (backend.Entry, error),
		) (backend.Entry, error) {
			if key[0] != keySpace {
				return next(ctx)
			}
			most.Store(max(most.Load(), running.Add(1)))
			defer running.Add(-1)
			time.Sleep(time.Millisecond) // until all other goroutines wait
			switch {
			case ends.Load():
				runtime.Goexit()
			case bytes.Equal(key, storageKey(damaged)):
				return backend.Entry{}, backend.ErrCorrupt
			}
			return next(ctx)
		}
		s, err := New(struct{ backend.Feeder }{link}, f.options(nil)) // without GetAll
		require.NoError(t, err)
		defer s.Close()

		var listed []string
		for k, err := range s.List(ctx, Query{Owner: "o"}) {
			if err != nil {
				require.ErrorIs(t, err, ErrCorrupt)
				listed = append(listed, damaged.String())
				continue
			}
			listed = append(listed, k.ID)
		}
		require.Equal(t, ids, listed)
		require.EqualValues(t, maxTogether, most.Load())

		for k, err := range s.List(ctx, Query{Owner: "o"}) {
			require.NoError(t, err)
			require.Equal(t, ids[0], k.ID)
			break
		}
		require.Zero(t, running.Load())

		ends.Store(true)
		for _, err := range s.List(ctx, Query{Owner: "o"}) {
			require.ErrorIs(t, err, ErrUnavailable)
		}
	})
}
