package badlink

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A good network changes nothing.
func TestGoodNetwork(t *testing.T) {
	backendtest.Run(t, func(*testing.T) backend.Backend { return Open(backendtest.NewShared()) })
}

// An engine opens links.
type engine struct{ *backendtest.Shared }

func (e engine) Open() backend.Feeder { return Open(e.Shared) }

func TestGoodNetworkOfFeeds(t *testing.T) {
	backendtest.RunFeed(t,
		func(*testing.T) backendtest.Engine { return engine{backendtest.NewShared()} })
}

// get returns the revision of the key k, 0 if there is none.
func get(t *testing.T, b backend.Backend) uint64 {
	e, err := b.Get(t.Context(), []byte("k"))
	if !errors.Is(err, backend.ErrNotFound) {
		require.NoError(t, err)
	}
	return e.Revision
}

func write(b backend.Backend, expect uint64, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return b.Apply(ctx, backend.Change{Key: []byte("k"), Expect: expect})
}

func TestFaultsOfCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := backendtest.NewShared()
		direct, l := s.Open(), Open(s)

		l.Set(Faults{Drop: true})
		require.ErrorIs(t, write(l, 0, time.Second), context.DeadlineExceeded)
		require.Zero(t, get(t, direct), "the request was dropped")
		time.AfterFunc(time.Second, func() { l.Set(Faults{}) })
		require.NoError(t, write(l, 0, time.Minute), "the request reaches the engine after all")
		require.EqualValues(t, 1, get(t, l))

		l.Set(Faults{LoseAnswers: true})
		require.ErrorIs(t, write(l, 1, time.Second), context.DeadlineExceeded)
		require.EqualValues(t, 2, get(t, direct), "only the answer was lost")

		l.Set(Faults{Delay: time.Minute})
		require.ErrorIs(t, write(l, 2, time.Second), context.DeadlineExceeded)
		require.EqualValues(t, 2, get(t, direct))
		require.NoError(t, l.Close())
		l.Wait()
		require.EqualValues(t, 3, get(t, direct), "the change arrived late")
		require.ErrorIs(t, write(l, 3, time.Second), backend.ErrClosed)
	})
}

func TestFaultsOfFeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := backendtest.NewShared()
		direct, l := s.Open(), Open(s)
		yielded, ended := make(chan backend.Batch, 10), make(chan error)
		feed := func(after backend.Position) {
			for b, err := range l.Feed(context.Background(), nil, nil, after) {
				if err != nil {
					ended <- err
					return
				}
				yielded <- b
			}
		}
		go feed(0)
		start := (<-yielded).Position
		l.Set(Faults{Silent: true})
		require.NoError(t, write(direct, 0, time.Second))
		require.NoError(t, write(direct, 1, time.Second))
		time.Sleep(time.Hour)
		require.Empty(t, yielded)
		l.Set(Faults{})
		require.Equal(t, start+1, (<-yielded).Position)
		require.Equal(t, start+2, (<-yielded).Position)

		l.Set(Faults{FeedDelay: time.Minute})
		begin := time.Now()
		require.NoError(t, write(direct, 2, time.Second))
		require.Equal(t, start+3, (<-yielded).Position)
		require.Equal(t, time.Minute, time.Since(begin))

		wrong := errors.New("wrong")
		l.Set(Faults{FeedError: wrong})
		require.NoError(t, write(direct, 3, time.Second))
		require.ErrorIs(t, <-ended, wrong)
		l.Set(Faults{})
		go feed(start + 3)
		require.Equal(t, start+4, (<-yielded).Position)
		l.Set(Faults{Silent: true})
		require.NoError(t, write(direct, 4, time.Second))
		require.NoError(t, l.Close())
		require.ErrorIs(t, <-ended, backend.ErrClosed)
	})
}

// The hooks run around the calls.
func TestHooks(t *testing.T) {
	s := backendtest.NewShared()
	l := Open(s)
	var steps []string
	l.OnApply = func(
		ctx context.Context, changes []backend.Change, next func(context.Context) error,
	) error {
		steps = append(steps, "before "+string(changes[0].Key))
		defer func() { steps = append(steps, "after "+string(changes[0].Key)) }()
		return next(ctx)
	}
	l.OnGet = func(
		ctx context.Context, key []byte, next func(context.Context) (backend.Entry, error),
	) (backend.Entry, error) {
		steps = append(steps, "get "+string(key))
		return next(ctx)
	}
	l.OnBatch = func(context.Context, backend.Batch) { steps = append(steps, "batch") }
	require.NoError(t, write(l, 0, time.Minute))
	require.EqualValues(t, 1, get(t, l))
	for _, err := range l.Feed(t.Context(), nil, nil, 0) {
		require.NoError(t, err)
		break
	}
	require.Equal(t, []string{"before k", "after k", "get k", "batch"}, steps)
	require.NoError(t, l.Close())
}

// A process that is stopped makes no call, and no call returns.
func TestStoppedProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := backendtest.NewShared()
		direct, l := s.Open(), Open(s)
		stopped := func(during Faults, expect uint64) time.Duration {
			l.Set(during)
			begin := time.Now()
			time.AfterFunc(time.Second, func() {
				during.Stopped = true
				l.Set(during)
			})
			time.AfterFunc(time.Hour, func() { l.Set(Faults{}) })
			_ = write(l, expect, time.Minute)
			return time.Since(begin)
		}
		require.Equal(t, time.Hour, stopped(Faults{Drop: true}, 0))
		require.Zero(t, get(t, direct))
		require.Equal(t, time.Hour, stopped(Faults{LoseAnswers: true}, 0))
		require.EqualValues(t, 1, get(t, direct))
		require.Equal(t, time.Hour, stopped(Faults{Delay: 2 * time.Second}, 1))
		require.EqualValues(t, 2, get(t, direct), "the request was on its way")
	})
}

// A feed that MuteFeeds has silenced stays silent. The next feed does not.
func TestMuteFeeds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := backendtest.NewShared()
		direct, l := s.Open(), Open(s)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		for b, err := range l.Feed(ctx, nil, nil, 0) {
			if err != nil {
				require.ErrorIs(t, err, context.Canceled)
				break
			}
			require.Empty(t, b.Changes)
			l.MuteFeeds()
			require.NoError(t, write(direct, 0, time.Second))
			time.AfterFunc(time.Hour, cancel)
		}
		for b, err := range l.Feed(t.Context(), nil, nil, s.Last()-1) {
			require.NoError(t, err)
			require.Equal(t, s.Last(), b.Position)
			break
		}
	})
}
