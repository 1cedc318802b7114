package keystore

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/backupfile"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Callers who take credits at the same time never take the same credit. The harness would notice: a
// take that reads and writes in two steps fails it.
func TestTakersTakeEachCreditOnce(t *testing.T) {
	taken := func(take func(a *account, n int64) bool) (sum int64) {
		a := new(account)
		const all = 40_000
		a.left.Store(all)
		var total atomic.Int64
		var wg sync.WaitGroup
		for n := range 8 {
			cost := int64(n%3 + 1)
			wg.Go(func() {
				for take(a, cost) {
					total.Add(cost)
				}
				for take(a, 1) {
					total.Add(1)
				}
			})
		}
		wg.Wait()
		return total.Load() - all
	}
	require.Zero(t, taken((*account).take))
	require.Positive(t, taken(func(a *account, n int64) bool {
		left := a.left.Load()
		if left < n {
			return false
		}
		runtime.Gosched() // another goroutine takes here
		a.left.Store(left - n)
		return true
	}))
}

// isLease reports whether changes are a write of a balance alone: a lease, or what is given back.
func isLease(changes []backend.Change) bool {
	return len(changes) == 1 && changes[0].Key[0] == creditSpace
}

// spends spends one credit after the other until the key has none left, and returns how many.
func spends(t *testing.T, s *Session) (n int) {
	t.Helper()
	for {
		err := s.Spend(t.Context(), 1)
		if short := (*CreditsError)(nil); errors.As(err, &short) {
			return n
		}
		require.NoError(t, err)
		n++
	}
}

// Once SetCredits has returned in one process, another process spends nothing that it had leased
// before, not even in a session.
func TestSetCreditsVoidsTheLeasesOfOtherProcesses(t *testing.T) {
	spent := func(t *testing.T, f *fleet, wrong variant) int {
		a, b := f.open(nil), f.openWrong(nil, wrong)
		i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
		session := b.binds(i)
		for range 200 {
			require.NoError(t, session.Spend(t.Context(), 1))
		}
		require.Greater(t, b.accounts.find(b.accounts.list()[0].id).left.Load(), int64(10))
		require.NoError(t, a.SetCredits(t.Context(), i.Key.ID, &Credits{Remaining: 7}))
		require.NoError(t, session.Cause())
		return spends(t, session)
	}
	fleetTest(t, func(t *testing.T, f *fleet) { require.Equal(t, 7, spent(t, f, 0)) })
	fleetTest(t, func(t *testing.T, f *fleet) {
		require.Greater(t, spent(t, f, noCreditNote), 7, "the test would notice")
	})
}

// SetCredits comes while a lease is on its way to the storage, or while the answer is on its way
// back. The lease is then void, and at most the new credits are spent.
func TestSetCreditsDuringALease(t *testing.T) {
	for name, before := range map[string]bool{"before the write": true, "after the write": false} {
		t.Run(name, func(t *testing.T) {
			fleetTest(t, func(t *testing.T, f *fleet) {
				a, b := f.open(nil), f.open(nil)
				i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
				hold, held := make(chan struct{}), make(chan struct{})
				var once sync.Once
				b.onApply(func(ctx context.Context, changes []backend.Change,
					next func(context.Context) error) (err error) {
					if !isLease(changes) {
						return next(ctx)
					}
					if !before {
						err = next(ctx)
					}
					once.Do(func() { close(held); <-hold })
					if before {
						err = next(ctx)
					}
					return err
				})
				verified := make(chan error, 1)
				go func() { verified <- b.uses(i) }()
				<-held
				require.NoError(t, a.SetCredits(t.Context(), i.Key.ID, &Credits{Remaining: 5}))
				close(hold)
				n := 0
				if <-verified == nil {
					n++
				}
				n += admitted(t, b.Store, i)
				require.Equal(t, 5, n)
				require.Zero(t, admitted(t, a.Store, i))
			})
		})
	}
}

// A process loses contact, and the feed leaves out a SetCredits of another process. Afterwards a Key
// of an earlier Verify spends no credit that was leased before. Without SetCredits, no credit is
// lost.
func TestLeasesOverAGapInTheFeed(t *testing.T) {
	spent := func(t *testing.T, f *fleet, wrong variant, set bool) (n int) {
		a, b := f.open(nil), f.openWrong(nil, wrong)
		i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
		key, err := b.Verify(WithCost(t.Context(), 0), i.Secret.Reveal())
		require.NoError(t, err)
		for range 200 {
			require.NoError(t, key.Spend(t.Context(), 1))
		}
		require.Greater(t, b.accounts.list()[0].left.Load(), int64(10))
		b.inAGap(func() {
			require.ErrorIs(t, key.Spend(t.Context(), 1), ErrUnavailable)
			if set {
				require.NoError(t, a.SetCredits(t.Context(), i.Key.ID, &Credits{Remaining: 7}))
			}
		})
		for err = nil; err == nil; n++ {
			err = key.Spend(t.Context(), 1)
		}
		require.ErrorAs(t, err, new(*CreditsError))
		return n - 1
	}
	fleetTest(t, func(t *testing.T, f *fleet) { require.Equal(t, 7, spent(t, f, 0, true)) })
	fleetTest(t, func(t *testing.T, f *fleet) { require.Equal(t, 800, spent(t, f, 0, false)) })
	fleetTest(t, func(t *testing.T, f *fleet) {
		require.Greater(t, spent(t, f, noCreditHold, true), 7, "the test would notice")
	})
}

// A process leases for the callers that wait, unless what they cost is more than what remains.
func TestALeaseForCallersThatWait(t *testing.T) {
	for _, tt := range []struct {
		waiting waiters
		want    int64
	}{
		{waiters{1: 1}, 1},
		{waiters{1: 3, 5: 2}, 13},
		{waiters{1: 3, 1 << 53: 7}, 3},
		{waiters{1: 3, math.MaxInt64: 7}, 3},
		{waiters{1: 3, 100: 12}, 903},
		{waiters{1: 2000}, 1000},
		{waiters{1: 1 << 40}, 1000},
	} {
		a := &account{waiting: tt.waiting}
		b := &balance{Balance: &record.Balance{CreditsRevision: 1, Remaining: 1000}}
		l, write := a.plan(b, 1, time.Now())
		require.True(t, write)
		require.Equal(t, tt.want, l.size, "%v", tt.waiting)
		require.Equal(t, 1000-tt.want, b.Remaining)
	}
}

// What is given back does not raise a balance above the largest number of credits.
func TestGivenBackToAFullBalance(t *testing.T) {
	creditsTest(t, func(t *testing.T, s *Store) {
		i := withCredits(t, s, &Credits{Remaining: maxCredits})
		for range 300 {
			_, err := s.Verify(t.Context(), i.Secret.Reveal())
			require.NoError(t, err)
		}
		require.Positive(t, s.accounts.list()[0].left.Load())
		_, err := s.AddCredits(t.Context(), i.Key.ID, 300)
		require.NoError(t, err)
		for err == nil {
			_, err = s.AddCredits(t.Context(), i.Key.ID, 1)
		}
		require.ErrorIs(t, err, ErrInvalid)
		time.Sleep(5 * time.Minute)
		require.Equal(t, maxCredits, remaining(t, s, i))
		_, err = s.AddCredits(t.Context(), i.Key.ID, -1)
		require.NoError(t, err)
	})
}

// The answer of a write of the balance is lost, or the write is. No credit is lost or comes back,
// except if the process did not look whether its write was made.
func TestLostAnswersAboutCredits(t *testing.T) {
	const credits = 500
	run := func(t *testing.T, f *fleet, wrong variant, reaches bool) (verified int, stored int64) {
		a, b := f.openWrong(nil, wrong), f.open(nil)
		var n atomic.Int64
		a.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			if !isLease(changes) || n.Add(1)%2 == 0 {
				return next(ctx)
			}
			if reaches {
				if err := next(ctx); err != nil {
					t.Error(err)
				}
			}
			return errors.New("the answer is lost")
		})
		i := a.create(Spec{Credits: &Credits{Remaining: credits}})
		for range 100 {
			require.NoError(t, a.uses(i))
		}
		require.NoError(t, a.Close())
		synctest.Wait()
		return 100, remaining(t, b.Store, i)
	}
	for name, reaches := range map[string]bool{"answers": true, "writes": false} {
		t.Run(name, func(t *testing.T) {
			fleetTest(t, func(t *testing.T, f *fleet) {
				verified, stored := run(t, f, 0, reaches)
				require.EqualValues(t, credits, int64(verified)+stored)
			})
		})
	}
	fleetTest(t, func(t *testing.T, f *fleet) {
		verified, stored := run(t, f, blindCredits, true)
		require.NotEqual(t, int64(credits), int64(verified)+stored, "the test would notice")
	})
}

// While the storage is out of reach, nothing is admitted beyond the lease, and the refusal is no
// denial. Afterwards the key works again.
func TestCreditsWithoutTheStorage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		link := backendtest.NewMemory()
		s, err := New(&faulty{Backend: link, down: &down}, &Options{Timeout: time.Second})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		i := withCredits(t, s, &Credits{Remaining: 1000})
		for range 10 {
			_, err := s.Verify(t.Context(), i.Secret.Reveal())
			require.NoError(t, err)
		}
		down.Store(true)
		n := 10
		for err == nil {
			if _, err = s.Verify(t.Context(), i.Secret.Reveal()); err == nil {
				n++
			}
		}
		require.ErrorIs(t, err, ErrUnavailable)
		require.NotErrorIs(t, err, ErrDenied)
		require.Less(t, n, 1000)
		down.Store(false)
		require.Equal(t, 1000-n, admitted(t, s, i))
	})
}

// A faulty backend fails every call about balances while it is down.
type faulty struct {
	backend.Backend
	down *atomic.Bool
}

var errDown = errors.New("the storage is down")

func (b *faulty) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if key[0] == creditSpace && b.down.Load() {
		return backend.Entry{}, errDown
	}
	return b.Backend.Get(ctx, key)
}

// A caller who waits for a lease does not wait longer than its context, and many callers cost one
// lease.
func TestManyCallersWaitForOneLease(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a := f.open(nil)
		i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
		require.NoError(t, a.uses(i))
		hold := make(chan struct{})
		var leases atomic.Int64
		a.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			if isLease(changes) {
				leases.Add(1)
				<-hold
			}
			return next(ctx)
		})
		var wg sync.WaitGroup
		for range 64 {
			wg.Go(func() {
				if err := a.uses(i); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := a.Verify(ctx, i.Secret.Reveal())
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.EqualValues(t, 1, leases.Load())
		close(hold)
		wg.Wait()
		require.LessOrEqual(t, leases.Load(), int64(3))
		require.EqualValues(t, 1000-65, remaining(t, a.Store, i))
	})
}

func backedUp(t *testing.T, s *Store) []byte {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, s.Backup(t.Context(), &b))
	return b.Bytes()
}

func restoreInto(t *testing.T, s *Store, b []byte) {
	t.Helper()
	require.NoError(t, s.Restore(t.Context(), bytes.NewReader(b)))
}

// A backup has the balances. A Restore never raises what remains of a grant.
func TestRestoreOfCredits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		open := func() *Store {
			s, err := New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			return s
		}
		s := open()
		i := withCredits(t, s, &Credits{Remaining: 100, Refill: Refill{Amount: 90, Daily: true}})
		for range 10 {
			_, err := s.Verify(ctx, i.Secret.Reveal())
			require.NoError(t, err)
		}
		time.Sleep(5 * time.Minute) // what was leased is back
		early := backedUp(t, s)
		require.Equal(t, 90, admitted(t, s, i))
		restoreInto(t, s, early)
		require.Zero(t, admitted(t, s, i), "the store knows what was spent")
		late := backedUp(t, s)

		other := open()
		restoreInto(t, other, early)
		require.NoError(t, other.CheckIntegrity(ctx))
		require.EqualValues(t, 90, remaining(t, other, i))
		restoreInto(t, other, late)
		require.Zero(t, remaining(t, other, i), "the backup knows what was spent")

		_, err := s.AddCredits(ctx, i.Key.ID, 40)
		require.NoError(t, err)
		added := backedUp(t, s)
		restoreInto(t, other, added)
		require.EqualValues(t, 40, remaining(t, other, i), "a later grant")
		restoreInto(t, other, early)
		require.EqualValues(t, 40, remaining(t, other, i))
		time.Sleep(24 * time.Hour)
		require.Equal(t, 90, admitted(t, other, i))
		restoreInto(t, other, added)
		require.Zero(t, admitted(t, other, i), "the refill is later")

		require.NoError(t, s.SetCredits(ctx, i.Key.ID, nil))
		restoreInto(t, other, backedUp(t, s))
		for range 200 {
			_, err := other.Verify(ctx, i.Secret.Reveal())
			require.NoError(t, err)
		}
		restoreInto(t, other, early)
		_, err = other.Verify(ctx, i.Secret.Reveal())
		require.NoError(t, err)
	})
}

// A key with credits whose balance is lost is refused, until SetCredits.
func TestALostBalance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		b := backendtest.NewMemory()
		s, err := New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		for _, value := range [][]byte{nil, []byte("\xff")} {
			i := withCredits(t, s, &Credits{Remaining: 100})
			id, err := parseID("", i.Key.ID)
			require.NoError(t, err)
			require.NoError(t, b.Apply(ctx, backend.Change{Key: creditKey(id), Expect: 1,
				Delete: value == nil, Value: value}))
			_, err = s.Verify(ctx, i.Secret.Reveal())
			require.ErrorIs(t, err, ErrCorrupt)
			require.NotErrorIs(t, err, ErrDenied)
			require.ErrorIs(t, s.CheckIntegrity(ctx), ErrCorrupt)
			_, err = s.AddCredits(ctx, i.Key.ID, 5)
			require.Error(t, err)
			require.NoError(t, s.SetCredits(ctx, i.Key.ID, &Credits{Remaining: 3}))
			require.Equal(t, 3, admitted(t, s, i))
			require.NoError(t, s.CheckIntegrity(ctx))
		}
	})
}

// No call waits for the credits of a balance that SetCredits would not have written, and Restore
// takes no such balance. SetCredits makes the key usable again.
func TestABalanceOutOfBounds(t *testing.T) {
	now := time.Now().UnixNano()
	often := &record.Refill{Amount: 1, Every: 1}
	for name, bad := range map[string]*record.Balance{
		"too many credits":     {Remaining: maxCredits + 1, RefilledAt: now},
		"too large a refill":   {Refill: &record.Refill{Amount: maxCredits + 1, Daily: true}},
		"a refill too often":   {Remaining: 1, Refill: often, RefilledAt: now},
		"a refill too seldom":  {Refill: &record.Refill{Amount: 1, Every: math.MaxInt64}},
		"two refills":          {Refill: &record.Refill{Amount: 1, Daily: true, MonthDay: 1}},
		"a refill after 2262":  {Refill: &record.Refill{Amount: 1, Every: 1e9}, RefilledAt: 1<<63 - 1},
		"a refill in no month": {Refill: &record.Refill{Amount: 1, MonthDay: 32}},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			m := backendtest.NewMemory()
			s, err := New(m, nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			i := withCredits(t, s, &Credits{Remaining: 100})
			id, err := parseID("", i.Key.ID)
			require.NoError(t, err)
			bad.Format, bad.CreditsRevision = record.Format, 1
			value, err := proto.Marshal(bad)
			require.NoError(t, err)

			e := backend.Entry{Key: creditKey(id), Value: value, Revision: 1}
			other, err := New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, other.Close()) }()
			b := backupOf(t, backupfile.FormCredits, e)
			require.ErrorIs(t, other.Restore(ctx, bytes.NewReader(b)), ErrCorrupt)
			require.Empty(t, read(t, other.backend, creditSpace))

			require.NoError(t, m.Apply(ctx,
				backend.Change{Key: e.Key, Expect: e.Revision, Value: e.Value}))
			_, err = s.Verify(ctx, i.Secret.Reveal())
			require.ErrorIs(t, err, ErrCorrupt)
			require.NotErrorIs(t, err, ErrInvalid)
			require.ErrorIs(t, s.CheckIntegrity(ctx), ErrCorrupt)
			require.NoError(t, s.SetCredits(ctx, i.Key.ID, &Credits{Remaining: 3}))
			require.Equal(t, 3, admitted(t, s, i))
		})
	}
}

// spenderJob holds what a process that is to be killed spends, in its environment.
const spenderJob = "KEYSTORE_CREDITS_SPENDER"

type spending struct{ Dir, Token string }

// TestCreditsSpender is no test, but the process that TestCreditsOverKills kills. It writes a byte
// for each admitted call.
func TestCreditsSpender(t *testing.T) {
	text := os.Getenv(spenderJob)
	if text == "" {
		t.Skip("SKIPPED: it is started, to be killed, by TestCreditsOverKills")
	}
	var job spending
	require.NoError(t, json.Unmarshal([]byte(text), &job))
	s, err := openPlain(job.Dir)
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for {
				_, err := s.Verify(context.Background(), job.Token)
				if errors.As(err, new(*CreditsError)) {
					return
				}
				if err != nil {
					os.Exit(2)
				}
				if _, err := os.Stdout.Write([]byte{'.'}); err != nil {
					os.Exit(1) // the parent is gone
				}
			}
		})
	}
	wg.Wait()
	_, _ = os.Stdout.Write([]byte{'!'})
	_, _ = io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent gone
	os.Exit(1)
}

// A process is killed again and again. All processes together never spend more than was granted, and
// each kill loses at most one lease.
func TestCreditsOverKills(t *testing.T) {
	needsDirectory(t)
	const credits, kills = 300_000, 4
	dir := t.TempDir()
	s, err := openPlain(dir)
	require.NoError(t, err)
	i := withCredits(t, s, &Credits{Remaining: credits})
	require.NoError(t, s.Close())
	text, err := json.Marshal(spending{dir, i.Secret.Reveal()})
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	total, lost := 0, 0
	for range kills {
		cmd := exec.Command(self, "-test.run", "^TestCreditsSpender$")
		cmd.Env = append(os.Environ(), spenderJob+"="+string(text))
		cmd.Stderr = os.Stderr
		pipe, err := cmd.StdoutPipe()
		require.NoError(t, err)
		stdin, err := cmd.StdinPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		out := bufio.NewReader(pipe)
		for n := 0; ; n++ {
			b, err := out.ReadByte()
			if n == 2000 || err == nil && b == '!' {
				require.NoError(t, cmd.Process.Kill())
			}
			if err != nil {
				break
			}
			if b == '.' {
				total++
			}
		}
		require.ErrorContains(t, cmd.Wait(), "signal: killed")
		_ = stdin.Close()
		s, err := openPlain(dir)
		require.NoError(t, err)
		stored := int(remaining(t, s, i))
		require.NoError(t, s.CheckIntegrity(t.Context()))
		require.NoError(t, s.Close())
		require.LessOrEqual(t, total+stored, credits, "more was spent than was granted")
		gone := credits - total - stored - lost
		lost += gone
		t.Logf("spent %d, %d remain, this kill has lost %d", total, stored, gone)
		// A lease is an eighth of what remained before it, or as much as the callers waited for. Of
		// the callers, each may have been admitted and not have written its byte.
		require.LessOrEqual(t, gone, (stored+gone)/(leasePart-1)+2*64)
	}
	s, err = openPlain(dir)
	require.NoError(t, err)
	total += admitted(t, s, i)
	require.NoError(t, s.Close())
	require.LessOrEqual(t, total, credits)
	require.Equal(t, credits, total+lost)
}

// A process gives back what it has leased, and the answer is lost. Before the process looks again,
// others write the balance so often that the balance no longer has the number of the write. Nothing
// is given back twice.
func TestGivenBackOnceAmongManyWrites(t *testing.T) {
	for _, others := range []int{0, 1, writtenNumbers - 1, writtenNumbers, 3 * writtenNumbers} {
		for name, made := range map[string]bool{"made": true, "lost": false} {
			t.Run(fmt.Sprintf("%s, %d other writes", name, others), func(t *testing.T) {
				fleetTest(t, func(t *testing.T, f *fleet) {
					a, b := f.open(nil), f.open(nil)
					i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
					for range 200 {
						require.NoError(t, a.uses(i))
					}
					account := a.accounts.list()[0]
					require.Greater(t, account.left.Load(), int64(10))
					var lost atomic.Bool
					a.onApply(func(ctx context.Context, changes []backend.Change,
						next func(context.Context) error) error {
						if !isLease(changes) || !lost.CompareAndSwap(false, true) {
							return next(ctx)
						}
						if made {
							if err := next(ctx); err != nil {
								t.Error(err)
							}
						}
						for range others {
							_, made, err := editBalance(b.Store, account.id,
								func(*balance) (struct{}, bool) { return struct{}{}, true })
							if err != nil || !made {
								t.Error(made, err)
							}
						}
						return errors.New("the answer is lost")
					})
					time.Sleep(5 * time.Minute)
					require.True(t, lost.Load())
					require.Empty(t, a.accounts.list())
					left := remaining(t, b.Store, i)
					require.LessOrEqual(t, left, int64(800), "given back twice")
					if others <= writtenNumbers-1 {
						require.EqualValues(t, 800, left, "nothing is lost")
					}
				})
			})
		}
	}
}
