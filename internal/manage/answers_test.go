package manage_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	request = manage.Request{Actor: "key:a", Method: "/Create", ID: "1"}
	content = sha256.Sum256([]byte("content"))
	errCall = errors.New("the call failed")
)

// value returns a call that returns v, and counts the calls.
func value(v any, calls *int) func() (any, error) {
	return func() (any, error) { *calls++; return v, nil }
}

func TestARepeatGetsTheSameAnswer(t *testing.T) {
	a := manage.NewAnswers()
	defer a.Close()
	calls := 0
	for range 3 {
		got, err := a.Do(t.Context(), request, content, value("secret", &calls))
		require.NoError(t, err)
		require.Equal(t, "secret", got)
	}
	require.Equal(t, 1, calls)

	_, err := a.Do(t.Context(), request, sha256.Sum256(nil), value("other", &calls))
	require.ErrorIs(t, err, manage.ErrRequestReused)
	require.Equal(t, 1, calls)

	for _, other := range []manage.Request{
		{Actor: "key:b", Method: request.Method, ID: request.ID},
		{Actor: request.Actor, Method: "/Rotate", ID: request.ID},
		{Actor: request.Actor, Method: request.Method, ID: "2"},
	} {
		got, err := a.Do(t.Context(), other, sha256.Sum256(nil), value("other", &calls))
		require.NoError(t, err)
		require.Equal(t, "other", got, "%+v is another request", other)
	}
}

func TestAnAnswerIsKeptForTenMinutes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := manage.NewAnswers()
		calls := 0
		do := func(id string) {
			_, err := a.Do(t.Context(), manage.Request{ID: id}, content, value("secret", &calls))
			require.NoError(t, err)
		}
		do("1")
		time.Sleep(5 * time.Minute)
		do("2")
		time.Sleep(5*time.Minute - time.Nanosecond)
		do("1")
		require.Equal(t, 2, calls)
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.Equal(t, 1, manage.Kept(a), "nobody has called, and the first answer is gone")
		do("1")
		do("2")
		require.Equal(t, 3, calls)
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		require.Zero(t, manage.Kept(a))
		do("2")
		require.Equal(t, 4, calls)
		a.Close()
		require.Zero(t, manage.Kept(a), "Close drops all")
		_, err := a.Do(t.Context(), request, content, value("secret", &calls))
		require.ErrorIs(t, err, keystore.ErrClosed)
	})
}

// A repeat of a request that is in progress waits for the answer. If the call fails, one of those
// who wait makes the call.
func TestARepeatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := manage.NewAnswers()
		defer a.Close()
		fail, answer := make(chan struct{}), make(chan struct{})
		calls := 0
		first := make(chan error, 1)
		go func() {
			_, err := a.Do(t.Context(), request, content, func() (any, error) {
				calls++
				<-fail
				return nil, errCall
			})
			first <- err
		}()
		synctest.Wait()
		require.Equal(t, 1, calls)
		const waiting = 10
		results := make(chan any, waiting)
		for range waiting {
			go func() {
				got, err := a.Do(t.Context(), request, content, func() (any, error) {
					calls++
					<-answer
					return "secret", nil
				})
				results <- got
				if err != nil {
					results <- err
				}
			}()
		}
		impatient, cancel := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() {
			_, err := a.Do(impatient, request, content, value("other", &calls))
			gone <- err
		}()
		_, err := a.Do(t.Context(), request, sha256.Sum256(nil), value("other", &calls))
		require.ErrorIs(t, err, manage.ErrRequestReused, "also while the call is in progress")
		synctest.Wait()
		require.Equal(t, 1, calls, "the others wait")
		cancel()
		require.ErrorIs(t, <-gone, context.Canceled)
		close(fail)
		require.ErrorIs(t, <-first, errCall)
		synctest.Wait()
		require.Equal(t, 2, calls, "one of the others makes the call")
		close(answer)
		for range waiting {
			require.Equal(t, "secret", <-results)
		}
		require.Equal(t, 2, calls)
	})
}

func TestAnswersAreBounded(t *testing.T) {
	a := manage.NewAnswers()
	defer a.Close()
	calls := 0
	id := func(n int) manage.Request { return manage.Request{ID: fmt.Sprint(n)} }
	for n := range manage.MaxAnswers + 1 {
		_, err := a.Do(t.Context(), id(n), content, value(n, &calls))
		require.NoError(t, err)
	}
	require.Equal(t, manage.MaxAnswers, manage.Kept(a))
	got, err := a.Do(t.Context(), id(1), content, value(-1, &calls))
	require.NoError(t, err)
	require.Equal(t, 1, got)
	got, err = a.Do(t.Context(), id(0), content, value(-1, &calls))
	require.NoError(t, err)
	require.Equal(t, -1, got, "the oldest answer is gone")
}

func TestTooManyRequestsAreInProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := manage.NewAnswers()
		end := make(chan struct{})
		for n := range manage.MaxAnswers {
			go func() {
				_, _ = a.Do(t.Context(), manage.Request{ID: fmt.Sprint(n)}, content,
					func() (any, error) { <-end; return n, nil })
			}()
		}
		synctest.Wait()
		_, err := a.Do(t.Context(), request, content, nil)
		require.ErrorIs(t, err, manage.ErrManyRequests)
		a.Close() // while the calls are in progress: no answer is kept
		close(end)
		synctest.Wait()
		require.Zero(t, manage.Kept(a))
	})
}

func TestACallThatPanicsLeavesNothing(t *testing.T) {
	a := manage.NewAnswers()
	defer a.Close()
	require.PanicsWithValue(t, "mine", func() {
		_, _ = a.Do(t.Context(), request, content, func() (any, error) { panic("mine") })
	})
	require.Zero(t, manage.Kept(a))
}
