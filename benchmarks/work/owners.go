package work

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The owners workload measures what an operator does with one customer: list the keys of the owner,
// read the events of a key, revoke all keys of the owner. The cost should follow the result, and
// not the size of the store. So the workload measures stores of several sizes, in turns. Each
// owner has 10 keys, which are spread over the whole store. The reference is a bare read of one
// record with Badger, from a copy of the same directory.
//
// PostgreSQL and Redis, with an index by owner, do the same work afterwards. Each is one database
// that grows from size to size.
var ownersWork = Workload{
	Name:  "owners",
	Title: "The keys of one owner, in stores of several sizes",
	About: "One goroutine. Each owner has 10 keys, spread over the whole store, and each call is " +
		"for a random owner or key. A bare read reads one record with Badger itself, from a copy " +
		"of the same directory. Ten Revokes revoke the 10 keys of an owner one after the other. " +
		"PostgreSQL and Redis have an index by owner, sync each change to the disk, and keep no " +
		"events.",
	Goals: []Goal{
		{
			ID: "list", Work: "List of the 10 keys of an owner, 1 M keys in the store / 10,000",
			Bound: atMost(1.5, Times),
		},
		{
			ID:    "list-bare",
			Work:  "1 M keys: List of the 10 keys of an owner / one bare Badger read",
			Bound: atMost(20, Times),
		},
		{
			ID: "events", Work: "Events of one key, 1 M keys in the store / 10,000",
			Bound: atMost(1.5, Times),
		},
		{
			ID: "events-bare", Work: "1 M keys: Events of one key / one bare Badger read",
			Bound: atMost(20, Times),
		},
		{
			ID: "revokeall", Work: "1 M keys: RevokeAll of the 10 keys of an owner / ten Revokes",
			Bound: atMost(1.2, Times),
		},
		{
			ID: "list-10m", Work: "List of the 10 keys of an owner, 10 M keys / 1 M",
			Bound: atMost(2, Times),
		},
		{ID: "events-10m", Work: "Events of one key, 10 M keys / 1 M", Bound: atMost(2, Times)},
		{
			ID: "revokeall-10m", Work: "RevokeAll of the 10 keys of an owner, 10 M keys / 1 M",
			Bound: atMost(2, Times),
		},
	},
}

func init() { ownersWork.Run = runOwners }

// The work that the owners workload measures.
const (
	ownerList      = "List of the 10 keys of an owner"
	ownerEvents    = "Events of one key"
	ownerGet       = "Get of one key"
	ownerBare      = "bare Badger read of one record"
	ownerRevokeAll = "RevokeAll of the 10 keys of an owner"
	ownerRevokes   = "ten Revokes, one after the other"
)

// sizesOfOwners returns the sizes of the stores.
func (e *Env) sizesOfOwners() (sizes []int) {
	if e.Quick {
		return []int{500, 2000}
	}
	for n := 1000; n <= e.Keys; n *= 10 {
		sizes = append(sizes, n)
	}
	return sizes
}

func ofSize(what string, keys int) string {
	return fmt.Sprintf("%s keys: %s", digits(float64(keys)), what)
}

// An ownersStore is an open store, with an open copy for bare reads.
type ownersStore struct {
	*sized
	store  *keystore.Store
	bare   *badger.DB
	at     uint64
	random *rand.Rand
	next   int // the number of the next owner whose keys may be revoked
}

// openOwners opens the store with the given number of keys.
func openOwners(ctx context.Context, e *Env, keys int, end *closer) (*ownersStore, error) {
	s, err := e.sized(ctx, keys)
	if err != nil {
		return nil, err
	}
	copied, err := e.copyOf(s)
	if err != nil {
		return nil, err
	}
	o := &ownersStore{sized: s, random: rand.New(rand.NewPCG(11, 12)), next: len(s.owned) / 2}
	if o.bare, err = badger.OpenManaged(bareOptions(copied)); err != nil {
		return nil, err
	}
	end.add(o.bare.Close)
	o.at = o.bare.MaxVersion()
	if o.store, err = keystore.Open(s.dir, peers.Options(0)); err != nil {
		return nil, err
	}
	end.add(o.store.Close)
	return o, nil
}

// key returns the ID of a random key of the owners whose keys are not revoked.
func (o *ownersStore) key() string {
	return o.owned[o.random.IntN(len(o.owned)/2)][o.random.IntN(keysOfOwner)]
}

func (o *ownersStore) list(ctx context.Context) error {
	n := 0
	owner := ownerName(o.random.IntN(len(o.owned) / 2))
	for _, err := range o.store.List(ctx, keystore.Query{Owner: owner}) {
		if err != nil {
			return err
		}
		n++
	}
	return exactly(n, keysOfOwner)
}

func (o *ownersStore) events(ctx context.Context) error {
	n := 0
	for _, err := range o.store.Events(ctx, keystore.EventQuery{KeyID: o.key()}) {
		if err != nil {
			return err
		}
		n++
	}
	return exactly(n, 1)
}

func (o *ownersStore) get(ctx context.Context) error {
	_, err := o.store.Get(ctx, o.key())
	return err
}

func (o *ownersStore) read(context.Context) error {
	id, ok := token.ParseID(o.key())
	if !ok {
		return errors.New("the ID of a key cannot be parsed")
	}
	return bareGet(o.bare, o.at, entryKey(id))
}

// take returns the number of an owner whose keys are not revoked yet.
func (o *ownersStore) take() (int, error) {
	if o.next == len(o.owned) {
		return 0, errNoKeys
	}
	o.next++
	return o.next - 1, nil
}

func (o *ownersStore) revokeAll(ctx context.Context) error {
	owner, err := o.take()
	if err != nil {
		return err
	}
	n, err := o.store.RevokeAll(ctx, keystore.Query{Owner: ownerName(owner)}, "measured", nil)
	if err != nil {
		return err
	}
	return exactly(n, keysOfOwner)
}

func (o *ownersStore) revokes(ctx context.Context) error {
	owner, err := o.take()
	if err != nil {
		return err
	}
	for _, id := range o.owned[owner] {
		if err := o.store.Revoke(ctx, id, "measured"); err != nil {
			return err
		}
	}
	return nil
}

// cases returns the work that changes nothing.
func (o *ownersStore) cases(ctx context.Context, keys int) []measure.Case {
	return []measure.Case{
		repeated(ctx, ofSize(ownerList, keys), o.list),
		repeated(ctx, ofSize(ownerEvents, keys), o.events),
		repeated(ctx, ofSize(ownerGet, keys), o.get),
		repeated(ctx, ofSize(ownerBare, keys), o.read),
	}
}

func exactly(n, want int) error {
	if n != want {
		return fmt.Errorf("the result has %d entries, but must have %d", n, want)
	}
	return nil
}

// repeated returns a case that calls f once for each operation.
func repeated(ctx context.Context, name string, f func(context.Context) error) measure.Case {
	return measure.Case{Name: name, Do: func(n int) error {
		for range n {
			if err := f(ctx); err != nil {
				return err
			}
		}
		return nil
	}}
}

// once returns a contestant that measures a single call of f, in nanoseconds.
func once(name string, f func(context.Context) error) measure.Contestant {
	return measure.Contestant{Name: name, Sample: func(ctx context.Context) (float64, error) {
		begin := time.Now()
		err := f(ctx)
		return float64(time.Since(begin).Nanoseconds()), err
	}}
}

// affordable returns the number of rounds that take about a minute, at least 5 and at most the
// given number. affordable measures one round.
func (e *Env) affordable(
	ctx context.Context, most int, contestants []measure.Contestant,
) (int, error) {
	if e.Quick {
		return e.rounds(most), nil
	}
	begin := time.Now()
	for _, c := range contestants {
		if _, err := c.Sample(ctx); err != nil {
			return 0, fmt.Errorf("%s: %w", c.Name, err)
		}
	}
	return max(5, min(most, int(time.Minute/max(1, time.Since(begin))))), nil
}

func runOwners(ctx context.Context, e *Env) (o *Outcome, err error) {
	var end closer
	defer end.into(&err)
	var (
		sizes   = e.sizesOfOwners()
		cases   []measure.Case
		revoked []measure.Contestant
	)
	for _, keys := range sizes {
		s, err := openOwners(ctx, e, keys, &end)
		if err != nil {
			return nil, err
		}
		cases = append(cases, s.cases(ctx, keys)...)
		revoked = append(revoked,
			once(ofSize(ownerRevokeAll, keys), s.revokeAll),
			once(ofSize(ownerRevokes, keys), s.revokes))
	}
	timed, err := measure.AllTimed(cases, 2*time.Millisecond)
	if err != nil {
		return nil, err
	}
	rounds, err := e.affordable(ctx, 101, timed)
	if err != nil {
		return nil, err
	}
	s, err := measure.Rounds(ctx, rounds, e.progress("reading the keys of owners"), timed...)
	if err != nil {
		return nil, err
	}
	// Each round takes two owners of each store. The smallest store has 50 such owners.
	if rounds, err = e.affordable(ctx, 21, revoked); err != nil {
		return nil, err
	}
	changed, err := measure.Rounds(
		ctx, rounds, e.progress("revoking the keys of owners"), revoked...)
	if err != nil {
		return nil, err
	}
	for name, samples := range changed {
		s[name] = samples
	}
	o = &Outcome{}
	judgeOwners(o, s)
	if err := ownersOfPeers(ctx, e, o, sizes, s); err != nil {
		return nil, err
	}
	what := append([]string{
		ownerList, ownerEvents, ownerGet, ownerBare, ownerRevokeAll, ownerRevokes,
	}, peerWork...)
	for _, w := range what {
		for _, keys := range sizes {
			name := ofSize(w, keys)
			o.figure(name, Nanos, s[name])
		}
	}
	ownersCharts(o, sizes, s)
	return o, nil
}

func judgeOwners(o *Outcome, s measure.Samples) {
	w := &ownersWork
	ratio := func(id, a string, aKeys int, b string, bKeys int) {
		over, under := s[ofSize(a, aKeys)], s[ofSize(b, bKeys)]
		switch {
		case over != nil && under != nil:
			o.judge(w, id, measure.Ratios(over, under))
		case max(aKeys, bKeys) > million:
			o.skip(w, id, "this measurement needs -keys 10000000, "+
				"some 10 GB of disk, and 20 more minutes")
		default:
			o.skip(w, id, "this measurement needs -keys 1000000, without -quick")
		}
	}
	ratio("list", ownerList, million, ownerList, 10_000)
	ratio("list-bare", ownerList, million, ownerBare, million)
	ratio("events", ownerEvents, million, ownerEvents, 10_000)
	ratio("events-bare", ownerEvents, million, ownerBare, million)
	ratio("revokeall", ownerRevokeAll, million, ownerRevokes, million)
	ratio("list-10m", ownerList, tenMillion, ownerList, million)
	ratio("events-10m", ownerEvents, tenMillion, ownerEvents, million)
	ratio("revokeall-10m", ownerRevokeAll, tenMillion, ownerRevokeAll, million)
}

// The work of the peers.
const (
	peerList      = "SELECT of the 10 keys of an owner, " + peers.PostgreSQLTable
	peerGet       = "SELECT of one key, " + peers.PostgreSQLTable
	peerRevokeAll = "UPDATE of the 10 keys of an owner, " + peers.PostgreSQLTable

	redisList      = "SMEMBERS and HGETALL of the 10 keys of an owner, Redis"
	redisGet       = "HGETALL of one key, Redis"
	redisRevokeAll = "SMEMBERS and HSET of the 10 keys of an owner, " + peers.RedisAlways
)

var peerWork = []string{
	peerList, redisList, peerGet, redisGet, peerRevokeAll, redisRevokeAll,
}

// ownersOfPeers measures the peers, and adds the samples to s.
func ownersOfPeers(
	ctx context.Context, e *Env, o *Outcome, sizes []int, s measure.Samples,
) (err error) {
	dir, err := e.temp()
	if err != nil {
		return err
	}
	tables, skipped, err := peers.StartTables(
		ctx, dir, 4, true, peers.PostgreSQLTable, peers.RedisAlways)
	if err != nil {
		return err
	}
	var end closer
	defer end.into(&err)
	end.add(func() error { return peers.CloseTables(tables) })
	o.Skipped = append(o.Skipped, skipped...)
	for _, t := range tables {
		o.note("%s: %s.", t.Name, t.How)
		full := 0
		for _, keys := range sizes {
			e.progress("filling "+t.Name)(full, keys)
			owners := (keys - full) / keysOfOwner
			owner := func(i int) string { return fmt.Sprintf("%d-%s", keys, ownerName(i%owners)) }
			ids, err := t.Fill(ctx, keys-full, owner)
			if err != nil {
				return fmt.Errorf("%s: %w", t.Name, err)
			}
			full = keys
			measured, err := ownersOfTable(ctx, e, t, keys, owners, owner, ids)
			if err != nil {
				return err
			}
			for name, samples := range measured {
				s[name] = samples
			}
		}
	}
	return nil
}

// ownersOfTable measures a table with the given number of keys. The last keys belong to the owners.
func ownersOfTable(
	ctx context.Context, e *Env, t *peers.Table, keys, owners int, owner func(i int) string,
	ids []string,
) (measure.Samples, error) {
	list, get, revokeAll := peerList, peerGet, peerRevokeAll
	if t.Name == peers.RedisAlways {
		list, get, revokeAll = redisList, redisGet, redisRevokeAll
	}
	random := rand.New(rand.NewPCG(13, 14))
	timed, err := measure.AllTimed([]measure.Case{
		repeated(ctx, ofSize(list, keys), func(ctx context.Context) error {
			n, err := t.List(ctx, owner(random.IntN(owners)))
			if err != nil {
				return err
			}
			return exactly(n, keysOfOwner)
		}),
		repeated(ctx, ofSize(get, keys), func(ctx context.Context) error {
			return t.Get(ctx, ids[random.IntN(len(ids))])
		}),
	}, 2*time.Millisecond)
	if err != nil {
		return nil, err
	}
	next := 0
	timed = append(timed, once(ofSize(revokeAll, keys), func(ctx context.Context) error {
		n, err := t.RevokeOwner(ctx, owner(next))
		next++
		if err != nil {
			return err
		}
		return exactly(n, keysOfOwner)
	}))
	return measure.Rounds(ctx, e.rounds(31), e.progress("measuring "+t.Name), timed...)
}

func ownersCharts(o *Outcome, sizes []int, s measure.Samples) {
	draw := func(name, title string, what ...string) {
		lines := chart.Lines{
			Name: name, Title: title, X: digits, Y: duration,
			Note: "time by the number of keys in the store; less is better",
		}
		for _, w := range what {
			var points []chart.Point
			for _, keys := range sizes {
				if samples := s[ofSize(w, keys)]; samples != nil {
					median := measure.Median(samples)
					points = append(points, chart.Point{X: float64(keys), Y: median})
				}
			}
			label, ours := w, w != ownerBare
			if slices.Contains(peerWork, w) {
				_, label, _ = strings.Cut(w, ", ")
				ours = false
			}
			lines.Add(label, ours, points...)
		}
		o.Charts = append(o.Charts, &lines)
	}
	draw("owners-list", "Reading what belongs to one owner",
		ownerList, ownerEvents, ownerBare, peerList, redisList)
	draw("owners-get", "Reading one key", ownerGet, ownerBare, peerGet, redisGet)
	draw("owners-revoke", "Revoking the keys of one owner",
		ownerRevokeAll, ownerRevokes, peerRevokeAll, redisRevokeAll)
}
