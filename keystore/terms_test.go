package keystore

import (
	"crypto/sha256"
	"fmt"
	"math"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/intern"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Keys share terms only if the terms are equal and nothing restricts the keys.
func TestWhichKeysShareTerms(t *testing.T) {
	s := newRig(t, fence.TwoPhase).store
	scheme := s.dummyDigest.Scheme
	sum := make([]byte, 32)
	shared := func(kr keyRecord) *terms {
		e := kr.cached()
		s.shareTerms(e)
		require.Same(t, &e.grants, e.key.grants)
		return e.terms()
	}
	base := func() *record.Record {
		return &record.Record{DigestScheme: scheme, Digest: sum, Scopes: []string{"a", "b"}}
	}
	want := shared(keyRecord{record: base(), revision: 1})
	require.True(t, want.plain)
	same := base()
	same.Name, same.Owner, same.RevokeReason = "another", "other", "text"
	same.Digest = append([]byte{1}, sum[1:]...)
	require.Same(t, want, shared(keyRecord{id: token.ID{1}, record: same, revision: 1}))

	other := func(revision uint64, edit func(r *record.Record)) (one, two *terms) {
		r := base()
		edit(r)
		kr := keyRecord{record: r, revision: revision}
		one, two = shared(kr), shared(kr)
		require.NotSame(t, want, one)
		require.NotSame(t, want, two)
		return one, two
	}
	for name, edit := range map[string]func(r *record.Record){
		"no scopes":     func(r *record.Record) { r.Scopes = nil },
		"another order": func(r *record.Record) { r.Scopes = []string{"b", "a"} },
		"one scope":     func(r *record.Record) { r.Scopes = []string{"a b"} },
		"joined":        func(r *record.Record) { r.Scopes = []string{"ab"} },
		"rotations":     func(r *record.Record) { r.Rotations = 1 },
	} {
		one, two := other(1, edit)
		require.True(t, one.plain, name)
		require.Same(t, one, two, name)
	}
	one, two := other(2, func(*record.Record) {})
	require.True(t, one.plain)
	require.Same(t, one, two)

	later := time.Now().Add(time.Hour).UnixNano()
	for name, edit := range map[string]func(r *record.Record){
		"expiry":    func(r *record.Record) { r.ExpiresAt = later },
		"beginning": func(r *record.Record) { r.NotBefore = 1 },
		"networks":  func(r *record.Record) { r.AllowedNetworks = []string{"10.0.0.0/8"} },
		"rate limit": func(r *record.Record) {
			r.RateLimit = &record.RateLimit{PerSecond: 1, Burst: 1}
		},
		"revoked":        func(r *record.Record) { r.RevokedAt = 1 },
		"disabled":       func(r *record.Record) { r.DisabledAt = 1 },
		"another scheme": func(r *record.Record) { r.DigestScheme = "own" },
		"another length": func(r *record.Record) { r.Digest = sum[1:] },
	} {
		one, two := other(1, edit)
		require.False(t, one.plain, name)
		require.NotSame(t, one, two, name)
	}
	for name, edit := range map[string]func(r *record.Record){
		"metadata": func(r *record.Record) { r.Metadata = map[string]string{"k": "v"} },
		"previous": func(r *record.Record) {
			r.Previous = &record.Previous{DigestScheme: scheme, Digest: sum, Until: later}
		},
	} {
		one, two := other(1, edit)
		require.True(t, one.plain, name)
		require.NotSame(t, one, two, name)
	}
	for n := range 3 * intern.Max {
		r := base()
		r.Scopes = []string{fmt.Sprint(n)}
		require.Equal(t, r.Scopes, shared(keyRecord{record: r}).scopes)
		require.LessOrEqual(t, s.shared.all.Len(), intern.Max, "strangers cannot make it grow")
		if n%(intern.Max/4) == 0 {
			require.Same(t, want, shared(keyRecord{record: base(), revision: 1}))
		}
	}
	r := base()
	r.Scopes = []string{"new"}
	one = shared(keyRecord{record: r})
	require.Same(t, one, shared(keyRecord{record: r}), "after the churn, new terms are shared")
}

// Owners and scopes come and go. The memory of the terms and texts is bounded, and keys with new
// scopes share their terms and texts.
func TestTermsAreSharedAfterAChurn(t *testing.T) {
	s := newRig(t, fence.TwoPhase).store
	ctx := t.Context()
	verified := func(owner, scope string) *cachedKey {
		issued, err := s.Create(ctx, Spec{Name: "n", Owner: owner, Scopes: []string{scope}})
		require.NoError(t, err)
		_, err = s.Verify(ctx, issued.Secret.Reveal())
		require.NoError(t, err)
		id, ok := token.Parse(issued.Secret.Reveal())
		require.True(t, ok)
		e, _ := s.fence.Get(id, nil)
		require.NotNil(t, e)
		return e
	}
	for n := range intern.Max + 100 {
		verified(fmt.Sprint("owner ", n), fmt.Sprint("scope:", n))
	}
	require.LessOrEqual(t, s.shared.all.Len(), intern.Max)
	one, two := verified("new", "new:scope"), verified("new", "new:scope")
	require.Same(t, one.terms(), two.terms())
	require.Same(t, unsafe.StringData(one.key.Owner), unsafe.StringData(two.key.Owner))
}

// No clock makes a minute look recorded that is not, not even the clock of a machine that counts
// from 1970, or one that is set before.
func TestMarkIsNeverZero(t *testing.T) {
	for _, minute := range []int64{
		0, 1, -1, math.MaxInt64, math.MinInt64, 1 << 31, 1 << 32, 1 << 33,
	} {
		require.NotZero(t, markOf(minute))
	}
	require.NotEqual(t, markOf(0), markOf(1))
	require.NotEqual(t, markOf(-1), markOf(0))
}

// A use of a restricted key is never recorded in fresh, where it would make the next use skip the
// decision.
func TestRestrictedKeyIsNeverFresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newRig(t, fence.TwoPhase).store
		ctx := t.Context()
		for name, spec := range map[string]Spec{
			"plain":      {},
			"expiry":     {ExpiresAt: time.Now().Add(time.Hour)},
			"rate limit": {RateLimit: RateLimit{PerSecond: 1e9, Burst: 1e9}},
		} {
			spec.Name = "n"
			issued, err := s.Create(ctx, spec)
			require.NoError(t, err)
			for range 3 {
				_, err = s.Verify(ctx, issued.Secret.Reveal())
				require.NoError(t, err)
			}
			id, ok := token.Parse(issued.Secret.Reveal())
			require.True(t, ok)
			e, _ := s.fence.Get(id, nil)
			require.NotNil(t, e)
			require.Equal(t, name == "plain", e.fresh.Load() != 0, name)
			require.False(t, s.usage.due(e.recorded()), name)
		}
	})
}

func TestMatchSums(t *testing.T) {
	a := sha256.Sum256([]byte("a"))
	b := a
	require.Equal(t, hashing.Match, matchSums(&a, &b))
	for bit := range 8 * len(b) {
		b[bit/8] ^= 1 << (bit % 8)
		require.Equal(t, hashing.Mismatch, matchSums(&a, &b))
		b[bit/8] ^= 1 << (bit % 8)
	}
	sum := hashing.SHA256().Digest("a").Sum
	require.Equal(t, sum, a[:])
	ofHasher := hashing.SHA256().(summer).Sum256("a")
	require.Equal(t, a, ofHasher)
}
