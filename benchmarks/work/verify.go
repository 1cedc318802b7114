package work

import (
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/golang-lru/v2/expirable"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The verify workload measures the verification of a credential without gRPC, in one goroutine,
// with a warm cache. There are two cases: one key again and again, and 65,536 random keys, for
// which the caches of the processor miss. There are two references: the SHA-256 of the same token,
// which every store of digests needs, and the verification in the interceptors of the peers. For
// random keys, the reference is the SHA-256 of the random token and one look-up of the digest in a
// map; and the two peers that keep their credentials in memory verify the same random tokens.
var verifyWork = Workload{
	Name:  "verify",
	Title: "Verification of one credential",
	About: "One goroutine, without gRPC. `Verify` hits its cache, with one key again and again, " +
		"or with 65,536 random keys. SHA-256 hashes the same token. Each peer verifies one " +
		"credential again and again, as its interceptor does for each call. The peers in memory " +
		"also verify 65,536 random credentials. The memory of a cached key is the growth of the " +
		"heap, divided by the number of keys; each key has a name, an owner and two scopes.",
	Goals: []Goal{
		{ID: "hit", Work: "Verify hit / SHA-256 of the token", Bound: atMost(1.4, Times)},
		{ID: "hit-allocs", Work: "Verify hit: allocations", Bound: atMost(0, Count)},
		{
			ID: "hit-random",
			Work: "Verify hit, 65,536 keys at random / (SHA-256 of the same tokens + one map " +
				"look-up of each)",
			Bound: atMost(1.3, Times),
		},
		{ID: "cached-key", Work: "memory of a cached key", Bound: atMost(450, PerKey)},
		{ID: "jwt-hs256", Work: "JWT HS256 / Verify hit", Bound: atLeast(25, Times)},
		{ID: "jwt-es256", Work: "JWT ES256 / Verify hit", Bound: atLeast(300, Times)},
		{ID: "jwt-rs256", Work: "JWT RS256 / Verify hit", Bound: atLeast(150, Times)},
		{ID: "jwt-eddsa", Work: "JWT EdDSA / Verify hit", Bound: atLeast(200, Times)},
	},
}

func init() { verifyWork.Run = runVerify }

const (
	caseSHA256 = "SHA-256 of the token"
	caseHot    = "Verify, hit, one key"
	caseRandom = "Verify, hit, 65,536 keys at random"

	caseSHA256Random    = "SHA-256 of 65,536 tokens at random"
	caseSHA256MapRandom = "SHA-256 and one map look-up, 65,536 tokens at random"
	caseMapRandom       = peers.Map + ", 65,536 at random"
	caseLRURandom       = "LRU with a TTL by SHA-256, 65,536 at random"
)

// hotKeys is the number of keys in the case of random keys.
const hotKeys = 1 << 16

// A hotStore is an open store. All its keys are in the cache.
type hotStore struct {
	*keystore.Store
	tokens []string // in random order; the number of tokens is a power of two
	heap   float64  // the growth of the heap for each key, when the cache was filled
}

// newHotStore returns a hotStore with the given number of keys. The cache has space for twice this
// number, because the keys spread over the shards of the cache by chance, and every Verify must be
// a hit.
func newHotStore(ctx context.Context, e *Env, keys int) (*hotStore, error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	store, err := keystore.Open(filepath.Join(dir, "store"), peers.Options(2*keys))
	if err != nil {
		return nil, err
	}
	tokens, err := peers.Create(ctx, store, keys, keys, e.progress("creating keys"))
	if err != nil {
		return nil, errors.Join(err, store.Close())
	}
	hot := &hotStore{Store: store, tokens: tokens}
	rand.Shuffle(len(tokens), func(i, j int) { tokens[i], tokens[j] = tokens[j], tokens[i] })
	before := settledHeap()
	for range 2 { // the first pass fills the cache, and the second pass checks the cache
		for _, t := range tokens {
			if _, err := store.Verify(ctx, t); err != nil {
				return nil, errors.Join(err, store.Close())
			}
		}
	}
	hot.heap = (settledHeap() - before) / float64(keys)
	if store.Stats().Misses != uint64(keys) {
		return nil, errors.Join(errors.New("not every key is in the cache"), store.Close())
	}
	return hot, nil
}

// hotSize returns hotKeys, or fewer keys for a quick run. The result is a power of two, so that a
// mask makes a random index.
func (e *Env) hotSize() int {
	if e.Quick {
		return 1 << 10
	}
	return hotKeys
}

// verifyCases returns the cases of the verify workload. checks are the started peers.
func verifyCases(ctx context.Context, hot *hotStore, checks []*peers.Peer) []measure.Case {
	one := hot.tokens[0]
	plain := []byte(one)
	random := rand.New(rand.NewPCG(3, 4))
	cases := []measure.Case{
		{Name: caseSHA256, Do: func(n int) error {
			for range n {
				sha256.Sum256(plain)
			}
			return nil
		}},
		{Name: caseHot, Do: func(n int) error {
			for range n {
				if _, err := hot.Verify(ctx, one); err != nil {
					return err
				}
			}
			return nil
		}},
		{Name: caseRandom, Do: func(n int) error {
			mask := uint64(len(hot.tokens) - 1)
			for range n {
				if _, err := hot.Verify(ctx, hot.tokens[random.Uint64()&mask]); err != nil {
					return err
				}
			}
			return nil
		}},
	}
	cases = append(cases, randomCases(hot)...)
	for _, p := range checks {
		if p.Check == nil || p.Name == peers.APIKey { // the cases above measure APIKey
			continue
		}
		cases = append(cases, measure.Case{Name: p.Name, Do: func(n int) error {
			for range n {
				if err := p.Check(ctx, p.Good[0]); err != nil {
					return err
				}
			}
			return nil
		}})
	}
	return cases
}

// randomCases returns the references for random keys: the peers that keep their credentials in
// memory, and the least that a store of digests has to do.
func randomCases(hot *hotStore) []measure.Case {
	type principal struct{ name string }
	mask := uint64(len(hot.tokens) - 1)
	var (
		plain   = make([][]byte, len(hot.tokens))
		digests = make(map[[sha256.Size]byte]*principal)
		texts   = make(map[string]*principal)
		cache   = expirable.NewLRU[[sha256.Size]byte, *principal](len(hot.tokens), nil, time.Hour)
	)
	for i, t := range hot.tokens {
		plain[i] = []byte(t)
		digest, p := sha256.Sum256(plain[i]), &principal{t}
		digests[digest], texts[t] = p, p
		cache.Add(digest, p)
	}
	errLost := errors.New("a known credential is not found")
	each := func(name string, find func(i uint64) bool) measure.Case {
		random := rand.New(rand.NewPCG(3, 4))
		return measure.Case{Name: name, Do: func(n int) error {
			for range n {
				if !find(random.Uint64() & mask) {
					return errLost
				}
			}
			return nil
		}}
	}
	return []measure.Case{
		each(caseSHA256Random, func(i uint64) bool {
			return sha256.Sum256(plain[i]) != [sha256.Size]byte{}
		}),
		each(caseSHA256MapRandom, func(i uint64) bool {
			return digests[sha256.Sum256(plain[i])] != nil
		}),
		each(caseMapRandom, func(i uint64) bool { return texts[hot.tokens[i]] != nil }),
		each(caseLRURandom, func(i uint64) bool {
			p, ok := cache.Get(sha256.Sum256(plain[i]))
			return ok && p != nil
		}),
	}
}

func runVerify(ctx context.Context, e *Env) (o *Outcome, err error) {
	hot, err := newHotStore(ctx, e, e.hotSize())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, hot.Close()) }()
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	checks, skipped, err := peers.Start(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, peers.Close(checks)) }()
	cases := verifyCases(ctx, hot, checks)
	timed, err := measure.AllTimed(cases, 4*time.Millisecond)
	if err != nil {
		return nil, err
	}
	s, err := measure.Rounds(ctx, e.rounds(101), e.progress("verifying"), timed...)
	if err != nil {
		return nil, err
	}

	o = &Outcome{Skipped: skipped}
	o.judge(&verifyWork, "hit", measure.Ratios(s[caseHot], s[caseSHA256]))
	allocated := testing.AllocsPerRun(10_000, func() { _, _ = hot.Verify(ctx, hot.tokens[0]) })
	o.judge(&verifyWork, "hit-allocs", []float64{allocated})
	o.judge(&verifyWork, "hit-random", measure.Ratios(s[caseRandom], s[caseSHA256MapRandom]))
	o.judge(&verifyWork, "cached-key", []float64{hot.heap})
	for id, peer := range map[string]string{
		"jwt-hs256": peers.HS256, "jwt-es256": peers.ES256,
		"jwt-rs256": peers.RS256, "jwt-eddsa": peers.EdDSA,
	} {
		o.judge(&verifyWork, id, measure.Ratios(s[peer], s[caseHot]))
	}
	bars := chart.Bars{
		Name: "verify", Title: "Time to verify one credential",
		Note: "less is better; logarithmic", Log: true,
	}
	for _, c := range cases {
		o.figure(c.Name, Nanos, s[c.Name])
		median := measure.Median(s[c.Name])
		label, ours := c.Name, true
		switch c.Name {
		case caseHot:
			label = "grpc-api-key, one key"
		case caseRandom:
			label = "grpc-api-key, 65,536 keys at random"
		default:
			ours = false
		}
		bars.Add(label, median, Nanos.Format(median), ours)
	}
	bars.Sort(false)
	o.Charts = append(o.Charts, &bars)
	return o, nil
}
