package pgstore

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A tag identifies the Apply at a position. Another history has another tag at the position.
type tag [16]byte

// A history is what a Backend knows of the sequence of changes. A server that was restored from a
// backup has another history, and so may have a standby that was promoted without the last changes:
// the same positions mean other changes.
//
// Invariants:
//
//  1. A generation is one history, as far as this Backend has noticed. What the Backend remembers
//     of an earlier generation is dropped.
//  2. delivered is the highest position that a feed of this generation has yielded. A read refuses
//     a state below the position: a pool may reach another server. A seenView shows that a
//     connection leads to the same server as before.
//  3. replicated is a position of which an own commit has shown that the standby has everything up
//     to there. On a server that has this position with this tag, an entry that was written at or
//     below the position is not lost in a failover. Any other entry may be: a primary shows a
//     change that is on no standby after the wait for the standby was canceled, and after a crash.
//     The oldest rows of the log are removed first. So if the log has the row at the position, the
//     log has each later deletion. If the log does not have the row, a read waits for the standby.
//  4. A feed continues after a position only if the server has the remembered tag at the position.
//     A feed after a position that is not remembered ends with ErrGap.
type history struct {
	mu         sync.Mutex // guards all below
	generation uint64
	delivered  backend.Position
	replicated mark

	tags  map[backend.Position]tag // of the last positions that feeds have yielded
	order []backend.Position       // the keys of tags; a ring once there are maxTags
	next  int                      // of the ring
}

// A mark is a position with its tag. The zero mark is no position.
type mark struct {
	at  backend.Position
	tag tag
}

// maxTags is the number of remembered positions.
const maxTags = 1024

// errRestored is the reason of a feed that has found another history.
var errRestored = errors.New("PostgreSQL was restored, or a standby without the last changes was " +
	"promoted")

// gap returns an error of a feed that wraps ErrGap.
func gap(reason error) error {
	return fmt.Errorf("pgstore: feed: %w: %w", backend.ErrGap, reason)
}

// now returns the present generation, what a read that starts now must see at least, and what is
// known to be replicated.
func (h *history) now() (generation uint64, delivered backend.Position, replicated mark) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.generation, h.delivered, h.replicated
}

// A view is what a server must have in its log, so that the read of one entry from the server is
// enough: see getSoon. The two marks may be the same.
type view struct {
	delivered  mark // a position at or above the delivered of the history
	replicated mark // the replicated of the history; of an unreplicated Backend, any position
}

// latest returns the present view. ok is false if the history does not know the marks.
func (h *history) latest(unreplicated bool) (v view, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.replicated.at >= h.delivered {
		return view{h.replicated, h.replicated}, h.replicated.at > 0
	}
	t, ok := h.tags[h.delivered]
	v = view{mark{h.delivered, t}, h.replicated}
	if unreplicated {
		v.replicated = v.delivered
	}
	return v, ok && v.replicated.at > 0
}

// confirmed notes that everything up to a position is replicated, by a commit that began in a
// generation.
func (h *history) confirmed(generation uint64, m mark) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.generation == generation && m.at > h.replicated.at {
		h.replicated = m
	}
}

// recall returns the tag at a position, and the generation of the tag.
func (h *history) recall(at backend.Position) (tag, uint64, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	t, ok := h.tags[at]
	return t, h.generation, ok
}

// yields notes that a feed is about to yield a position. yields returns false if another feed has
// found another history.
func (h *history) yields(generation uint64, at backend.Position, t tag) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.generation != generation {
		return false
	}
	h.delivered = max(h.delivered, at)
	if _, ok := h.tags[at]; !ok {
		if h.tags == nil {
			h.tags = make(map[backend.Position]tag)
		}
		if len(h.order) < maxTags {
			h.order = append(h.order, at)
		} else {
			delete(h.tags, h.order[h.next])
			h.order[h.next] = at
			h.next = (h.next + 1) % maxTags
		}
	}
	h.tags[at] = t
	return true
}

// changed begins another generation, because a feed has found another history.
func (h *history) changed(b *Backend, generation uint64, at backend.Position) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.generation == generation {
		h.generation++
		h.delivered, h.replicated = 0, mark{}
		h.tags, h.order, h.next = nil, nil, 0
		b.log.Log(slog.LevelError, "PostgreSQL was restored, or a standby without the last changes "+
			"was promoted: changes are lost, and revoked keys may be active again: restore the "+
			"store's own backup on top, or revoke the keys again", "schema", b.schema,
			"position", uint64(at))
	}
	return gap(errRestored)
}
