package keystore

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A background runs the jobs that no call waits for. The jobs move the minute of last use, write
// when keys were last used, give back credits of idle keys, replace the digests of earlier hashers,
// count the remaining digests of earlier hashers, and remove old events. One goroutine keeps the
// time and starts each job in a separate goroutine. So no job delays another job, even with much to
// do or a slow backend.
type background struct {
	cancel   context.CancelFunc
	done     sync.WaitGroup
	rehashes chan rehash // has capacity for all keys in rehashing
	swept    []byte      // the storage key of the last removed event; used by one goroutine

	mu        sync.Mutex            // guards all fields below
	rehashing map[token.ID]struct{} // the keys with a digest to be replaced: at most maxRehashes
	// the last count of digests of earlier hashers, by scheme; never changed; nil: no count yet
	outdated map[string]int
	recount  bool      // the number may be lower by now, or is not counted yet
	epoch    int       // a count that began in an earlier epoch is discarded
	next     time.Time // the earliest time of the next count
}

// maxRehashes is the maximum number of digests that wait to be replaced. At the maximum, the digest
// of a further key is replaced only after a later use of the key.
const maxRehashes = 256

// A rehash is a new digest for a token that a caller has presented.
type rehash struct {
	id       token.ID
	old, new hashing.Digest
	key      *cachedKey
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
		if !s.waitForTurn(ctx) {
			return
		}
		if err := s.flushUsage(ctx); err != nil {
			s.log.Warn("API key store could not write when keys were last used, and will try again",
				"error", err)
		}
	})
	sweep := b.job(func() {
		if s.processes == nil || s.processes.cluster.First() {
			s.sweepEvents(ctx)
		}
	})
	settle := b.job(func() { s.settle(ctx) })
	count := b.job(func() {
		if s.waitForTurn(ctx) {
			s.countOutdated(ctx)
		}
	})
	sweep()
	count()
	swept := time.Now().Truncate(time.Hour)
	b.done.Go(func() {
		everyMinute(ctx, func(now time.Time) {
			s.usage.advance(now)
			prove()
			flush()
			settle()
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

// waitForTurn returns after a random part of a minute, so that several processes do not all write
// or read at the same time. If ctx ends first, waitForTurn returns false. In a store of one
// process, waitForTurn does not wait.
func (s *Store) waitForTurn(ctx context.Context) bool {
	if s.processes == nil {
		return true
	}
	timer := time.NewTimer(rand.N(maxTurn))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// maxTurn leaves some seconds of each minute for the work itself.
const maxTurn = 50 * time.Second

// job returns a function that starts f in a goroutine. If the last run of f still runs, the
// function starts nothing and returns false. The function must not be called after stopBackground.
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

// everyMinute calls f at the start of each minute of the clock, until ctx ends.
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

// stopBackground stops the background, waits for its goroutines, and writes the remaining uses.
func (s *Store) stopBackground() {
	s.background.cancel()
	s.background.done.Wait()
	if err := s.closeUsage(); err != nil {
		s.log.Warn("API key store could not write when keys were last used", "error", err)
	}
}

// rehashLater schedules the replacement of a digest that an earlier hasher has made. The token
// itself is not kept after the call. A new digest is made only if the queue has space. Each key has
// at most one replacement at a time. late means that a slow Hasher has made a digest: the call must
// read the record again, see errLate.
func (s *Store) rehashLater(e *cachedKey, old hashing.Digest, text string) (late bool) {
	if !e.terms().rehashing.CompareAndSwap(false, true) {
		return false
	}
	b := &s.background
	b.mu.Lock()
	_, waits := b.rehashing[e.ID]
	if waits || len(b.rehashing) == maxRehashes {
		b.mu.Unlock()
		e.terms().rehashing.Store(false) // the next use tries again
		return false
	}
	b.rehashing[e.ID] = struct{}{}
	b.mu.Unlock()
	r := rehash{id: e.ID, old: old, key: e}
	var err error
	if r.new, err = s.digest(text); err != nil {
		s.rehashed(r, false)
		return false
	}
	b.rehashes <- r
	return s.slow.has(s.dummyDigest.Scheme)
}

// rehashed records the outcome of a rehash. If ok, the digest has been replaced. Otherwise a later
// use of the key tries again.
func (s *Store) rehashed(r rehash, ok bool) {
	if !ok {
		r.key.terms().rehashing.Store(false)
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
			return false, nil // a rotation has already replaced the digest
		}
		return true, nil
	})
	if err != nil {
		s.log.Warn("API key store could not replace a digest, and will try again",
			"id", r.id.String(), "error", err)
	}
	s.rehashed(r, err == nil)
}

// uncount discards the last count, because the number of outdated digests may be higher by now.
func (b *background) uncount() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.outdated, b.recount, b.next = nil, true, time.Time{}
	b.epoch++
}

func (s *Store) hasEarlierHasher() bool {
	keyring, ok := s.hasher.(interface{ HasEarlier() bool })
	return ok && keyring.HasEarlier()
}

// countOutdated counts the digests that need an earlier hasher. countOutdated does nothing if the
// Hasher has no earlier hasher, if the number cannot be lower than the last count, or before the
// time of the next count. Among concurrent changes, only a Restore can raise the number. Restore
// calls uncount before and after its changes.
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
		// Rotations and ends of a grace period are not reported here, so count again if any remain.
		b.recount = b.recount || len(outdated) > 0
		// Counting should take at most a twentieth of the time.
		b.next = time.Now().Add(20 * time.Since(began))
	}
}

// outdated returns the numbers of digests that the current hasher has not made, by scheme.
func (s *Store) outdated(ctx context.Context, now time.Time) (map[string]int, error) {
	counts := make(map[string]int)
	count := func(scheme string) {
		if scheme != s.dummyDigest.Scheme {
			counts[scheme]++
		}
	}
	for e, err := range s.backend.Scan(ctx, []byte{keySpace}, []byte{keySpace + 1}) {
		if err != nil {
			return nil, err
		}
		kr, err := parseKeyRecord(e)
		if err != nil || kr.record.RevokedAt != 0 || kr.purged() {
			continue // no token will be matched with a digest of this key
		}
		count(kr.record.DigestScheme)
		if p := kr.record.Previous; p != nil && now.UnixNano() < p.Until {
			count(p.DigestScheme)
		}
	}
	return counts, nil
}

// remove deletes entries with from <= key < to, many in each write. For each entry, removal returns
// the changes that remove the entry, or nil if the entry stays. The result is the key of the last
// removed entry, or nil if no entry was removed.
func (s *Store) remove(
	ctx context.Context, from, to []byte,
	removal func(context.Context, backend.Entry) ([]backend.Change, error),
) (last []byte, err error) {
	var batch []backend.Change
	var read []byte // the key of the last entry in the batch
	write := func() error {
		if err := s.applyRemovals(ctx, batch); err != nil {
			return err
		}
		last, batch = read, nil
		return nil
	}
	for e, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return last, s.scanError(ctx, "remove", err)
		}
		changes, err := removal(ctx, e)
		if err != nil {
			return last, err
		}
		if len(changes) == 0 {
			continue
		}
		if len(batch)+len(changes) > backend.MaxChanges {
			if err := write(); err != nil {
				return last, err
			}
		}
		batch, read = append(batch, changes...), e.Key
	}
	if len(batch) > 0 {
		err = write()
	}
	return last, err
}
