package backendtest

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestShared(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewShared().Open() })
}

// Two handles see the same entries. Close ends only the calls and the feeds of its own handle, and
// leaves no goroutine behind: otherwise the bubble would not end.
func TestSharedHandles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewShared()
		a, b := s.Open(), s.Open()
		ended := make(chan error, 2)
		yielded := make(chan backend.Batch, 10)
		feed := func(f backend.Feeder, ctx context.Context) {
			for batch, err := range f.Feed(ctx, nil, nil, 0) {
				if err != nil {
					ended <- err
					return
				}
				yielded <- batch
			}
		}
		cancelled, cancel := context.WithCancel(ctx)
		go feed(a, ctx)
		go feed(b, cancelled)
		synctest.Wait()
		require.Empty(t, (<-yielded).Changes)
		require.Empty(t, (<-yielded).Changes)
		for n := range 3 {
			put(t, a, fmt.Sprint(n), "v", 0)
			requireEntry(t, b, fmt.Sprint(n), "v", 1)
		}
		synctest.Wait()
		require.Len(t, yielded, 6)
		require.NoError(t, a.Close())
		require.ErrorIs(t, <-ended, backend.ErrClosed)
		requireEntry(t, b, "0", "v", 1)
		cancel()
		require.ErrorIs(t, <-ended, context.Canceled)
		require.NoError(t, b.Close())
		requireEntry(t, s.Open(), "0", "v", 1)
	})
}

// A Feed resumes at the end of a trimmed log, and not before.
func TestSharedTrim(t *testing.T) {
	s := NewShared()
	f := s.Open()
	start := s.Last()
	for _, err := range f.Feed(ctx, nil, nil, 0) {
		require.NoError(t, err)
		break
	}
	put(t, f, "k", "v", 0)
	put(t, f, "k", "w", 1)
	s.Trim()
	for after := start; after < s.Last(); after++ {
		for b, err := range f.Feed(ctx, nil, nil, after) {
			require.ErrorIs(t, err, backend.ErrGap)
			require.Zero(t, b)
		}
	}
	last := s.Last()
	put(t, f, "k", "x", 2)
	for b, err := range f.Feed(ctx, nil, nil, last) {
		require.NoError(t, err)
		require.Equal(t, last+1, b.Position)
		require.Equal(t, []backend.Entry{{Key: []byte("k"), Value: []byte("x"), Revision: 3}},
			b.Changes)
		break
	}
}
