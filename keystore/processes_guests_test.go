package keystore

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// The guests are the part of the chaos of processes that restores backups and purges keys. A guest
// is a key of another store, from two backups: in the backup young, all guests are active. In the
// backup old, each second guest is revoked, and the others are disabled. The processes restore both
// backups, in any order and at the same time, and purge the revoked guests. Whatever happens:
//
//   - Once a Restore of the backup old has returned, no process admits a guest, and no session of a
//     guest is open: C1 and C2.
//   - Once a Purge of a revoked guest has returned, the guest is gone for good: no Restore brings
//     the guest back.
//   - The events of a guest are in the order of its revisions, and none follows the purge: C10.

const chaosGuests = 4

// A guest is a key of another store. Moments are moments of the history; 0 is not yet.
type guest struct {
	id, secret string
	revoked    bool         // in the backup old; otherwise disabled
	ended      atomic.Int64 // when a Restore of the backup old had returned
	gone       atomic.Int64 // when a Purge of the revoked guest had returned

	mu       sync.Mutex // guards all below
	sessions []guestSession
}

type guestSession struct {
	*Session
	process *chaosProcess
}

// invite makes the guests and their backups.
func (c *chaos) invite() {
	ctx := context.Background()
	s, err := New(backendtest.NewMemory(), nil)
	require.NoError(c.t, err)
	save := func() []byte {
		var b bytes.Buffer
		require.NoError(c.t, s.Backup(ctx, &b))
		return b.Bytes()
	}
	for i := range chaosGuests {
		issued, err := s.Create(ctx, Spec{Name: "guest"})
		require.NoError(c.t, err)
		c.guests = append(c.guests, &guest{id: issued.Key.ID, secret: issued.Secret.Reveal(),
			revoked: i%2 == 0})
	}
	c.young = save()
	for _, g := range c.guests {
		if g.revoked {
			require.NoError(c.t, s.Revoke(ctx, g.id, ""))
		} else {
			require.NoError(c.t, s.Disable(ctx, g.id, ""))
		}
	}
	c.old = save()
	require.NoError(c.t, s.Close())
	time.Sleep(time.Millisecond)
	c.died = time.Now()
}

// call begins a call of the process.
func (p *chaosProcess) call() (context.Context, context.CancelFunc) {
	p.resume()
	return p.limited()
}

// host restores a backup, purges the guests, or changes a guest.
func (p *chaosProcess) host(rng *rand.Rand) {
	ctx, cancel := p.call()
	defer cancel()
	switch x := rng.IntN(10); {
	case x < 3:
		_ = p.store.Restore(ctx, bytes.NewReader(p.young))
	case x < 5:
		if p.store.Restore(ctx, bytes.NewReader(p.old)) == nil {
			p.guestsEnded()
		}
	case x < 6:
		p.purgeGuests(ctx)
	default:
		g := p.guests[2*rng.IntN(chaosGuests/2)]
		ended := g.ended.Load() != 0
		_, err := p.store.Update(ctx, g.id, func(spec *Spec) error {
			spec.Owner = p.owner(rng.IntN(2))
			return nil
		})
		if err == nil && ended {
			p.breach("C5: process %d has changed guest %s, which was revoked", p.player.process,
				g.id)
		}
	}
}

// guestsEnded notes that a Restore of the backup old has returned, and checks C2.
func (p *chaosProcess) guestsEnded() {
	now := p.chaos.moment()
	for _, g := range p.guests {
		g.ended.CompareAndSwap(0, now)
		g.mu.Lock()
		all := g.sessions
		g.mu.Unlock()
		for _, s := range all {
			if s.process.running() && s.Cause() == nil {
				p.breach("C2: a Restore has returned in process %d, and a session of guest %s is "+
					"open in process %d", p.player.process, g.id, s.process.player.process)
			}
		}
	}
}

// purgeGuests purges the guests that were revoked before the call.
func (p *chaosProcess) purgeGuests(ctx context.Context) {
	var dead []*guest
	for _, g := range p.guests {
		if g.revoked && g.ended.Load() != 0 {
			dead = append(dead, g)
		}
	}
	if _, err := p.store.Purge(ctx, p.died); err != nil {
		return
	}
	for _, g := range dead {
		g.gone.CompareAndSwap(0, p.chaos.moment())
	}
}

// meet uses a guest, or reads a guest.
func (p *chaosProcess) meet(rng *rand.Rand) {
	g := p.guests[rng.IntN(chaosGuests)]
	ctx, cancel := p.call()
	defer cancel()
	ended, gone := g.ended.Load(), g.gone.Load() // before the call
	switch rng.IntN(3) {
	case 0:
		_, err := p.store.Verify(ctx, g.secret)
		if err == nil && ended != 0 {
			p.breach("C4: process %d admits guest %s", p.player.process, g.id)
		}
	case 1:
		s, err := p.store.Bind(context.WithoutCancel(ctx), g.secret)
		if err != nil {
			return
		}
		if ended != 0 || g.ended.Load() != 0 && s.Cause() == nil {
			p.breach("C2: process %d has opened a session of guest %s", p.player.process, g.id)
		}
		g.keep(guestSession{s, p})
	default:
		p.look(ctx, g, gone)
	}
}

// keep keeps a session, and closes the oldest of many.
func (g *guest) keep(s guestSession) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sessions = append(g.sessions, s)
	if len(g.sessions) > 12 {
		g.sessions[0].Close()
		g.sessions = append([]guestSession(nil), g.sessions[1:]...)
	}
}

// look checks that a guest that was purged before is gone.
func (p *chaosProcess) look(ctx context.Context, g *guest, gone int64) {
	key, err := p.store.Get(ctx, g.id)
	if gone != 0 && err == nil {
		p.breach("purged guests: process %d has guest %s again: %v", p.player.process, g.id,
			key.Status())
	}
	if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrUnavailable) &&
		!errors.Is(err, ErrClosed) && ctx.Err() == nil {
		p.breach("Get of guest %s: %v", g.id, err)
	}
}

// checkGuests closes all sessions, and checks the guests and their events after the end.
func (c *chaos) checkGuests(p *chaosProcess) {
	last := make(map[string]Event)
	for _, e := range c.events {
		before := last[e.KeyID]
		last[e.KeyID] = e
		for _, g := range c.guests {
			if e.KeyID == g.id &&
				(e.Revision <= before.Revision || before.Action == ActionPurge) {
				c.breach("C10: the event %+v of a guest follows the event %+v", e, before)
			}
		}
	}
	for _, g := range c.guests {
		p.look(context.Background(), g, g.gone.Load())
		for _, s := range g.sessions {
			s.Close()
		}
	}
}
