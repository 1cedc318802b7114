package keystore

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A background does what no call waits for: it moves the minute of last use, writes down when keys
// were last used, replaces the digests of earlier hashers, counts those that are left, and removes
// old events. One goroutine keeps the time and starts each job in a goroutine of its own, so that
// no job delays another, however much there is to do or however slow the backend is.
type background struct {
	cancel   context.CancelFunc
	done     sync.WaitGroup
	rehashes chan rehash // has capacity for all of rehashing
	swept    []byte      // the last event that was removed; used by one goroutine

	mu        sync.Mutex            // guards all below
	rehashing map[token.ID]struct{} // the keys whose digest is to be replaced: at most maxRehashes
	outdated  int                   // digests of earlier hashers, as counted last; -1: not yet
	recount   bool                  // there may be fewer by now, or not counted yet
	epoch     int                   // a count that began in an earlier one is void
	next      time.Time             // before which nobody counts again
}

// maxRehashes is how many digests wait to be replaced at most. A key that is used meanwhile waits
// for a later use.
const maxRehashes = 256

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
	b.rehashes = make(chan rehash, maxRehashes)
	b.rehashing = make(map[token.ID]struct{})
	b.uncount()
	prove := b.job(func() { s.writeProved(ctx) })
	flush := b.job(func() {
		if err := s.flushUsage(ctx); err != nil {
			s.log.Warn("API key store could not write when keys were last used, and will try again", "error", err)
		}
	})
	sweep := b.job(func() { s.sweepEvents(ctx) })
	count := b.job(func() { s.countOutdated(ctx) })
	sweep()
	count()
	swept := time.Now().Truncate(time.Hour)
	b.done.Go(func() {
		everyMinute(ctx, func(now time.Time) {
			s.usage.advance(now)
			prove()
			flush()
			count()
			if hour := now.Truncate(time.Hour); !hour.Equal(swept) && sweep() {
				swept = hour
			}
		})
	})
	b.done.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case r := <-b.rehashes:
				s.rehash(ctx, r)
			}
		}
	})
}

// job returns a function that starts f in a goroutine. If the last run of f still runs, the function
// starts nothing and returns false. The function must not be called after stopBackground.
func (b *background) job(f func()) (start func() bool) {
	running := new(atomic.Bool)
	return func() bool {
		if !running.CompareAndSwap(false, true) {
			return false
		}
		b.done.Go(func() {
			defer running.Store(false)
			f()
		})
		return true
	}
}

// everyMinute calls f when a minute of the clock begins, until ctx ends.
func everyMinute(ctx context.Context, f func(now time.Time)) {
	for {
		now := time.Now()
		timer := time.NewTimer(now.Truncate(time.Minute).Add(time.Minute).Sub(now))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
			f(time.Now())
		}
	}
}

// stopBackground waits for it, and writes what is left to write.
func (s *Store) stopBackground() {
	s.background.cancel()
	s.background.done.Wait()
	if err := s.closeUsage(); err != nil {
		s.log.Warn("API key store could not write when keys were last used", "error", err)
	}
}

// rehashLater has the digest of a token replaced that an earlier hasher has made. The token itself does not outlive the
// call. A new digest is made only if there is space for it, and for each key at most one at a time.
func (s *Store) rehashLater(e *entry, old hashing.Digest, text string) {
	if !e.rehashing.CompareAndSwap(false, true) {
		return
	}
	b := &s.background
	b.mu.Lock()
	_, waits := b.rehashing[e.ID]
	if waits || len(b.rehashing) == maxRehashes {
		b.mu.Unlock()
		e.rehashing.Store(false) // the next use tries again
		return
	}
	b.rehashing[e.ID] = struct{}{}
	b.mu.Unlock()
	r := rehash{id: e.ID, old: old, entry: e}
	var err error
	if r.new, err = s.digest(text); err != nil {
		s.rehashed(r, false)
		return
	}
	b.rehashes <- r
}

// rehashed says that a digest has been replaced, or that a later use is to try again.
func (s *Store) rehashed(r rehash, ok bool) {
	if !ok {
		r.entry.rehashing.Store(false)
	}
	b := &s.background
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.rehashing, r.id)
	b.recount = b.recount || ok
}

func (s *Store) rehash(ctx context.Context, r rehash) {
	event := &record.Event{Action: record.Action_ACTION_REHASH}
	_, err := s.change(ctx, r.id, event, ErrNarrowed, func(rec *record.Record) (bool, error) {
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
		s.log.Warn("API key store could not replace a digest, and will try again", "id", r.id.String(), "error", err)
	}
	s.rehashed(r, err == nil)
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

// sweepEvents removes the events that are older than the retention. A storage engine may keep a
// mark of each entry that was removed for some time, so the sweep does not read the space again
// that an earlier one has emptied.
func (s *Store) sweepEvents(ctx context.Context) {
	if s.retention <= 0 {
		return
	}
	b := &s.background
	from := []byte{eventSpace}
	if b.swept != nil {
		from = append(b.swept, 0) // the least key after it
	}
	end := eventKey(max(0, time.Now().Add(-s.retention).UnixNano()))
	last, err := s.remove(ctx, from, end, func(backend.Entry) bool { return true })
	if last != nil {
		b.swept = last
	}
	if err != nil {
		s.log.Warn("API key store could not remove old events, and will try again", "error", err)
	}
}

// remove deletes the wanted entries with from <= key < to, many in one write, and returns the key
// of the last of them; nil if there was none.
func (s *Store) remove(ctx context.Context, from, to []byte, wanted func(backend.Entry) bool) (last []byte, err error) {
	var batch []backend.Change
	write := func() error {
		ctx, cancel := s.limited(ctx)
		defer cancel()
		if err := s.backend.Apply(ctx, batch...); err != nil {
			s.noteFailure(err)
			return trouble("remove", err)
		}
		last = batch[len(batch)-1].Key
		batch = nil
		return nil
	}
	for e, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return last, s.scanError(ctx, "remove", err)
		}
		if !wanted(e) {
			continue
		}
		batch = append(batch, backend.Change{Key: e.Key, Expect: e.Revision, Delete: true})
		if len(batch) == backend.MaxChanges {
			if err := write(); err != nil {
				return last, err
			}
		}
	}
	if len(batch) > 0 {
		err = write()
	}
	return last, err
}
