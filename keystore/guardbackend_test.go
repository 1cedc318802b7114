package keystore

import (
	"context"
	"iter"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A guard has the optional methods that the guarded backend has, and no other.
func TestGuardKeepsOptionalMethods(t *testing.T) {
	memory, shared := backendtest.NewMemory(), backendtest.NewShared().Open()
	for name, tt := range map[string]struct {
		b              backend.Backend
		scanDown, feed bool
	}{
		"neither":  {struct{ backend.Backend }{memory}, false, false},
		"ScanDown": {memory, true, false},
		"Feed":     {struct{ backend.Feeder }{shared}, false, true},
		"both":     {shared, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			g := guardBackend(tt.b, newPanics(slog.New(slog.DiscardHandler)))
			_, ok := tt.b.(backend.AllGetter)
			require.Equal(t, ok, allGetterOf(g) != nil)
			_, ok = g.(backend.DownScanner)
			require.Equal(t, tt.scanDown, ok)
			feeder, ok := g.(backend.Feeder)
			require.Equal(t, tt.feed, ok)
			if !ok {
				return
			}
			var last backend.Position
			for b, err := range feeder.Feed(t.Context(), nil, nil, 0) {
				require.NoError(t, err)
				if last != 0 {
					require.Greater(t, b.Position, last)
					require.Equal(t, name, string(b.Changes[0].Key))
					break
				}
				last = b.Position
				require.NoError(t, g.Apply(t.Context(), backend.Change{Key: []byte(name)}))
			}
		})
	}
}

// A panickyFeed panics after each Batch.
type panickyFeed struct{ backend.Feeder }

func (f panickyFeed) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			if !yield(b, err) {
				return
			}
			panic("the feed is broken")
		}
	}
}

// A panic of a Feed ends the Feed with an error. A panic of the loop body belongs to the caller.
func TestGuardedFeedPanics(t *testing.T) {
	shared := backendtest.NewShared()
	g := guardBackend(panickyFeed{shared.Open()}, newPanics(slog.New(slog.DiscardHandler)))
	feed := g.(backend.Feeder).Feed(t.Context(), nil, nil, 0)
	var errs []error
	for b, err := range feed {
		require.Equal(t, err != nil, b.Position == 0)
		errs = append(errs, err)
	}
	require.Equal(t, []error{nil, errPanicked}, errs)
	require.PanicsWithValue(t, "body", func() {
		for range feed {
			panic("body")
		}
	})
	for range feed {
		break
	}
}

// A panickyGetter panics, or returns too few entries.
type panickyGetter struct {
	backend.Backend
	panics bool
}

func (g panickyGetter) GetAll(context.Context, [][]byte) ([]backend.Entry, error) {
	if g.panics {
		panic("GetAll is broken")
	}
	return []backend.Entry{{}}, nil
}

// A panic of GetAll, and an answer that lacks an entry, are errors.
func TestGuardedGetAll(t *testing.T) {
	for _, panics := range []bool{true, false} {
		g := guardBackend(panickyGetter{backendtest.NewMemory(), panics},
			newPanics(slog.New(slog.DiscardHandler)))
		all := allGetterOf(g)
		found, err := all.GetAll(t.Context(), [][]byte{[]byte("a"), []byte("b")})
		require.Error(t, err)
		require.Nil(t, found)
	}
}
