package keystore

import (
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

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A slowHasher matches as SHA512 does, and takes a second. It counts the matches.
type slowHasher struct {
	hashing.Hasher
	running, most, all atomic.Int64
}

func (h *slowHasher) Slow() bool { return true }

func (h *slowHasher) Match(d hashing.Digest, token string) hashing.Result {
	if d.Scheme != "sha512" {
		return hashing.Mismatch
	}
	h.all.Add(1)
	h.most.Store(max(h.most.Load(), h.running.Add(1)))
	time.Sleep(time.Second)
	h.running.Add(-1)
	return h.Hasher.Match(d, token)
}

// Slow matches run one at a time, results are remembered, a wrong token pauses the matches of its
// key for its address, and a call that has no match is told that the store is unavailable.
func TestSlowMatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := &slowHasher{Hasher: hashing.SHA512()}
		h, err := hashing.Keyring(hashing.SHA256(), slow)
		require.NoError(t, err)
		slow.all.Store(0)
		s, err := New(backendtest.NewMemory(), &Options{Hasher: h, Timeout: -1, CacheSize: -1,
			Legacy: []LegacyFormat{pubFormat}})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		result, err := s.Import(t.Context(), rowsOf(pubRows(40)...), nil)
		require.NoError(t, err)
		require.Equal(t, 40, result.Slow)
		from := func(addr string) context.Context {
			return WithClientAddr(t.Context(), netip.MustParseAddr(addr))
		}
		verify := func(ctx context.Context, text string) error {
			_, err := s.Verify(ctx, text)
			return err
		}

		// A burst of calls with one token needs one match.
		var calls sync.WaitGroup
		for range maxSlowWaits {
			calls.Go(func() {
				if err := verify(from("192.0.2.1"), pubToken(1)); err != nil {
					t.Error(err)
				}
			})
		}
		calls.Wait()
		require.EqualValues(t, 1, slow.all.Load())

		// A wrong token is refused. It pauses the key for its address, and for no other.
		wrong := func(n int) string { return fmt.Sprintf("pub.2.wrong %d", n) }
		require.ErrorIs(t, verify(from("192.0.2.1"), wrong(1)), ErrUnknown)
		require.ErrorIs(t, verify(from("192.0.2.1"), wrong(1)), ErrUnknown, "remembered")
		require.ErrorIs(t, verify(from("192.0.2.1"), wrong(2)), ErrUnavailable)
		require.ErrorIs(t, verify(from("192.0.2.1"), pubToken(2)), ErrUnavailable)
		require.EqualValues(t, 2, slow.all.Load())
		require.NoError(t, verify(from("192.0.2.1"), pubToken(3)), "another key")
		require.NoError(t, verify(from("192.0.2.2"), pubToken(2)), "another address")
		time.Sleep(slowPause)
		require.NoError(t, verify(from("192.0.2.1"), pubToken(2)))
		require.ErrorIs(t, verify(t.Context(), "pub.4.wrong"), ErrUnknown)
		require.NoError(t, verify(t.Context(), pubToken(4)), "without an address, there is no pause")

		// Of many calls at the same time, maxSlowWaits get an answer.
		var admitted, unavailable atomic.Int64
		for i := range 20 {
			calls.Go(func() {
				switch err := verify(t.Context(), pubToken(10+i)); {
				case err == nil:
					admitted.Add(1)
				case Reason(err) == "unavailable":
					unavailable.Add(1)
				}
			})
		}
		calls.Wait()
		require.EqualValues(t, maxSlowWaits, admitted.Load())
		require.EqualValues(t, 20-maxSlowWaits, unavailable.Load())
		require.EqualValues(t, 1, slow.most.Load(), "one at a time")

		// A caller that leaves does not get a denial.
		stop := start(func() error { return verify(t.Context(), pubToken(35)) })
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		require.ErrorIs(t, verify(ctx, pubToken(36)), context.DeadlineExceeded)
		require.NoError(t, stop())
		i, err := s.Inspect(t.Context(), pubToken(36))
		require.NoError(t, err)
		require.NotNil(t, i.Key)
	})
}

// A key is revoked, disabled or narrowed while a call waits for a slow match. Once the change has
// returned, the call does not admit by the record from before the change, whether the call has read
// the record from the storage or from the cache, and also with the previous secret.
func TestChangesDuringASlowMatch(t *testing.T) {
	changes := map[error]func(*Store, string) error{
		ErrRevoked:  func(s *Store, id string) error { return s.Revoke(context.Background(), id, "") },
		ErrDisabled: func(s *Store, id string) error { return s.Disable(context.Background(), id, "") },
		ErrNetworkNotAllowed: func(s *Store, id string) error {
			_, err := s.Update(context.Background(), id, func(spec *Spec) error {
				spec.AllowedNetworks = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
				return nil
			})
			return err
		},
	}
	bind := func(s *Store, text string) error {
		session, err := s.Bind(context.Background(), text)
		if err == nil {
			session.Close()
		}
		return err
	}
	verify := func(s *Store, text string) error {
		_, err := s.Verify(context.Background(), text)
		return err
	}
	for want, change := range changes {
		for name, use := range map[string]func(*Store, string) error{"verify": verify, "bind": bind} {
			for _, cached := range []bool{false, true} {
				for _, previous := range []bool{false, true} {
					of := fmt.Sprintf("%s,%s,cached=%v,previous=%v", Reason(want), name, cached,
						previous)
					t.Run(of, func(t *testing.T) {
						slowTest(t, func(t *testing.T, s *Store, i *Issued) {
							text := i.Secret.Reveal()
							if previous {
								_, err := s.Rotate(t.Context(), i.Key.ID, time.Hour)
								require.NoError(t, err)
							}
							if cached {
								require.NoError(t, verify(s, text))
								s.slow.results.Purge()
							}
							began := time.Now()
							used := start(func() error { return use(s, text) })
							synctest.Wait()
							require.NoError(t, change(s, i.Key.ID))
							require.Equal(t, began, time.Now(), "the match has not ended yet")
							if err := used(); want != ErrNetworkNotAllowed || name != "bind" {
								require.ErrorIs(t, err, want)
							} else {
								require.Error(t, err, "narrowed, or the network is not allowed")
							}
						})
					})
				}
			}
		}
	}
}

// A key is revoked while a call makes a new digest with a slow Hasher. The call is then refused.
// Without a revocation, the call is admitted, and the digest is replaced.
func TestRevokeDuringASlowDigest(t *testing.T) {
	for _, revoked := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := open{backendtest.NewMemory()}
			s, err := New(b, nil)
			require.NoError(t, err)
			i, err := s.Create(t.Context(), Spec{Name: "n"})
			require.NoError(t, err)
			require.NoError(t, s.Close())
			h, err := hashing.Keyring(&slowDigester{hashing.SHA512()}, hashing.SHA256())
			require.NoError(t, err)
			s, err = New(b, &Options{Hasher: h, Timeout: -1})
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			began := time.Now()
			verified := start(func() error {
				_, err := s.Verify(t.Context(), i.Secret.Reveal())
				return err
			})
			synctest.Wait()
			if !revoked {
				require.NoError(t, verified())
				time.Sleep(time.Hour)
				require.Zero(t, s.Stats().Outdated)
				return
			}
			require.NoError(t, s.Revoke(t.Context(), i.Key.ID, ""))
			require.Equal(t, began, time.Now(), "the digest is not made yet")
			require.ErrorIs(t, verified(), ErrRevoked)
		})
	}
}

// A process loses contact while a call waits for a slow match, and another process revokes the key.
// The call is refused, whether the process is back in contact or not, and although the process has
// had the key in the cache.
func TestSlowMatchWithoutContact(t *testing.T) {
	for want, back := range map[error]bool{ErrUnavailable: false, ErrRevoked: true} {
		fleetTest(t, func(t *testing.T, f *fleet) {
			opts := &Options{Hasher: minuteHasher{hashing.SHA512()}, Timeout: time.Hour}
			a, b := f.open(opts), f.open(opts)
			i := a.create(Spec{})
			require.NoError(t, b.uses(i))
			b.slow.results.Purge()
			used := start(func() error { return b.uses(i) })
			synctest.Wait()
			began := time.Now()
			b.link.Set(badlink.Faults{FeedError: errors.New("no feed")})
			b.awaitStale()
			require.NoError(t, a.Revoke(t.Context(), i.Key.ID, ""))
			if back {
				b.link.Set(badlink.Faults{})
				b.awaitFresh()
			}
			require.Less(t, time.Since(began), time.Minute, "the match has not ended yet")
			require.ErrorIs(t, used(), want)
		})
	}
}

// A minuteHasher takes a minute for a match.
type minuteHasher struct{ hashing.Hasher }

func (h minuteHasher) Slow() bool { return true }

func (h minuteHasher) Match(d hashing.Digest, token string) hashing.Result {
	time.Sleep(time.Minute)
	return h.Hasher.Match(d, token)
}

// The store is closed while a call waits for a slow match. The call is refused, although the key is
// in the cache.
func TestCloseDuringASlowMatch(t *testing.T) {
	slowTest(t, func(t *testing.T, s *Store, i *Issued) {
		_, err := s.Verify(t.Context(), i.Secret.Reveal())
		require.NoError(t, err)
		s.slow.results.Purge()
		verified := start(func() error {
			_, err := s.Verify(t.Context(), i.Secret.Reveal())
			return err
		})
		synctest.Wait()
		require.NoError(t, s.Close())
		require.ErrorIs(t, verified(), ErrClosed)
	})
}

// A slowDigester takes a second for a digest.
type slowDigester struct{ hashing.Hasher }

func (h *slowDigester) Slow() bool { return true }

func (h *slowDigester) Digest(token string) hashing.Digest {
	time.Sleep(time.Second)
	return h.Hasher.Digest(token)
}

// Inspect shows a key as the key is after a slow match.
func TestInspectDuringASlowMatch(t *testing.T) {
	slowTest(t, func(t *testing.T, s *Store, i *Issued) {
		var found *Inspection
		inspected := start(func() (err error) {
			found, err = s.Inspect(t.Context(), i.Secret.Reveal())
			return err
		})
		synctest.Wait()
		require.NoError(t, s.Revoke(t.Context(), i.Key.ID, ""))
		require.NoError(t, inspected())
		require.Equal(t, ErrRevoked, found.Refusal)
	})
}

// Inspect of unknown tokens runs one slow match at a time, as Verify does.
func TestInspectManyUnknownTokens(t *testing.T) {
	slowTest(t, func(t *testing.T, s *Store, _ *Issued) {
		slow := s.hasher.(*guardedHasher).hasher.(*slowHasher)
		slow.most.Store(0)
		var calls sync.WaitGroup
		for range maxSlowWaits {
			_, text := s.format.New()
			calls.Go(func() {
				i, err := s.Inspect(t.Context(), text)
				if err != nil || i.Refusal != ErrUnknown {
					t.Error(i, err)
				}
			})
		}
		calls.Wait()
		require.EqualValues(t, 1, slow.most.Load())
	})
}

// slowTest runs a test with a store whose Hasher is slow, and a key.
func slowTest(t *testing.T, test func(t *testing.T, s *Store, i *Issued)) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(backendtest.NewMemory(),
			&Options{Hasher: &slowHasher{Hasher: hashing.SHA512()}, Timeout: -1})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		i, err := s.Create(t.Context(), Spec{Name: "n"})
		require.NoError(t, err)
		test(t, s, i)
	})
}

// If the present Hasher is slow, unknown tokens follow the same rules as the tokens of keys.
func TestSlowMatchesOfUnknownTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := &slowHasher{Hasher: hashing.SHA512()}
		open := func() *Store {
			s, err := New(backendtest.NewMemory(), &Options{Hasher: slow, Timeout: -1})
			require.NoError(t, err)
			return s
		}
		s, other := open(), open()
		defer func() { require.NoError(t, errors.Join(s.Close(), other.Close())) }()
		slow.most.Store(0)
		var calls sync.WaitGroup
		var unknown, unavailable atomic.Int64
		for range maxSlowWaits + 4 {
			issued, err := other.Create(t.Context(), Spec{Name: "k"})
			require.NoError(t, err)
			calls.Go(func() {
				switch _, err := s.Verify(t.Context(), issued.Secret.Reveal()); {
				case errors.Is(err, ErrUnknown):
					unknown.Add(1)
				case errors.Is(err, ErrUnavailable):
					unavailable.Add(1)
				}
			})
		}
		calls.Wait()
		require.EqualValues(t, maxSlowWaits, unknown.Load())
		require.EqualValues(t, 4, unavailable.Load())
		require.EqualValues(t, 1, slow.most.Load(), "one at a time")
	})
}
