package keystore

import (
	"context"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A background is the one goroutine of a store that does what no call waits for: it writes down when keys were last
// used, replaces the digests of earlier hashers, counts those that are left, and removes old events.
type background struct {
	cancel   context.CancelFunc
	done     sync.WaitGroup
	rehashes chan rehash

	mu       sync.Mutex // guards all below
	outdated int        // digests of earlier hashers, as counted last; -1: not yet
	recount  bool       // there may be fewer by now, or not counted yet
	epoch    int        // a count that began in an earlier one is void
	next     time.Time  // before which nobody counts again
}

// A rehash is a new digest for a token that was seen.
type rehash struct {
	id       token.ID
	old, new hashing.Digest
	entry    *entry
}

func (s *Store) startBackground() {
	ctx, cancel := context.WithCancel(context.Background())
	b := &s.background
	b.cancel = cancel
	b.rehashes = make(chan rehash, 256)
	b.uncount()
	s.usage.minute.Store(minuteOf(time.Now()))
	b.done.Go(func() {
		s.countOutdated(ctx)
		s.sweepEvents(ctx)
		for {
			now := time.Now()
			timer := time.NewTimer(now.Truncate(time.Minute).Add(time.Minute).Sub(now))
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case r := <-b.rehashes:
				timer.Stop()
				s.rehash(ctx, r)
			case now := <-timer.C:
				s.tick(ctx, now)
			}
		}
	})
}

// stopBackground waits for it, and writes what is left to write.
func (s *Store) stopBackground() {
	s.background.cancel()
	s.background.done.Wait()
	if err := s.flushUsage(context.Background()); err != nil {
		s.log.Warn("API key store could not write when keys were last used", "error", err)
	}
}

// tick is called once a minute.
func (s *Store) tick(ctx context.Context, now time.Time) {
	minute := minuteOf(now)
	s.usage.minute.Store(minute)
	s.writeProved(ctx)
	if err := s.flushUsage(ctx); err != nil {
		s.log.Warn("API key store could not write when keys were last used, and will try again", "error", err)
	}
	if minute%60 == 0 {
		s.sweepEvents(ctx)
	}
	s.countOutdated(ctx)
}

// rehashLater has the digest of a token replaced that an earlier hasher has made. The token itself does not outlive the
// call.
func (s *Store) rehashLater(e *entry, old hashing.Digest, text string) {
	if !e.rehashing.CompareAndSwap(false, true) {
		return
	}
	digest, err := s.digest(text)
	if err != nil {
		e.rehashing.Store(false)
		return
	}
	select {
	case s.background.rehashes <- rehash{id: e.ID, old: old, new: digest, entry: e}:
	default:
		e.rehashing.Store(false) // the next use tries again
	}
}

func (s *Store) rehash(ctx context.Context, r rehash) {
	event := &record.Event{Action: record.Action_ACTION_REHASH}
	_, err := s.change(ctx, r.id, event, ErrChanged, func(rec *record.Record) (bool, error) {
		if rec.RevokedAt != 0 {
			return false, nil
		}
		p := rec.Previous
		switch {
		case rec.DigestScheme == r.old.Scheme && string(rec.Digest) == string(r.old.Sum):
			rec.DigestScheme, rec.Digest = r.new.Scheme, r.new.Sum
		case p != nil && p.DigestScheme == r.old.Scheme && string(p.Digest) == string(r.old.Sum):
			p.DigestScheme, p.Digest = r.new.Scheme, r.new.Sum
		default:
			return false, nil // it has been rotated meanwhile
		}
		return true, nil
	})
	if err != nil {
		r.entry.rehashing.Store(false)
		s.log.Warn("API key store could not replace a digest, and will try again", "id", r.id.String(), "error", err)
		return
	}
	s.background.mu.Lock()
	defer s.background.mu.Unlock()
	s.background.recount = true
}

// uncount says that there may be more outdated digests than were counted.
func (b *background) uncount() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.outdated, b.recount, b.next = -1, true, time.Time{}
	b.epoch++
}

func (s *Store) hasEarlierHasher() bool {
	keyring, ok := s.hasher.(interface{ HasEarlier() bool })
	return ok && keyring.HasEarlier()
}

// countOutdated counts the digests that need an earlier hasher, if there may be such, and fewer than were counted. No
// change that comes meanwhile makes more of them, but for a Restore, which calls uncount before and after.
func (s *Store) countOutdated(ctx context.Context) {
	b := &s.background
	began := time.Now()
	b.mu.Lock()
	if !s.hasEarlierHasher() || !b.recount || began.Before(b.next) {
		b.mu.Unlock()
		return
	}
	epoch := b.epoch
	b.recount = false
	b.mu.Unlock()

	outdated, err := s.outdated(ctx, began)

	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case err != nil:
		b.recount = true
	case b.epoch == epoch:
		b.outdated = outdated
		b.recount = b.recount || outdated > 0           // a rotation, or the end of a grace, is not told
		b.next = time.Now().Add(20 * time.Since(began)) // a twentieth of the time is enough to spend on it
	}
}

func (s *Store) outdated(ctx context.Context, now time.Time) (n int, err error) {
	for e, err := range s.backend.Scan(ctx, []byte{keySpace}, []byte{keySpace + 1}) {
		if err != nil {
			return 0, err
		}
		st, err := parseStored(e)
		if err != nil || st.record.RevokedAt != 0 || st.purged() {
			continue // no token will be matched with it
		}
		if st.record.DigestScheme != s.decoy.Scheme {
			n++
		}
		if p := st.record.Previous; p != nil && p.DigestScheme != s.decoy.Scheme && now.UnixNano() < p.Until {
			n++
		}
	}
	return n, nil
}

// sweepEvents removes the events that are older than the retention.
func (s *Store) sweepEvents(ctx context.Context) {
	if s.retention <= 0 {
		return
	}
	var old []backend.Change
	end := eventKey(max(0, time.Now().Add(-s.retention).UnixNano()))
	for e, err := range s.backend.Scan(ctx, []byte{eventSpace}, end) {
		if err != nil {
			s.log.Warn("API key store could not remove old events, and will try again", "error", s.scanError(ctx, "sweep", err))
			return
		}
		old = append(old, backend.Change{Key: e.Key, Expect: e.Revision, Delete: true})
		if len(old) == backend.MaxChanges {
			if !s.sweep(ctx, old) {
				return
			}
			old = nil
		}
	}
	if len(old) > 0 {
		s.sweep(ctx, old)
	}
}

func (s *Store) sweep(ctx context.Context, old []backend.Change) bool {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	if err := s.backend.Apply(ctx, old...); err != nil {
		s.noteFailure(err)
		s.log.Warn("API key store could not remove old events, and will try again", "error", err)
		return false
	}
	return true
}
