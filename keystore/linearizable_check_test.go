package keystore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"
)

// A trial is one history, over one opening of a store or several, and its keys.
type trial struct {
	history
	seed  uint64
	last  atomic.Int32
	began time.Time
	// evicts means that processes may be evicted. An evicted process may have had no time to tell
	// its last stamps, so a reader in another process may find the last events only later.
	evicts bool

	keysMu sync.Mutex
	keys   []*played
}

func newTrial(seed uint64, keys int) *trial {
	return &trial{seed: seed, keys: make([]*played, keys), began: time.Now()}
}

// player returns one that goes on with the trial's keys on a store.
func (t *trial) player(s *Store, opens int) *player {
	return &player{store: s, opens: opens, seed: t.seed, last: &t.last, record: t.record,
		mu: &t.keysMu, keys: t.keys}
}

// errClock means that the trial says nothing: the wall clock was set meanwhile.
var errClock = errors.New("the clock was set during the trial")

// hang bounds what has to happen some time.
const hang = 30 * time.Second

// finish looks at the contexts that are left, and judges the history. The events begin behind
// after; it returns where they end.
func (t *trial) finish(p *player, after time.Time) (time.Time, error) {
	return t.finishWith(p, after, t.check)
}

// finishWith is finish with another verdict about the history of each key.
func (t *trial) finishWith(
	p *player, after time.Time, check func(n int, revisions serial) error,
) (time.Time, error) {
	events := make(map[string][]Event)
	for e, err := range p.store.Events(context.Background(), EventQuery{After: after}) {
		if err != nil {
			return after, err
		}
		events[e.KeyID] = append(events[e.KeyID], e)
		after = e.At
	}
	defer p.release()
	p.sampleAll()
	ended := time.Now()
	d := ended.Round(0).Sub(t.began.Round(0)) - ended.Sub(t.began)
	if d.Abs() > 100*time.Microsecond {
		return after, errClock
	}
	for n, k := range t.keys {
		if k == nil {
			continue // its Create has failed
		}
		revisions, err := serialOf(events[k.ID], t.of(n))
		if err := check(n, revisions); err != nil {
			return after, err
		}
		if err == nil {
			err = k.awaitExpiry(revisions)
		}
		if err != nil {
			return after, t.violation(n, err.Error())
		}
	}
	return after, nil
}

// of returns the ops of a key, and the closings.
func (t *trial) of(n int) (ops []*op) {
	for _, o := range t.ops {
		if o.Key == n || o.Kind == opClose {
			ops = append(ops, o)
		}
	}
	return ops
}

// awaitExpiry waits for the contexts that end by themselves.
func (k *played) awaitExpiry(revisions serial) error {
	last := revisions[len(revisions)-1].state
	for _, b := range k.bound {
		if from, to := last.until(b.op.Secret); !last.has(b.op.Secret) || from != to ||
			from > now()+int64(hang) {
			continue
		}
		select {
		case <-b.ctx.Done():
		case <-time.After(hang):
			return fmt.Errorf("the context of %d has outlived its expiry", b.op.N)
		}
	}
	return nil
}

// check judges what happened to one key.
func (t *trial) check(n int, revisions serial) error {
	ops := t.of(n)
	var own []*op
	for _, o := range ops {
		if o.Kind != opClose {
			own = append(own, o)
		}
	}
	if err := t.linearizable(n, "ops", keyModel, asOperations(own)); err != nil {
		return err
	}
	if what := monitor(own); what != "" {
		return t.violation(n, what)
	}
	if revisions == nil {
		return nil // the caller knows what is wrong with them
	}
	for _, o := range own {
		if o.Result != isOK {
			continue
		}
		if o.Revision > uint64(len(revisions)) {
			return t.violation(n, fmt.Sprintf("no event has made the revision that op %d shows",
				o.N))
		}
		switch o.Kind {
		case opCreate, opUpdate, opRotate:
			if revisions[o.Revision-1].by != o {
				return t.violation(n, fmt.Sprintf("another event has made the revision of op %d",
					o.N))
			}
		case opRevoke:
			if !revisions[len(revisions)-1].revoked {
				return t.violation(n, fmt.Sprintf("op %d has no event", o.N))
			}
		case opBind:
			if err := t.linearizable(n, fmt.Sprintf("the context of op %d", o.N), liveModel,
				lifeOf(o, ops, revisions)); err != nil {
				return err
			}
		}
	}
	return nil
}

// monitor looks for what must not happen whatever the model says: a use after a Revoke has
// returned, and a revision that goes back, over restarts too.
func monitor(ops []*op) string {
	for _, a := range ops {
		for _, b := range ops {
			switch {
			case a.Result != isOK || b.Result != isOK || a.Return >= b.Call:
			case a.Kind == opRevoke && (b.Kind == opVerify || b.Kind == opBind):
				return fmt.Sprintf("op %d let somebody in after the Revoke of op %d had returned",
					b.N, a.N)
			case a.Revision != 0 && b.Revision != 0 && b.Revision < a.Revision:
				return fmt.Sprintf("the revision went back from op %d to op %d", a.N, b.N)
			}
		}
	}
	return ""
}

func (t *trial) linearizable(
	n int, what string, m porcupine.Model, ops []porcupine.Operation,
) error {
	switch porcupine.CheckOperationsTimeout(m, ops, hang) {
	case porcupine.Ok:
		return nil
	case porcupine.Unknown:
		return t.violation(n, what+": the checker did not come to an end")
	}
	if *drawings != "" {
		_, info := porcupine.CheckOperationsVerbose(m, ops, hang)
		file := filepath.Join(*drawings, fmt.Sprintf("seed-%d-key-%d.html", t.seed, n))
		if err := porcupine.VisualizePath(m, info, file); err != nil {
			return t.violation(n, what+": not linearizable, and could not be drawn: "+err.Error())
		}
	}
	return t.violation(n, what+": not linearizable")
}

// A violation is what was wrong, with the history of the key for people to read.
type violation struct {
	what    string
	history string
}

func (v *violation) Error() string { return v.what + "\n" + v.history }

func (t *trial) violation(n int, what string) error {
	ops := slices.SortedFunc(slices.Values(t.of(n)),
		func(a, b *op) int { return cmp.Compare(a.Call, b.Call) })
	var b strings.Builder
	for _, o := range ops {
		at := time.Unix(0, o.Call).Sub(t.began.Round(0))
		fmt.Fprintf(&b, "%12v +%-10v client %d op %d %v\n", at, time.Duration(o.Return-o.Call),
			o.Client, o.N, o)
	}
	return &violation{fmt.Sprintf("seed %d, key %d: %s", t.seed, n, what), b.String()}
}

// A tally counts what ops came to, to show that the rounds went everywhere.
type tally map[string]int

func (c tally) add(t *trial) {
	for _, o := range t.ops {
		c[o.Kind+" "+o.Result]++
	}
}

func (c tally) String() string {
	var b strings.Builder
	for _, what := range slices.Sorted(maps.Keys(c)) {
		fmt.Fprintf(&b, "%7d %s\n", c[what], what)
	}
	return b.String()
}
