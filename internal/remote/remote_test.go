package remote_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestCloseEndsAndWaitsForCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := remote.NewCalls()
		joined, end, err := calls.Begin(t.Context())
		require.NoError(t, err)
		followed, stop, err := calls.Join(t.Context())
		require.NoError(t, err)
		defer stop()
		release := make(chan struct{})
		calls.Go(func() {
			<-calls.Context().Done()
			<-release
		})
		require.NoError(t, calls.Ended(t.Context()))

		closed := make(chan struct{})
		go func() {
			calls.Close()
			close(closed)
		}()
		synctest.Wait()
		require.Error(t, joined.Err())
		require.Error(t, followed.Err())
		require.ErrorIs(t, calls.Ended(t.Context()), backend.ErrClosed)
		require.False(t, isClosed(closed), "a call and a goroutine run")
		end()
		synctest.Wait()
		require.False(t, isClosed(closed), "a goroutine runs")
		close(release)
		synctest.Wait()
		require.True(t, isClosed(closed))

		_, _, err = calls.Begin(t.Context())
		require.ErrorIs(t, err, backend.ErrClosed)
		_, _, err = calls.Join(t.Context())
		require.ErrorIs(t, err, backend.ErrClosed)
		calls.Close()
	})
}

func TestCallEndsWithTheContextOfTheCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := remote.NewCalls()
		ctx, cancel := context.WithCancel(t.Context())
		joined, end, err := calls.Begin(ctx)
		require.NoError(t, err)
		cancel()
		synctest.Wait()
		require.ErrorIs(t, joined.Err(), context.Canceled)
		end()

		_, _, err = calls.Begin(ctx)
		require.ErrorIs(t, err, context.Canceled)
		calls.Close()
		require.ErrorIs(t, calls.Ended(ctx), context.Canceled, "the caller's reason comes first")
	})
}

// A lateContext runs a function when Begin has found the Backend open, and before Begin counts the
// call.
type lateContext struct {
	context.Context
	run func()
}

func (c lateContext) Done() <-chan struct{} {
	c.run()
	return c.Context.Done()
}

func TestCloseWhileACallBegins(t *testing.T) {
	calls := remote.NewCalls()
	_, _, err := calls.Begin(lateContext{t.Context(), sync.OnceFunc(calls.Close)})
	require.ErrorIs(t, err, backend.ErrClosed, "Close has returned before the call was counted")
}

// A panicking is a slog.Handler with a bug.
type panicking struct{ slog.Handler }

func (panicking) Enabled(context.Context, slog.Level) bool { panic("a bug of a handler") }

func TestLoggerDropsThePanicOfAHandler(t *testing.T) {
	require.NotPanics(t, func() {
		remote.Logger{}.Log(slog.LevelInfo, "text")
		remote.Logger{To: slog.New(panicking{})}.Log(slog.LevelInfo, "text")
	})
}

func TestSleepEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		remote.Sleep(t.Context(), time.Minute)
		require.Equal(t, time.Minute, time.Since(start))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		remote.Sleep(ctx, time.Hour)
		require.Equal(t, time.Minute+time.Second, time.Since(start))
	})
}

func TestErrorUnwraps(t *testing.T) {
	reason := errors.New("reason")
	err := error(&remote.Error{Text: "what to do", Err: reason})
	require.EqualError(t, err, "what to do")
	require.ErrorIs(t, err, reason)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
