package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
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

// A call that waits for a lease is refused once Revoke or Disable has returned, in this process or
// in another.
func TestRevokeWhileACallWaitsForALease(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		for _, by := range []*member{a, b} {
			for want, stop := range map[error]func(context.Context, string, string) error{
				ErrRevoked: by.Revoke, ErrDisabled: by.Disable,
			} {
				i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
				key, err := a.Verify(WithCost(t.Context(), 0), i.Secret.Reveal())
				require.NoError(t, err)
				hold := holdLeases(a)
				verified := start(func() error { return a.uses(i) })
				spent := start(func() error { return key.Spend(t.Context(), 2) })
				synctest.Wait()
				require.NoError(t, stop(t.Context(), i.Key.ID, ""))
				close(hold)
				require.ErrorIs(t, verified(), want)
				require.ErrorIs(t, spent(), want)
			}
		}
	})
}

// A key is narrowed while a call waits for a lease, in this process or in another. Once Update has
// returned, the call decides by the narrowed record and returns it, takes no credits if the call is
// refused, and takes one use from the RateLimit if the call is admitted.
func TestNarrowingWhileACallWaitsForALease(t *testing.T) {
	var expiry time.Time
	for name, narrow := range map[string]struct {
		change func(*Spec)
		check  func(*testing.T, *Key)
		want   error
	}{
		"scopes": {
			change: func(spec *Spec) { spec.Scopes = []string{"read"} },
			check:  func(t *testing.T, key *Key) { require.False(t, key.HasScope("write")) },
		},
		"expiry": {
			change: func(spec *Spec) { spec.ExpiresAt = expiry },
			check:  func(t *testing.T, key *Key) { require.True(t, expiry.Equal(key.ExpiresAt)) },
		},
		"rate": {
			change: func(spec *Spec) { spec.RateLimit.PerSecond = 1e-7 },
			check:  func(t *testing.T, key *Key) { require.Equal(t, 1e-7, key.RateLimit.PerSecond) },
		},
		"networks": {
			change: func(spec *Spec) {
				spec.AllowedNetworks = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
			},
			want: ErrNetworkNotAllowed,
		},
	} {
		for _, cache := range []int{0, -1} {
			t.Run(fmt.Sprintf("%s, CacheSize=%d", name, cache), func(t *testing.T) {
				fleetTest(t, func(t *testing.T, f *fleet) {
					expiry = time.Now().Add(time.Hour)
					opts := &Options{CacheSize: cache}
					a, b := f.open(opts), f.open(opts)
					for _, by := range []*member{a, b} {
						i := a.create(Spec{Credits: &Credits{Remaining: 1000},
							Scopes: []string{"read", "write"}, RateLimit: RateLimit{1e-6, 1}})
						hold := holdLeases(a)
						var key *Key
						verified := start(func() (err error) {
							key, err = a.Verify(t.Context(), i.Secret.Reveal())
							return err
						})
						synctest.Wait()
						_, err := by.Update(t.Context(), i.Key.ID, func(spec *Spec) error {
							narrow.change(spec)
							return nil
						})
						require.NoError(t, err)
						close(hold)
						require.ErrorIs(t, verified(), narrow.want)
						if narrow.want != nil {
							require.EqualValues(t, 1000, remaining(t, a.Store, i))
							continue
						}
						narrow.check(t, key)
						require.EqualValues(t, 999, remaining(t, a.Store, i))
					}
				})
			})
		}
	}
}

// A key expires while a call waits for a lease. The call is refused, and takes no credits.
func TestExpiryWhileACallWaitsForALease(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a := f.open(nil)
		i := a.create(Spec{Credits: &Credits{Remaining: 1000},
			ExpiresAt: time.Now().Add(time.Second)})
		hold := holdLeases(a)
		verified := start(func() error { return a.uses(i) })
		time.Sleep(time.Second)
		close(hold)
		require.ErrorIs(t, verified(), ErrExpired)
		require.EqualValues(t, 1000, remaining(t, a.Store, i))
	})
}

// verifiedElsewhere returns two processes, a key with 1,000 credits, and what the second process
// knows of the key. No process has leased a credit.
func verifiedElsewhere(f *fleet) (a, b *member, i *Issued, key *Key) {
	a, b = f.open(nil), f.open(nil)
	i = a.create(Spec{Credits: &Credits{Remaining: 1000}})
	key, err := b.Verify(WithCost(f.Context(), 0), i.Secret.Reveal())
	require.NoError(f, err)
	return a, b, i, key
}

// holdLeases makes the leases of a process wait until the channel is closed.
func holdLeases(m *member) (hold chan struct{}) {
	hold = make(chan struct{})
	m.onApply(func(ctx context.Context, changes []backend.Change,
		next func(context.Context) error) error {
		if isLease(changes) {
			<-hold
		}
		return next(ctx)
	})
	return hold
}

// A key is revoked after a call has read the record, and before the account of the key exists. The
// call then waits for a lease, and is refused.
func TestRevokeBeforeACallWaitsForALease(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		for _, by := range []*member{a, b} {
			i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
			hold, held := make(chan struct{}), make(chan struct{})
			var once sync.Once
			get := a.reads.get
			a.reads.get = func(ctx context.Context, id token.ID) (backend.Entry, error) {
				e, err := get(ctx, id)
				once.Do(func() { close(held); <-hold })
				return e, err
			}
			verified := start(func() error { return a.uses(i) })
			<-held
			require.NoError(t, by.Revoke(t.Context(), i.Key.ID, ""))
			close(hold)
			require.ErrorIs(t, verified(), ErrRevoked)
		}
	})
}

// A key is revoked while a call waits for a lease, and while the feed leaves out changes. The
// process is back in contact when the lease arrives, and refuses the call.
func TestRevokeInAGapWhileACallWaitsForALease(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b, i, key := verifiedElsewhere(f)
		hold := holdLeases(b)
		spent := start(func() error { return key.Spend(t.Context(), 2) })
		synctest.Wait()
		b.inAGap(func() {
			require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
		})
		close(hold)
		require.ErrorIs(t, spent(), ErrRevoked)
	})
}

// A process loses contact while a call waits for a lease, and the key is revoked in another
// process. The storage then answers, and the feed does not: the call is refused.
func TestACallThatWaitsForALeaseWithoutContact(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
		hold := holdLeases(b)
		used := start(func() error { return b.uses(i) })
		synctest.Wait()
		b.link.Set(badlink.Faults{FeedError: errors.New("no feed")})
		b.awaitStale()
		require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
		close(hold)
		require.ErrorIs(t, used(), ErrUnavailable)
	})
}

// Once Revoke or Disable has returned, a Key of an earlier Verify spends no credit that the process
// has leased before. Enable loses no credit.
func TestSpendAfterRevoke(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b, i, key := verifiedElsewhere(f)
		for range 200 {
			require.NoError(t, key.Spend(t.Context(), 1))
		}
		require.Greater(t, b.accounts.list()[0].left.Load(), int64(10))
		require.NoError(t, a.Disable(t.Context(), i.Key.ID, ""))
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrDisabled)
		require.NoError(t, a.Enable(t.Context(), i.Key.ID))
		for range 700 {
			require.NoError(t, key.Spend(t.Context(), 1))
		}
		require.Positive(t, b.accounts.list()[0].left.Load())
		require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrRevoked)
		time.Sleep(5 * time.Minute) // the account is closed and forgotten
		require.Nil(t, b.accounts.list())
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrRevoked)
		require.EqualValues(t, 100, remaining(t, b.Store, i))
	})
}

// A key is revoked when the process has forgotten the account of the key, or while the feed leaves
// out changes. The process then leases credits, but cannot read the record: nothing of the lease is
// spent, by this call or by a later one.
func TestSpendAfterRevokeWithoutTheRecord(t *testing.T) {
	for name, revoke := range map[string]func(t *testing.T, a, b *member, i *Issued){
		"account closed": func(t *testing.T, a, b *member, i *Issued) {
			time.Sleep(5 * time.Minute)
			require.Empty(t, b.accounts.list())
			require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
		},
		"gap in the feed": func(t *testing.T, a, b *member, i *Issued) {
			b.inAGap(func() {
				require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			fleetTest(t, func(t *testing.T, f *fleet) {
				a := f.open(nil)
				var down atomic.Bool
				link := badlink.Open(f.shared)
				link.OnGet = func(ctx context.Context, key []byte,
					next func(context.Context) (backend.Entry, error)) (backend.Entry, error) {
					if key[0] == keySpace && down.Load() {
						return backend.Entry{}, errDown
					}
					return next(ctx)
				}
				s, err := New(link, f.options(nil))
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				b := &member{Store: s, f: f, link: link}
				i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
				key, err := b.Verify(t.Context(), i.Secret.Reveal())
				require.NoError(t, err)
				revoke(t, a, b, i)
				down.Store(true)
				require.ErrorIs(t, key.Spend(t.Context(), 1), ErrUnavailable)
				require.ErrorIs(t, key.Spend(t.Context(), 1), ErrUnavailable)
				down.Store(false)
				require.ErrorIs(t, key.Spend(t.Context(), 1), ErrRevoked)
			})
		})
	}
}

// The use of a key is no longer limited, and the key is revoked while the feed leaves out changes.
// A Key of an earlier Verify, which has credits, is refused.
func TestSpendAfterRevokeOfAKeyWithoutCredits(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		i := a.create(Spec{Credits: &Credits{Remaining: 1000}})
		key, err := b.Verify(t.Context(), i.Secret.Reveal())
		require.NoError(t, err)
		require.NoError(t, a.SetCredits(t.Context(), i.Key.ID, nil))
		require.NoError(t, key.Spend(t.Context(), 5000))
		b.inAGap(func() {
			require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
		})
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrRevoked)
	})
}

// A key is disabled, and is enabled while the feed leaves out changes. Afterwards, a Key of an
// earlier Verify spends credits again.
func TestSpendAfterEnableInAGap(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b, i, key := verifiedElsewhere(f)
		require.NoError(t, a.Disable(t.Context(), i.Key.ID, ""))
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrDisabled)
		b.inAGap(func() {
			require.NoError(t, a.Enable(t.Context(), i.Key.ID))
		})
		require.NoError(t, key.Spend(t.Context(), 1))
		require.NoError(t, a.Disable(t.Context(), i.Key.ID, ""))
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrDisabled)
	})
}

// A Restore purges a key. Once Restore has returned, no process spends credits that it has leased.
func TestSpendAfterARestoreThatPurges(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b, i, key := verifiedElsewhere(f)
		for range 200 {
			require.NoError(t, key.Spend(t.Context(), 1))
		}
		require.Greater(t, b.accounts.list()[0].left.Load(), int64(10))
		var backup bytes.Buffer
		require.NoError(t, a.Backup(t.Context(), &backup))
		other, err := New(backendtest.NewMemory(), nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, other.Close()) }()
		require.NoError(t, other.Restore(t.Context(), &backup))
		require.NoError(t, other.Revoke(t.Context(), i.Key.ID, ""))
		time.Sleep(time.Millisecond)
		n, err := other.Purge(t.Context(), time.Now())
		require.NoError(t, err)
		require.Equal(t, 1, n)
		backup.Reset()
		require.NoError(t, other.Backup(t.Context(), &backup))
		require.NoError(t, a.Restore(t.Context(), &backup))
		require.ErrorIs(t, key.Spend(t.Context(), 1), ErrRevoked)
	})
}
