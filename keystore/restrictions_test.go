package keystore_test

import (
	"context"
	"math"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func prefixes(texts ...string) (ps []netip.Prefix) {
	for _, t := range texts {
		ps = append(ps, netip.MustParsePrefix(t))
	}
	return ps
}

func TestNotBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		issued := create(t, s, keystore.Spec{NotBefore: time.Now().Add(time.Hour)})
		token := issued.Secret.Reveal()
		require.Equal(t, keystore.StatusPending, issued.Key.Status())
		for range 2 { // a miss, then a hit
			require.ErrorIs(t, verify(t, s, token), keystore.ErrNotYetValid)
			require.ErrorIs(t, verify(t, s, token), keystore.ErrDenied)
		}
		_, err := s.Bind(t.Context(), token)
		require.ErrorIs(t, err, keystore.ErrNotYetValid)
		time.Sleep(time.Hour - 1)
		require.ErrorIs(t, verify(t, s, token), keystore.ErrNotYetValid)
		time.Sleep(time.Nanosecond)
		require.NoError(t, verify(t, s, token), "to the instant")

		live := bind(t, s, token)
		_, err = s.Update(t.Context(), issued.Key.ID, func(spec *keystore.Spec) error {
			spec.NotBefore = time.Now().Add(time.Hour)
			return nil
		})
		require.NoError(t, err)
		require.Error(t, live.Err())
		require.ErrorIs(t, verify(t, s, token), keystore.ErrNotYetValid)
	})
}

func TestAllowedNetworks(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{AllowedNetworks: prefixes("192.0.2.0/24",
		"2001:db8::/32")})
	token := issued.Secret.Reveal()
	for addr, ok := range map[string]bool{
		"192.0.2.1": true, "::ffff:192.0.2.1": true, "192.0.3.1": false, "2001:db8:1::1": true,
		"2001:db9::1": false, "": false,
	} {
		ctx := t.Context()
		if addr != "" {
			ctx = keystore.WithClientAddr(ctx, netip.MustParseAddr(addr))
		}
		for range 2 {
			_, err := s.Verify(ctx, token)
			_, _, release, bindErr := parts(s.Bind(ctx, token))
			if ok {
				require.NoError(t, err, addr)
				require.NoError(t, bindErr, addr)
				release()
				continue
			}
			require.ErrorIs(t, err, keystore.ErrNetworkNotAllowed, addr)
			require.ErrorIs(t, err, keystore.ErrDenied, addr)
			require.ErrorIs(t, bindErr, keystore.ErrNetworkNotAllowed, addr)
		}
	}
	for name, bad := range map[string][]netip.Prefix{
		"zero":     {{}},
		"4in6":     prefixes("::ffff:10.0.0.0/104"),
		"unmasked": prefixes("192.0.2.77/24"),
		"too many": make([]netip.Prefix, 65),
	} {
		_, err := s.Create(t.Context(), keystore.Spec{Name: "n", AllowedNetworks: bad})
		require.ErrorIs(t, err, keystore.ErrInvalid, name)
	}
}

func TestMaxLifetime(t *testing.T) {
	s := open(t, &keystore.Options{MaxLifetime: time.Hour})
	for _, at := range []time.Time{{}, time.Now().Add(2 * time.Hour)} {
		_, err := s.Create(t.Context(), keystore.Spec{Name: "n", ExpiresAt: at})
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
	issued := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Minute)})
	for _, at := range []time.Time{{}, time.Now().Add(2 * time.Hour)} {
		_, err := s.Update(t.Context(), issued.Key.ID,
			func(spec *keystore.Spec) error { spec.ExpiresAt = at; return nil })
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
	key, err := s.Update(t.Context(), issued.Key.ID,
		func(spec *keystore.Spec) error { spec.Name = "renamed"; return nil })
	require.NoError(t, err)
	require.Equal(t, "renamed", key.Name)
}

// What an Update does to live contexts: a change that narrows ends them before it returns, another
// leaves them.
func TestUpdateNarrowsOrNot(t *testing.T) {
	from := keystore.WithClientAddr(t.Context(), netip.MustParseAddr("192.0.2.1"))
	expires := time.Now().Add(time.Hour)
	for name, c := range map[string]struct {
		narrows bool
		change  func(*keystore.Spec)
	}{
		"nothing": {false, func(*keystore.Spec) {}},
		"a name":  {false, func(s *keystore.Spec) { s.Name = "other" }},
		"a scope more": {false,
			func(s *keystore.Spec) { s.Scopes = append(s.Scopes, "more") }},
		"a wider scope": {false, func(s *keystore.Spec) { s.Scopes = []string{"*"} }},
		"a scope less":  {true, func(s *keystore.Spec) { s.Scopes = []string{"orders:*"} }},
		"a narrower scope": {true,
			func(s *keystore.Spec) { s.Scopes = []string{"orders:read", "users"} }},
		"a network more": {false, func(s *keystore.Spec) {
			s.AllowedNetworks = append(s.AllowedNetworks, prefixes("10.0.0.0/8")...)
		}},
		"a wider network": {false,
			func(s *keystore.Spec) { s.AllowedNetworks = prefixes("192.0.0.0/16") }},
		"any network": {false, func(s *keystore.Spec) { s.AllowedNetworks = nil }},
		"a narrower network": {true,
			func(s *keystore.Spec) { s.AllowedNetworks = prefixes("192.0.2.0/25") }},
		"a later expiry": {false,
			func(s *keystore.Spec) { s.ExpiresAt = expires.Add(time.Hour) }},
		"no expiry": {false, func(s *keystore.Spec) { s.ExpiresAt = time.Time{} }},
		"an earlier expiry": {true,
			func(s *keystore.Spec) { s.ExpiresAt = expires.Add(-time.Minute) }},
		"a higher rate":   {false, func(s *keystore.Spec) { s.RateLimit.PerSecond = 1e6 }},
		"a lower rate":    {true, func(s *keystore.Spec) { s.RateLimit.PerSecond = 1 }},
		"a smaller burst": {true, func(s *keystore.Spec) { s.RateLimit.Burst = 10 }},
		"no rate limit at all": {false,
			func(s *keystore.Spec) { s.RateLimit = keystore.RateLimit{} }},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := keystore.New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			issued := create(t, s, keystore.Spec{
				Scopes: []string{"orders:*", "users"}, AllowedNetworks: prefixes("192.0.2.0/24"),
				ExpiresAt: expires,
				RateLimit: keystore.RateLimit{PerSecond: 1000, Burst: 1000},
			})
			live, _, release, err := parts(s.Bind(from, issued.Secret.Reveal()))
			require.NoError(t, err)
			defer release()
			_, err = s.Update(from, issued.Key.ID,
				func(spec *keystore.Spec) error { c.change(spec); return nil })
			require.NoError(t, err)
			if c.narrows {
				require.ErrorIs(t, context.Cause(live), keystore.ErrNarrowed)
			} else {
				require.NoError(t, live.Err())
			}
		})
	}
}

// A key that had no restriction gets its first: what was bound before ends, as for any narrower
// one.
func TestTheFirstRestrictionNarrows(t *testing.T) {
	hour := time.Now().Add(time.Hour)
	for name, c := range map[string]struct {
		cause  error // nil: it goes on
		change func(*keystore.Spec)
	}{
		"a rate limit": {keystore.ErrNarrowed, func(s *keystore.Spec) {
			s.RateLimit = keystore.RateLimit{PerSecond: 1e9, Burst: 1e9}
		}},
		"a network": {keystore.ErrNarrowed,
			func(s *keystore.Spec) { s.AllowedNetworks = prefixes("192.0.2.0/24") }},
		"every IPv4 network": {keystore.ErrNarrowed,
			func(s *keystore.Spec) { s.AllowedNetworks = prefixes("0.0.0.0/0") }},
		"an expiry": {keystore.ErrNarrowed,
			func(s *keystore.Spec) { s.ExpiresAt = hour }},
		"a start to come": {keystore.ErrNotYetValid,
			func(s *keystore.Spec) { s.NotBefore = hour }},
		"a start that is past": {nil,
			func(s *keystore.Spec) { s.NotBefore = time.Now().Add(-time.Hour) }},
		"a scope": {nil,
			func(s *keystore.Spec) { s.Scopes = []string{"orders:read"} }},
	} {
		t.Run(name, func(t *testing.T) {
			s := inMemory(t)
			from := keystore.WithClientAddr(t.Context(), netip.MustParseAddr("192.0.2.1"))
			issued := create(t, s, keystore.Spec{})
			for range 2 { // bound by a miss, and by a hit
				live, _, release, err := parts(s.Bind(from, issued.Secret.Reveal()))
				require.NoError(t, err)
				defer release()
				defer func() { require.ErrorIs(t, context.Cause(live), c.cause) }()
			}
			_, err := s.Update(from, issued.Key.ID,
				func(spec *keystore.Spec) error { c.change(spec); return nil })
			require.NoError(t, err)
		})
	}
}

// A context is measured by what the key was last, not only by what it was when bound: what an
// Update gave, the next one takes.
func TestEveryNarrowingCounts(t *testing.T) {
	for name, c := range map[string]struct{ give, take func(*keystore.Spec) }{
		"a scope": {
			func(s *keystore.Spec) { s.Scopes = []string{"a", "b"} },
			func(s *keystore.Spec) { s.Scopes = []string{"a"} },
		},
		"a network": {
			func(s *keystore.Spec) {
				s.AllowedNetworks = prefixes("192.0.2.0/24", "198.51.100.0/24")
			},
			func(s *keystore.Spec) { s.AllowedNetworks = prefixes("192.0.2.0/24") },
		},
		"a rate": {
			func(s *keystore.Spec) { s.RateLimit = keystore.RateLimit{PerSecond: 9, Burst: 9} },
			func(s *keystore.Spec) { s.RateLimit = keystore.RateLimit{PerSecond: 1, Burst: 1} },
		},
		"time": {
			func(s *keystore.Spec) { s.ExpiresAt = s.ExpiresAt.Add(time.Hour) },
			func(s *keystore.Spec) { s.ExpiresAt = s.ExpiresAt.Add(-time.Hour) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := inMemory(t)
			from := keystore.WithClientAddr(t.Context(), netip.MustParseAddr("192.0.2.1"))
			issued := create(t, s, keystore.Spec{
				Scopes: []string{"a"}, AllowedNetworks: prefixes("192.0.2.0/24"),
				ExpiresAt: time.Now().Add(time.Hour),
				RateLimit: keystore.RateLimit{PerSecond: 1, Burst: 1},
			})
			live, _, release, err := parts(s.Bind(from, issued.Secret.Reveal()))
			require.NoError(t, err)
			defer release()
			update := func(change func(*keystore.Spec)) {
				_, err := s.Update(from, issued.Key.ID,
					func(spec *keystore.Spec) error { change(spec); return nil })
				require.NoError(t, err)
			}
			update(c.give)
			require.NoError(t, live.Err())
			update(c.take)
			require.ErrorIs(t, context.Cause(live), keystore.ErrNarrowed)
		})
	}
}

// An expiry that is moved moves the end of what is bound, in both directions.
func TestAMovedExpiryMovesTheEndOfContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		issued := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)})
		live := bind(t, s, issued.Secret.Reveal())
		_, err := s.Update(t.Context(), issued.Key.ID, func(spec *keystore.Spec) error {
			spec.ExpiresAt = spec.ExpiresAt.Add(time.Hour)
			return nil
		})
		require.NoError(t, err)
		time.Sleep(2*time.Hour - time.Nanosecond)
		synctest.Wait()
		require.NoError(t, live.Err())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.ErrorIs(t, context.Cause(live), keystore.ErrExpired)

		issued = create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)})
		live = bind(t, s, issued.Secret.Reveal())
		_, err = s.Update(t.Context(), issued.Key.ID,
			func(spec *keystore.Spec) error { spec.ExpiresAt = time.Time{}; return nil })
		require.NoError(t, err)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		require.NoError(t, live.Err())
	})
}

func TestHasScope(t *testing.T) {
	for _, c := range []struct {
		granted, scope string
		want           bool
	}{
		{"orders:read", "orders:read", true},
		{"orders:read", "Orders:read", false},
		{"orders:read", "orders", false},
		{"orders:*", "orders:read", true},
		{"orders:*", "orders:read:all", true},
		{"orders:*", "orders:", true},
		{"orders:*", "orders", false},
		{"orders:*", "orderstatus:read", false},
		{"a.b.*", "a.b.c", true},
		{"a/*", "a/b", true},
		{"*", "anything", true},
		{"*", "*", true},
		{"orders:*", "orders:*", true},
		{"orders:read", "orders:*", false},
	} {
		key := keystore.NewKey(keystore.Spec{Scopes: []string{"other", c.granted}})
		require.Equal(t, c.want, key.HasScope(c.scope), "%q has %q", c.granted, c.scope)
	}
	require.False(t, new(keystore.Key).HasScope(""))
	s := inMemory(t)
	for _, bad := range []string{"", "or*ders", "orders*", "*:read", "a b", "**", "ü"} {
		_, err := s.Create(t.Context(), keystore.Spec{Name: "n", Scopes: []string{bad}})
		require.ErrorIs(t, err, keystore.ErrInvalid, "%q", bad)
	}
}

func TestRateLimitOfAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := keystore.New(backendtest.NewMemory(), &keystore.Options{CacheSize: 1})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 0.1,
			Burst: 2}})
		id, token := issued.Key.ID, issued.Secret.Reveal()
		other := create(t, s, keystore.Spec{}).Secret.Reveal()
		require.NoError(t, verify(t, s, token))
		live := bind(t, s, token)
		var limited *keystore.RateLimitError
		require.ErrorAs(t, verify(t, s, token), &limited)
		require.Equal(t, 10*time.Second, limited.RetryAfter.Round(time.Second))
		require.NotErrorIs(t, limited, keystore.ErrDenied)

		require.NoError(t, verify(t, s, other)) // the cache holds one key: the first is out of it
		require.ErrorAs(t, verify(t, s, token), &limited,
			"its limiter outlives its place in the cache")
		require.NoError(t, live.Err())
		time.Sleep(limited.RetryAfter)
		require.NoError(t, verify(t, s, token), "as the error said")
		require.ErrorAs(t, verify(t, s, token), &limited)

		_, err = s.Update(t.Context(), id,
			func(spec *keystore.Spec) error { spec.RateLimit = keystore.RateLimit{}; return nil })
		require.NoError(t, err)
		for range 10 {
			require.NoError(t, verify(t, s, token), "without a limit, at once")
		}
		_, err = s.Update(t.Context(), id, func(spec *keystore.Spec) error {
			spec.RateLimit = keystore.RateLimit{PerSecond: 0.1, Burst: 1}
			return nil
		})
		require.NoError(t, err)
		for verify(t, s, token) == nil {
		}
		require.NoError(t, s.Revoke(t.Context(), id, ""))
		require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked,
			"a dead key is dead first of all")

		for _, bad := range []keystore.RateLimit{{PerSecond: -1, Burst: 1}, {PerSecond: 1},
			{Burst: 1}, {PerSecond: 1, Burst: -1}} {
			_, err := s.Create(t.Context(), keystore.Spec{Name: "n", RateLimit: bad})
			require.ErrorIs(t, err, keystore.ErrInvalid, "%v", bad)
		}
	})
}

// A wait that is longer than a Duration can say is as long as one can.
func TestRetryAfterDoesNotOverflow(t *testing.T) {
	s := inMemory(t)
	for _, perSecond := range []float64{1e-10, 1e-300} {
		token := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: perSecond,
			Burst: 1}}).Secret.Reveal()
		require.NoError(t, verify(t, s, token))
		var limited *keystore.RateLimitError
		require.ErrorAs(t, verify(t, s, token), &limited)
		require.Equal(t, time.Duration(math.MaxInt64), limited.RetryAfter)
	}
}
