package keystore

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A creditOp is one call about the credits of a key, and what came of the call.
type creditOp struct {
	kind   string // opSpend, opSetCredits, opAddCredits or opReadCredits
	n      int64  // the cost, or what is set or added, or what was read
	refill Refill // that is set
	result string // isOK, isExhausted or inDoubt

	client, process int
	call, ret       int64
}

const (
	opSpend       = "spend"
	opSetCredits  = "set"
	opAddCredits  = "add"
	opReadCredits = "read"
	opCountAll    = "read all" // no process has a lease
	isExhausted   = "exhausted"
)

func (o *creditOp) String() string {
	text := fmt.Sprintf("%s %d: %s", o.kind, o.n, o.result)
	if o.refill != (Refill{}) {
		text += fmt.Sprintf(", refill %+v", o.refill)
	}
	return text
}

// A creditState is what the model knows of a key. A lease is no part of the state: a credit is spent
// or not, wherever the credit is.
type creditState struct {
	left   int64 // not spent; with loss, at most
	refill Refill
	// The time of the last refill lies from since to until: they differ after a SetCredits.
	since, until int64
	alone        bool // there is one process, so each refusal is exact
	loss         bool // leases may have been lost
}

// nextRefill returns the time of the refill after a time.
func nextRefill(r Refill, after int64) int64 {
	switch {
	case r.Every > 0:
		return after + int64(r.Every)
	case r.Daily:
		const day = int64(24 * time.Hour)
		return after - after%day + day
	}
	return math.MaxInt64
}

// slack is by how much a moment of a history may differ from the clock.
const slack = int64(time.Microsecond)

// refilled returns the states in which the store may be while an op is called. A refill that was due
// before the call has been made, and a refill that is due before the return may have been made.
func (s creditState) refilled(o *creditOp) (all []creditState) {
	for {
		from, to := nextRefill(s.refill, s.since), nextRefill(s.refill, s.until)
		if to >= o.call-slack {
			all = append(all, s)
		}
		if from > o.ret+slack {
			return all
		}
		s.left, s.since, s.until = s.refill.Amount, from, to
	}
}

// step returns whether o can have been answered as it was in state s, and the state afterwards.
func (s creditState) step(o *creditOp) (bool, creditState) {
	next := s
	switch o.kind {
	case opSpend:
		if o.result == isExhausted {
			return !s.alone || s.loss || s.left < o.n, s // another process may have leased the rest
		}
		next.left -= o.n
		return s.left >= o.n, next
	case opSetCredits:
		next.left, next.refill, next.since, next.until = o.n, o.refill, o.call, o.ret
		return true, next
	case opAddCredits:
		next.left += o.n
		return true, next
	case opReadCredits:
		return o.n <= s.left, s // a lease may be on its way, or another process may have one
	case opCountAll:
		return o.n == s.left || o.n < s.left && s.loss, s
	}
	return false, s
}

func creditModel(first creditState) porcupine.Model {
	return (&porcupine.NondeterministicModel{
		Init: func() []any { return []any{first} },
		Step: func(s, in, _ any) (all []any) {
			o := in.(*creditOp)
			for _, s := range s.(creditState).refilled(o) {
				if ok, next := s.step(o); ok {
					all = append(all, next)
				}
				if o.result == inDoubt {
					all = append(all, s)
				}
			}
			return all
		},
		DescribeOperation: func(in, _ any) string { return fmt.Sprint(in) },
		DescribeState:     func(s any) string { return fmt.Sprintf("%+v", s) },
	}).ToModel()
}

// A creditRound is a history of the credits of one key, in one process or in several.
type creditRound struct {
	*fleet
	historyClock
	wrong   variant
	key     *Issued
	first   creditState
	lossy   bool // a process is cut off for a while, and may lose a lease
	restart bool // a process is closed, and another one opened
	healed  int64

	mu      sync.Mutex // guards all below
	rng     *rand.Rand
	members []*member
	ops     []*creditOp
	strange error
}

func (r *creditRound) int(n int64) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.rng.Int64N(n)
}

func (r *creditRound) sleep(most time.Duration) { time.Sleep(time.Duration(r.int(int64(most)))) }

// member returns the process with a number, which may be a later process than before.
func (r *creditRound) member(n int) *member {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.members[n]
}

// openMember opens a process whose writes of credits are slow, and whose answers are lost sometimes.
func (r *creditRound) openMember() *member {
	m := r.openWrong(nil, r.wrong)
	m.onApply(func(ctx context.Context, changes []backend.Change,
		next func(context.Context) error) error {
		credits := slices.ContainsFunc(changes, func(c backend.Change) bool {
			return c.Key[0] == creditSpace
		})
		if !credits {
			return next(ctx)
		}
		lose := r.int(24)
		r.sleep(10 * time.Millisecond)
		if lose == 0 {
			return errors.New("the write is lost")
		}
		err := next(ctx)
		r.sleep(10 * time.Millisecond)
		if lose == 1 && err == nil {
			err = errors.New("the answer is lost")
		}
		return err
	})
	return m
}

// do records a call.
func (r *creditRound) do(o creditOp, call func() (int64, error)) {
	o.call = r.moment()
	n, err := call()
	o.ret = r.moment()
	if o.kind == opReadCredits || o.kind == opCountAll {
		o.n = n
	}
	switch {
	case err == nil:
		o.result = isOK
	case errors.As(err, new(*CreditsError)):
		o.result = isExhausted
	case !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrClosed):
		r.mu.Lock()
		defer r.mu.Unlock()
		r.strange = errors.Join(r.strange, err)
		return
	case o.kind == opSpend && errors.Is(err, ErrClosed), o.kind == opAddCredits,
		o.kind == opSetCredits:
		o.result = inDoubt
	default:
		return // nothing was done
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, &o)
}

// client makes some calls in a process.
func (r *creditRound) client(id, process int) {
	var key *Key // of an earlier Verify
	of := (*member)(nil)
	for range creditOps {
		r.sleep(150 * time.Millisecond)
		m, ctx := r.member(process), context.Background()
		o := creditOp{client: id, process: process, kind: opSpend, n: 1 + r.int(3)}
		switch x := r.int(100); {
		case x < 40 && m == of:
			r.do(o, func() (int64, error) { return 0, key.Spend(ctx, o.n) })
		case x < 80:
			r.do(o, func() (int64, error) {
				k, err := m.Verify(WithCost(ctx, o.n), r.key.Secret.Reveal())
				if err == nil && of != m {
					key, of = k, m
				}
				return 0, err
			})
		case x < 88:
			o.kind, o.n = opAddCredits, 1+r.int(40)
			r.do(o, func() (int64, error) {
				_, err := m.AddCredits(ctx, r.key.Key.ID, o.n)
				return 0, err
			})
		case x < 92:
			o.kind, o.n, o.refill = opSetCredits, r.int(60), r.first.refill
			r.do(o, func() (int64, error) {
				return 0, m.SetCredits(ctx, r.key.Key.ID, &Credits{o.n, o.refill})
			})
		default:
			r.read(m, id, opReadCredits)
		}
	}
}

func (r *creditRound) read(m *member, client int, kind string) {
	r.do(creditOp{client: client, kind: kind}, func() (int64, error) {
		c, err := m.Credits(context.Background(), r.key.Key.ID)
		if err != nil {
			return 0, err
		}
		return c.Remaining, nil
	})
}

const (
	creditClients = 3 // of each process
	creditOps     = 20
)

// play plays the round. The midnight that a daily refill needs is within the first two seconds.
func (r *creditRound) play() {
	time.Sleep(24*time.Hour - time.Second - time.Duration(r.int(int64(time.Second))))
	processes := roundProcesses
	gap := r.wrong == noCreditHold // such a store is wrong in these rounds only
	if r.first.alone = r.int(3) == 0 && !gap; r.first.alone {
		processes = 1
	}
	for range processes {
		r.members = append(r.members, r.openMember())
	}
	switch r.int(4) {
	case 0:
		r.first.refill = Refill{Amount: 1 + r.int(60), Every: time.Second}
	case 1:
		r.first.refill = Refill{Amount: 1 + r.int(60), Daily: true}
	}
	if !r.first.alone {
		r.lossy, r.restart = r.int(3) == 0 || gap, r.int(2) == 0
	}
	r.first.left, r.first.loss = 20+r.int(200), r.lossy
	r.first.since = r.moment()
	key, err := r.members[0].Create(context.Background(),
		Spec{Name: "credits", Credits: &Credits{r.first.left, r.first.refill}})
	for errors.Is(err, ErrUnavailable) { // its answer was lost
		r.first.since = r.moment()
		key, err = r.members[0].Create(context.Background(),
			Spec{Name: "credits", Credits: &Credits{r.first.left, r.first.refill}})
	}
	require.NoError(r, err)
	r.key, r.first.until = key, r.moment()
	each := creditClients
	if r.lossy {
		each = 1 // calls that wait for the process would make the search of the checker long
	}
	var clients sync.WaitGroup
	for process := range processes {
		for n := range each {
			clients.Go(func() { r.client(process*creditClients+n, process) })
		}
	}
	if r.lossy {
		r.cut(processes - 1)
	}
	if r.restart {
		r.sleep(2 * time.Second)
		m, old := r.openMember(), r.member(0)
		r.mu.Lock()
		r.members[0] = m
		r.mu.Unlock()
		require.NoError(r, old.Close())
	}
	clients.Wait()
	time.Sleep(10 * time.Minute) // what was leased is back
	r.read(r.member(0), 0, opCountAll)
}

// cut cuts a process off for so long that it is evicted, or not. Meanwhile another process sets the
// credits. Afterwards the first process spends with a Key that it had before.
func (r *creditRound) cut(process int) {
	m, ctx, id := r.member(process), context.Background(), -1
	key, err := m.Verify(WithCost(ctx, 0), r.key.Secret.Reveal())
	for err != nil {
		key, err = m.Verify(WithCost(ctx, 0), r.key.Secret.Reveal())
	}
	spend := func(times int64) {
		for range times {
			r.do(creditOp{client: id, process: process, kind: opSpend, n: 1},
				func() (int64, error) { return 0, key.Spend(ctx, 1) })
		}
	}
	spend(r.int(60))
	faults := badlink.Faults{Drop: true, Silent: true}
	if r.int(2) == 0 {
		faults = badlink.Faults{Drop: true, FeedError: backend.ErrGap}
	}
	m.link.Set(faults)
	r.sleep(2 * testFreshness)
	n := r.int(5)
	r.do(creditOp{client: id, kind: opSetCredits, n: n, refill: r.first.refill},
		func() (int64, error) {
			return 0, r.member(0).SetCredits(ctx, r.key.Key.ID, &Credits{n, r.first.refill})
		})
	r.sleep(6 * testFreshness)
	m.link.Set(badlink.Faults{})
	time.Sleep(100 * time.Millisecond)
	r.healed = r.moment()
	m.awaitFresh()
	spend(20)
}

// verdict returns what is wrong with the history.
func (r *creditRound) verdict(seed uint64) error {
	if r.strange != nil {
		return fmt.Errorf("seed %d: %w", seed, r.strange)
	}
	var history []porcupine.Operation
	var text strings.Builder
	for _, o := range r.ops {
		end := o.ret
		if o.result == inDoubt && o.process == roundProcesses-1 {
			end = max(end, r.healed) // a request that was on its way arrives then
		}
		history = append(history, porcupine.Operation{ClientId: o.client, Input: o, Call: o.call,
			Return: end})
		fmt.Fprintf(&text, "%v +%v client %d %v\n", time.Unix(0, o.call).UTC().Format(time.TimeOnly+
			".000000"), time.Duration(o.ret-o.call), o.client, o)
	}
	switch porcupine.CheckOperationsTimeout(creditModel(r.first), history, hang) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return fmt.Errorf("seed %d: %+v: the checker did not come to an end\n%s", seed, r.first, &text)
	}
	return &violation{fmt.Sprintf("seed %d: %+v: not linearizable", seed, r.first), text.String()}
}

// playCredits plays one round, and counts what the ops came to.
func playCredits(t *testing.T, seed uint64, wrong variant, count tally) error {
	r := &creditRound{wrong: wrong, rng: rand.New(rand.NewPCG(seed, 3))}
	fleetTest(t, func(t *testing.T, f *fleet) {
		r.fleet = f
		r.play()
	})
	for _, o := range r.ops {
		count[o.kind+" "+o.result]++
	}
	return r.verdict(seed)
}

// Credits are linearizable, in one process and in several: no credit is spent twice, none is lost
// while no process loses contact, a SetCredits is not undone, and a refill sets. The long run is
//
//	go test ./keystore -run LinearizableCredits -seeds 20000 -timeout 0
func TestLinearizableCredits(t *testing.T) {
	seed, count, began := seedOf(), make(tally), time.Now()
	for n := range uint64(*seeds) {
		require.NoError(t, playCredits(t, seed+n, 0, count),
			"again: go test ./keystore -run LinearizableCredits -seeds 1 -seed %d", seed+n)
	}
	t.Logf("what the rounds came to:\n%v", count)
	operations := 0
	for _, n := range count {
		operations += n
	}
	figures.Record(t, "%d rounds from seed %d, %d operations, %.0f rounds a minute: 0 violations",
		*seeds, seed, operations, float64(*seeds)/time.Since(began).Minutes())
}

// Each wrong store is caught, by the same code.
func TestLinearizableCreditsCatches(t *testing.T) {
	if RaceEnabled {
		t.Skip("the race detector takes ten times as long for a round, and finds nothing more here")
	}
	for name, wrong := range map[string]variant{
		"a process does not note SetCredits":   noCreditNote,
		"a lost answer takes a lease again":    blindCredits,
		"leases are valid after a gap":         noCreditHold,
		"what is given back undoes SetCredits": blindGiveBack,
		"a lease overwrites AddCredits":        blindBalance,
		"a lease remains valid after a refill": noRefillEnd,
	} {
		t.Run(name, func(t *testing.T) {
			caught(t, func(seed uint64) error { return playCredits(t, seed, wrong, make(tally)) })
		})
	}
}
