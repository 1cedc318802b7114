package keystore

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A slowStorage has one entry of each key. A read returns the revision from the beginning of the
// read, after the test has let the read end.
type slowStorage struct {
	revision atomic.Uint64
	reads    atomic.Int64
	end      chan error // the result of a read
}

func (s *slowStorage) get(ctx context.Context, _ token.ID) (backend.Entry, error) {
	s.reads.Add(1)
	e := backend.Entry{Revision: s.revision.Load()}
	select {
	case err := <-s.end:
		return e, err
	case <-ctx.Done():
		return e, ctx.Err()
	}
}

func noLimit(ctx context.Context) (context.Context, context.CancelFunc) { return ctx, func() {} }

// numberedID returns one of many IDs.
func numberedID(n int) (id token.ID) {
	binary.BigEndian.PutUint64(id[:], uint64(n))
	return id
}

// Calls that arrive during a read share the next read, and get what the storage has after their
// arrival. Calls that arrive during the next read share the read after the next.
func TestReadsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStorage{end: make(chan error)}
		r := newSharedReads(s.get, noLimit)
		var calls sync.WaitGroup
		for round := range uint64(4) {
			s.revision.Store(round)
			calls.Go(func() {
				e, err := r.read(t.Context(), numberedID(1))
				if err != nil || e.Revision < round {
					t.Errorf("revision %d, %v: the call came after revision %d", e.Revision, err,
						round)
				}
			})
			synctest.Wait() // the first call of a round begins a read, or joins the next
			for range 20 {
				calls.Go(func() {
					e, err := r.read(t.Context(), numberedID(1))
					if err != nil || e.Revision < round {
						t.Errorf("revision %d, %v: the call came after revision %d", e.Revision, err,
							round)
					}
				})
			}
			synctest.Wait()
			s.end <- nil
			synctest.Wait()
		}
		s.end <- nil
		calls.Wait()
		synctest.Wait()
		require.EqualValues(t, 5, s.reads.Load(), "for 84 calls")
		require.Zero(t, r.running)
		require.Empty(t, r.next)
	})
}

// A call whose context ends leaves the others alone, and an error reaches each call of a read.
func TestASharedReadEndsForOneCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStorage{end: make(chan error)}
		r := newSharedReads(s.get, noLimit)
		results := make(chan error, 10)
		call := func(ctx context.Context) {
			go func() {
				_, err := r.read(ctx, numberedID(1))
				results <- err
			}()
			synctest.Wait()
		}
		first, cancelFirst := context.WithCancel(t.Context())
		second, cancelSecond := context.WithCancel(t.Context())
		call(first)
		call(second)
		call(t.Context())
		cancelSecond()
		require.ErrorIs(t, <-results, context.Canceled)
		cancelFirst()
		require.ErrorIs(t, <-results, context.Canceled)
		synctest.Wait()
		require.EqualValues(t, 2, s.reads.Load(), "the read of the third call has begun")
		call(t.Context())
		broken := errors.New("broken")
		s.end <- broken
		require.ErrorIs(t, <-results, broken)
		s.end <- nil
		require.NoError(t, <-results)
		require.EqualValues(t, 3, s.reads.Load())
	})
}

func TestReadsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStorage{end: make(chan error)}
		r := newSharedReads(s.get, noLimit)
		var calls sync.WaitGroup
		read := func(n int) {
			calls.Go(func() {
				if _, err := r.read(t.Context(), numberedID(n)); err != nil {
					t.Error(err)
				}
			})
		}
		for n := range maxReads {
			read(n)
		}
		synctest.Wait()
		_, err := r.read(t.Context(), numberedID(maxReads))
		require.ErrorIs(t, err, ErrUnavailable)
		require.EqualError(t, err, "API key store unavailable: 256 reads of the storage are "+
			"running: try again later")
		read(0) // waits for a read that will run
		synctest.Wait()
		for range maxReads + 1 {
			s.end <- nil
		}
		calls.Wait()
		synctest.Wait()
		require.Zero(t, r.running)
	})
}

// close waits for the shared reads, and no call waits for good.
func TestReadsEndWithClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowStorage{end: make(chan error)}
		r := newSharedReads(s.get, noLimit)
		results, closed := make(chan error, 10), make(chan struct{})
		for range 2 {
			go func() {
				_, err := r.read(t.Context(), numberedID(1))
				results <- err
			}()
			synctest.Wait()
		}
		s.end <- nil
		require.NoError(t, <-results)
		go func() {
			_, err := r.read(t.Context(), numberedID(1))
			results <- err
		}()
		synctest.Wait()
		go func() {
			r.close()
			close(closed)
		}()
		synctest.Wait()
		select {
		case <-closed:
			require.Fail(t, "close has not waited")
		default:
		}
		s.end <- ErrClosed
		<-closed
		require.ErrorIs(t, <-results, ErrClosed)
		require.ErrorIs(t, <-results, ErrClosed)
	})
}

// Many calls with one uncached key make few reads of the storage.
func TestAHerdOfMissesReadsTwice(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		m := f.open(nil)
		issued := m.create(Spec{})
		reads := 0 // the clients run one after the other while the storage answers
		m.link.OnGet = func(ctx context.Context, key []byte,
			next func(context.Context) (backend.Entry, error)) (backend.Entry, error) {
			if key[0] == keySpace {
				reads++
				time.Sleep(time.Millisecond)
			}
			return next(ctx)
		}
		var calls sync.WaitGroup
		for range 100 {
			calls.Go(func() {
				if err := m.uses(issued); err != nil {
					t.Error(err)
				}
			})
		}
		calls.Wait()
		require.Equal(t, 2, reads)
	})
}
