package keystore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// A player plays clients of one store, and has every op recorded, twice: when it is about to be
// called, without a Return, and when it has returned.
type player struct {
	store  *Store
	opens  int // how many times the store had been opened in this history: a part of the seed
	seed   uint64
	last   *atomic.Int32 // op's number
	record func(o op, secret string)
	final  bool // keys may be revoked now as often as not: the history does not go on
	deaf   bool // wrong: what Bind gives out does not end

	// Only for a history of several processes:

	// process is the number of the process, from 1. Each opening of a store has its own.
	process int
	// limited returns the context of a call. nil means that no context of a call ends.
	limited func() (context.Context, context.CancelFunc)
	moment  func() int64 // the clock of the history; nil: now
	peers   []*player    // one of them looks at a key after a change; nil: the player itself
	resume  func()       // waits while the process is stopped; set with limited

	mu   *sync.Mutex // guards keys; one lock for all players of a trial
	keys []*played
}

// now returns the present moment of the history.
func (p *player) now() int64 {
	if p.moment != nil {
		return p.moment()
	}
	return now()
}

// A played is a key with its secrets, the youngest last.
type played struct {
	ID      string
	Secrets []numbered
	bound   []bound
	seen    atomic.Uint64 // a revision that a client has seen not long ago
}

type numbered struct {
	N    int32 // of the op that made it
	Text string
}

type bound struct {
	op      op
	ctx     context.Context
	release context.CancelFunc
}

func now() int64 { return time.Now().UnixNano() }

// resultOf names what the store answered. What is not foreseen is named so that no model knows it.
func resultOf(o *op, err error) string {
	read := o.reads()
	switch {
	case err == nil:
		return isOK
	case errors.Is(err, errAbsent):
		return isAbsent
	case errors.Is(err, ErrCorrupt), errors.Is(err, ErrNotFound):
		return "impossible: " + err.Error()
	case errors.Is(err, ErrUnavailable), errors.Is(err, ErrClosed):
		if read {
			return isNothing
		}
		return inDoubt
	case errors.Is(err, ErrKeyRevoked) && !read:
		return isRevoked
	case errors.Is(err, ErrRevoked) && !read && o.Kind != opSample:
		return "impossible: " + err.Error()
	}
	for result, known := range map[string]error{
		isUnknown: ErrUnknown, isRevoked: ErrRevoked, isExpired: ErrExpired,
		isDisabled: ErrDisabled, isNarrowed: ErrNarrowed, isInvalid: ErrInvalid,
		isConflict: ErrConflict,
	} {
		if errors.Is(err, known) {
			return result
		}
	}
	return "impossible: " + err.Error()
}

// do calls f as an op.
func (p *player) do(o op, f func(ctx context.Context) (*Key, string, error)) op {
	parent := context.Background()
	if p.limited != nil {
		p.resume()
		var cancel context.CancelFunc
		parent, cancel = p.limited()
		defer cancel()
	}
	o.N, o.Process = p.last.Add(1), p.process
	o.Call = p.now()
	p.record(o, "")
	ctx := WithActor(parent, strconv.Itoa(int(o.N)))
	if o.If != 0 {
		ctx = IfRevision(ctx, o.If)
	}
	key, secret, err := f(ctx)
	if parent.Err() != nil && errors.Is(err, parent.Err()) {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err) // the answer is not known
	}
	o.Return = p.now()
	o.Result, o.Closing = resultOf(&o, err), errors.Is(err, ErrClosed)
	if err == nil && key != nil {
		o.Revision, o.ExpiresAt = key.Revision, toNanos(key.ExpiresAt)
		o.Until = toNanos(key.PreviousUntil)
	}
	p.record(o, secret)
	if o.Revision != 0 {
		if k := p.played(o.Key); k != nil {
			k.seen.Store(o.Revision)
		}
	}
	return o
}

// played returns the key with a number, or nil before the Create of the key has returned.
func (p *player) played(n int) *played {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.keys[n]
}

// create makes a key of an owner, for the first time that the history opens the store.
func (p *player) create(client, n int, owner string, expires int64) {
	var issued *Issued
	o := p.do(op{Client: client, Key: n, Kind: opCreate, SetExpires: true, Expires: expires,
		Owner: owner},
		func(ctx context.Context) (*Key, string, error) {
			spec := Spec{Name: "linearizable", Owner: owner, ExpiresAt: fromNanos(expires)}
			var err error
			if issued, err = p.store.Create(ctx, spec); err != nil {
				return nil, "", err
			}
			return issued.Key, issued.Key.ID + " " + issued.Secret.Reveal(), nil
		})
	if o.Result == isOK {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.keys[n] = &played{ID: issued.Key.ID, Secrets: []numbered{{o.N, issued.Secret.Reveal()}}}
	}
}

// play has clients make so many ops each. It returns when all are through.
func (p *player) play(clients, ops int) {
	p.makeKeys()
	p.runClients(0, clients, ops)
}

// makeKeys makes the keys of the history, or looks at them once if they exist.
func (p *player) makeKeys() {
	var wg sync.WaitGroup
	for n, k := range p.keys {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(p.seed, uint64(1000*p.opens+100+n)))
			if k == nil {
				expires := int64(0)
				if r.IntN(4) == 0 {
					expires = now() + int64(2*time.Millisecond) +
						r.Int64N(int64(8*time.Millisecond))
				}
				p.create(n, n, p.owner(n), expires)
			} else {
				p.get(n, n)
			}
		})
	}
	wg.Wait()
}

// runClients has the clients from first to end make so many ops each.
func (p *player) runClients(first, end, ops int) {
	var wg sync.WaitGroup
	for client := first; client < end; client++ {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(p.seed, uint64(1000*p.opens+client)))
			for i := 0; i < ops && p.store.serving() == nil; i++ {
				p.one(client, r, p.final && 2*i > ops)
			}
		})
	}
	wg.Wait()
}

// one makes one op, and looks at the contexts that it may have ended.
func (p *player) one(client int, r *rand.Rand, late bool) {
	n := min(r.IntN(len(p.keys)), r.IntN(len(p.keys))) // some are used more
	k := p.keys[n]
	if k == nil {
		return // its Create has failed
	}
	change := op{Client: client, Key: n}
	if r.IntN(4) == 0 {
		change.If = k.seen.Load() // 0 before any revision was seen
	}
	switch x := r.IntN(100); {
	case x < 40:
		p.verify(client, n, p.secret(r, n))
		return
	case x < 52:
		p.bind(client, n, p.secret(r, n))
		return
	case x < 55:
		p.get(client, n)
		return
	case x < 58 && r.IntN(3) > 0:
		p.list(client, n, p.owner(r.IntN(2)))
		return
	case x < 58:
		p.events(client, n)
		return
	case x < 64:
		p.sample(client, n)
		return
	case x < 78:
		change.Kind = opUpdate
		change.SetExpires = r.IntN(2) == 0
		if change.SetExpires && r.IntN(2) == 0 {
			change.Expires = now() + int64(time.Millisecond) + r.Int64N(int64(6*time.Millisecond))
		}
		if r.IntN(2) == 0 {
			change.Owner = p.owner(r.IntN(2))
		}
		p.update(change)
	case x < 85:
		change.Kind = opRotate
		if r.IntN(3) > 0 {
			change.Grace = 1 + r.Int64N(int64(5*time.Millisecond))
		}
		p.rotate(change)
	case x < 90:
		change.Kind = opDisable
		p.do(change, func(ctx context.Context) (*Key, string, error) {
			return nil, "", p.store.Disable(ctx, k.ID, "")
		})
	case x < 96 || !late && x < 99:
		change.Kind = opEnable
		p.do(change, func(ctx context.Context) (*Key, string, error) {
			return nil, "", p.store.Enable(ctx, k.ID)
		})
	default:
		change.Kind = opRevoke
		p.do(change, func(ctx context.Context) (*Key, string, error) {
			return nil, "", p.store.Revoke(ctx, k.ID, "")
		})
	}
	p.sample(client, n)
	other := p
	if len(p.peers) > 0 {
		other = p.peers[r.IntN(len(p.peers))]
	}
	other.verify(client, n, other.secret(r, n))
}

// secret picks one of a key's: mostly the present one, or the one before.
func (p *player) secret(r *rand.Rand, n int) numbered {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.keys[n].Secrets
	back := 0
	switch x := r.IntN(10); {
	case x >= 9:
		back = r.IntN(len(all))
	case x >= 6:
		back = 1
	}
	return all[max(0, len(all)-1-back)]
}

func (p *player) verify(client, n int, secret numbered) {
	p.do(op{Client: client, Key: n, Kind: opVerify, Secret: secret.N},
		func(ctx context.Context) (*Key, string, error) {
			key, err := p.store.Verify(ctx, secret.Text)
			return key, "", err
		})
}

func (p *player) get(client, n int) {
	p.do(op{Client: client, Key: n, Kind: opGet}, func(ctx context.Context) (*Key, string, error) {
		key, err := p.store.Get(ctx, p.keys[n].ID)
		return key, "", err
	})
}

// owner returns one of the two owners of the keys of the history.
func (p *player) owner(n int) string { return fmt.Sprintf("%d of %d", n%2, p.seed) }

// errAbsent means that a list did not have the key.
var errAbsent = errors.New("the list does not have the key")

// list looks for a key among the keys of an owner.
func (p *player) list(client, n int, owner string) {
	p.do(op{Client: client, Key: n, Kind: opList, Owner: owner},
		func(ctx context.Context) (*Key, string, error) {
			var found *Key
			for k, err := range p.store.List(ctx, Query{Owner: owner}) {
				if err != nil {
					return nil, "", err
				}
				if k.ID == p.keys[n].ID {
					found = k
				}
			}
			if found == nil {
				return nil, "", errAbsent
			}
			return found, "", nil
		})
}

// events looks for the last event of a key.
func (p *player) events(client, n int) {
	p.do(op{Client: client, Key: n, Kind: opEvents},
		func(ctx context.Context) (*Key, string, error) {
			last := new(Key)
			for e, err := range p.store.Events(ctx, EventQuery{KeyID: p.keys[n].ID}) {
				if err != nil {
					return nil, "", err
				}
				if e.Revision != last.Revision+1 {
					return nil, "", fmt.Errorf("revision %d follows %d", e.Revision, last.Revision)
				}
				last.Revision = e.Revision
			}
			return last, "", nil
		})
}

func (p *player) bind(client, n int, secret numbered) {
	var b bound
	b.op = p.do(op{Client: client, Key: n, Kind: opBind, Secret: secret.N},
		func(ctx context.Context) (key *Key, _ string, err error) {
			// The session ends with its context, and the context of the call ends with the call.
			b.ctx, key, b.release, err = parts(p.store.Bind(context.WithoutCancel(ctx),
				secret.Text))
			if p.deaf && err == nil {
				b.ctx = context.WithoutCancel(b.ctx)
			}
			return key, "", err
		})
	if b.op.Result == isOK {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.keys[n].bound = append(p.keys[n].bound, b)
	}
}

func (p *player) update(o op) {
	p.do(o, func(ctx context.Context) (*Key, string, error) {
		number, _ := actorOf(ctx)
		key, err := p.store.Update(ctx, p.keys[o.Key].ID, func(spec *Spec) error {
			spec.Metadata["by"] = number
			if o.SetExpires {
				spec.ExpiresAt = fromNanos(o.Expires)
			}
			if o.Owner != "" {
				spec.Owner = o.Owner
			}
			return nil
		})
		return key, "", err
	})
}

func (p *player) rotate(o op) {
	k := p.keys[o.Key]
	secret := ""
	o = p.do(o, func(ctx context.Context) (*Key, string, error) {
		issued, err := p.store.Rotate(ctx, k.ID, time.Duration(o.Grace))
		if err != nil {
			return nil, "", err
		}
		secret = issued.Secret.Reveal()
		return issued.Key, secret, nil
	})
	if o.Result == isOK {
		p.mu.Lock()
		defer p.mu.Unlock()
		k.Secrets = append(k.Secrets, numbered{o.N, secret})
	}
}

// sample looks at the youngest contexts under a key.
func (p *player) sample(client, n int) {
	p.mu.Lock()
	all := p.keys[n].bound
	p.mu.Unlock()
	for _, b := range all[max(0, len(all)-4):] {
		p.sampleOne(client, b)
	}
}

func (p *player) sampleOne(client int, b bound) {
	o := op{N: p.last.Add(1), Client: client, Process: b.op.Process, Key: b.op.Key, Kind: opSample,
		Bound: b.op.N, Call: p.now()}
	cause := causeOfEnd(b.ctx, o.N%2 == 0)
	o.Return = p.now()
	switch {
	case cause == nil:
		o.Result = isAlive
	case errors.Is(cause, ErrUnavailable):
		o.Result = isStale
	case errors.Is(cause, ErrClosed):
		o.Result = isClosed
	default:
		o.Result = resultOf(&o, cause)
	}
	p.record(o, "")
}

// causeOfEnd returns why a context has ended, or nil: as each message of a stream asks the context,
// or as a handler does.
func causeOfEnd(ctx context.Context, message bool) error {
	if b, ok := ctx.(*boundContext); ok && message {
		return b.Cause()
	}
	return context.Cause(ctx)
}

// sampleAll looks at all contexts that there are.
func (p *player) sampleAll() {
	var all []bound
	p.mu.Lock()
	for _, k := range p.keys {
		if k != nil {
			all = append(all, k.bound...)
		}
	}
	p.mu.Unlock()
	for _, b := range all {
		p.sampleOne(0, b)
	}
}

// release lets go of all contexts.
func (p *player) release() {
	for _, k := range p.keys {
		if k != nil {
			for _, b := range k.bound {
				b.release()
			}
			k.bound = nil
		}
	}
}

// close closes the store, as an op.
func (p *player) close() error {
	o := op{N: p.last.Add(1), Process: p.process, Key: -1, Kind: opClose, Call: p.now(),
		Result: isOK}
	err := p.store.Close()
	o.Return = p.now()
	p.record(o, "")
	return err
}

// A history collects what players record.
type history struct {
	mu  sync.Mutex
	ops []*op
}

func (h *history) record(o op, _ string) {
	if o.Return == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, &o)
}

// serialOf reads from the events what a key went through: each change says its number in them.
func serialOf(events []Event, ops []*op) (serial, error) {
	byNumber := make(map[string]*op, len(ops))
	for _, o := range ops {
		byNumber[strconv.Itoa(int(o.N))] = o
	}
	if len(events) == 0 {
		return nil, errors.New("there is no event")
	}
	var all serial
	var last state
	for _, e := range events {
		o := byNumber[e.Actor]
		switch {
		case o == nil || string(e.Action) != o.Kind || !o.changes():
			return nil, fmt.Errorf("revision %d was made by %q, which no client did", e.Revision,
				e.Actor)
		case e.Revision != uint64(len(all)+1):
			return nil, fmt.Errorf("the event of revision %d stands at place %d", e.Revision,
				len(all)+1)
		}
		ok, next := last.step(o)
		if !ok || next.revision != e.Revision {
			return nil, fmt.Errorf("op %d %v cannot have made revision %d of %+v", o.N, o,
				e.Revision, last)
		}
		for _, before := range all {
			if o.Return < before.by.Call {
				return nil, fmt.Errorf("op %d %v made revision %d, and had returned before that "+
					"of revision %d was called",
					o.N, o, e.Revision, before.revision)
			}
		}
		last = next
		all = append(all, revisionOf{o, next})
	}
	return all, nil
}
