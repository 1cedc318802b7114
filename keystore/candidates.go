package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A candidate is a record that a query may select. use is the last use of the key, or nil if the
// last use was not read together with the record.
type candidate struct {
	*keyRecord
	use *keyUse
}

// A finder yields the records that a query may select: see candidates, which is the usual finder.
type finder func(
	ctx context.Context, q *Query, used bool, yield func(candidate, error) bool,
) error

// candidates yields the records that a query may select, in the order of the query. With an owner,
// candidates reads only the keys of the owner, and perhaps of owners with the same hash: the caller
// decides by the record. candidates reads during the iteration, and holds neither a lock nor the
// index. used means that the caller wants to know the last uses.
//
// With ErrCorrupt, which concerns one key, yield gets a keyRecord that may be nil, or may have only
// the ID. The iteration continues while yield returns true. candidates returns any other error.
func (s *Store) candidates(
	ctx context.Context, q *Query, used bool, yield func(candidate, error) bool,
) error {
	entries, err := s.scanKeys(ctx, q, q.Newest)
	if err != nil {
		return err
	}
	if q.Owner != "" {
		return s.ownedKeys(ctx, q, used, entries, yield)
	}
	for e, err := range entries {
		if err != nil {
			return s.listError(ctx, err)
		}
		kr, err := parseKeyRecord(e)
		if err == nil && kr.purged() {
			continue
		}
		if !yield(candidate{keyRecord: kr}, err) {
			return nil
		}
	}
	return nil
}

// listError returns the error that ends a list because a scan has returned err.
func (s *Store) listError(ctx context.Context, err error) error {
	err = s.scanError(ctx, "list", err)
	if errors.Is(err, ErrCorrupt) {
		return fmt.Errorf("%w; the keys after the damage were not read", err)
	}
	return err
}

// ownedKeys reads maxTogether keys together, or, if each read is a round trip, as many keys as have
// maxRoundTrip entries: the record, and the last use if the caller wants to know it. The round trip
// also reads the state of the indexes.
const (
	maxTogether  = 16
	maxRoundTrip = backend.MaxChanges - 1
)

// ownedKeys yields the records that the entries of the owner index lead to: see candidates.
func (s *Store) ownedKeys(
	ctx context.Context, q *Query, used bool, entries iter.Seq2[backend.Entry, error],
	yield func(candidate, error) bool,
) error {
	check, err := s.checkIndexes(ctx)
	if err != nil {
		return err
	}
	most := 1
	switch {
	case s.all != nil && s.processes != nil && used:
		most = maxRoundTrip / 2
	case s.all != nil && s.processes != nil:
		most = maxRoundTrip
	case s.all != nil || s.processes != nil:
		most = maxTogether
	}
	if q.Limit > 0 {
		most = min(most, q.Limit)
	}
	ids := make([]token.ID, 0, most)
	flush := func() (more bool, err error) {
		more, err = s.readOwned(ctx, check, ids, used, yield)
		ids = ids[:0]
		return more, err
	}
	for e, failed := range entries {
		var id token.ID
		var damaged error
		if failed == nil {
			if id, damaged = parseOwnerKey(e); damaged == nil {
				if ids = append(ids, id); len(ids) < most {
					continue
				}
			}
		}
		if more, err := flush(); err != nil || !more {
			return err
		}
		if failed != nil {
			return s.listError(ctx, failed)
		}
		if damaged != nil && !yield(candidate{}, damaged) {
			return nil
		}
	}
	_, err = flush()
	return err
}

// readOwned yields the records of keys that the owner index leads to, if check allows this. more is
// true if yield has always returned true.
func (s *Store) readOwned(
	ctx context.Context, check *indexCheck, ids []token.ID, used bool,
	yield func(candidate, error) bool,
) (more bool, err error) {
	var records, written []backend.Entry
	uses := make([]keyUse, len(ids))
	read := func(i int) (*keyRecord, error) { return s.ownedBy(ctx, ids[i]) }
	if len(ids) > 1 && s.all != nil {
		// If one of the entries is damaged, the keys are read one by one.
		records, written, _ = s.readTogether(ctx, check, ids, used, uses)
	}
	if records == nil {
		if err := check.complete(ctx); err != nil {
			return false, err
		}
		if len(ids) > 1 && s.processes != nil {
			var stop func()
			read, stop = s.startReads(ctx, ids)
			defer stop()
		}
	}
	for i := range ids {
		var c candidate
		if records == nil {
			c.keyRecord, err = read(i)
		} else if err = errNoKey; records[i].Revision > 0 {
			c.keyRecord, err = parseKeyRecord(records[i])
			if used {
				uses[i].written = written[i]
				c.use = &uses[i]
			}
		}
		if errors.Is(err, ErrNotFound) || err == nil && c.purged() {
			continue // purged since the scan has read the index entry
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return false, err
		}
		if !yield(c, err) {
			return false, nil
		}
	}
	return true, nil
}

// theseKeys returns a finder of the keys with the IDs, which are in ascending order.
func (s *Store) theseKeys(ids []token.ID) finder {
	return func(
		ctx context.Context, q *Query, used bool, yield func(candidate, error) bool,
	) error {
		ranges, err := q.idRanges()
		if err != nil {
			return err
		}
		var inRange []token.ID
		for _, id := range ids {
			if slices.ContainsFunc(ranges, func(r idRange) bool { return r.has(id) }) {
				inRange = append(inRange, id)
			}
		}
		if q.Newest {
			slices.Reverse(inRange)
		}
		for part := range slices.Chunk(inRange, maxTogether) {
			if more, err := s.readOwned(ctx, nil, part, used, yield); err != nil || !more {
				return err
			}
		}
		return nil
	}
}

// startReads starts to read the records of keys, all at the same time: between a process and a
// backend.Feeder is a network, and each read waits for a round trip. read waits for one of the
// records. stop ends the reads, and waits for their end.
func (s *Store) startReads(
	ctx context.Context, ids []token.ID,
) (read func(i int) (*keyRecord, error), stop func()) {
	type result struct {
		record *keyRecord
		err    error
		done   chan struct{}
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	results := make([]*result, len(ids))
	for i, id := range ids {
		r := &result{err: wrapErr("read", errPanicked), done: make(chan struct{})}
		results[i] = r
		running.Go(func() {
			defer close(r.done)
			r.record, r.err = s.ownedBy(ctx, id)
		})
	}
	read = func(i int) (*keyRecord, error) {
		<-results[i].done
		return results[i].record, results[i].err
	}
	return read, func() {
		cancel()
		running.Wait()
	}
}

// readTogether reads the records of keys, and, if used is true, the last uses, except for the field
// written of uses. If check does not allow the read, readTogether returns an error.
func (s *Store) readTogether(
	ctx context.Context, check *indexCheck, ids []token.ID, used bool, uses []keyUse,
) (records, written []backend.Entry, err error) {
	keys := make([][]byte, 0, 2*len(ids)+1)
	for _, id := range ids {
		keys = append(keys, storageKey(id))
	}
	if used {
		s.usage.advance(time.Now())
		for i, id := range ids {
			uses[i].recent = s.recentUse(id)
			keys = append(keys, usageKey(id))
		}
	}
	if check != nil {
		keys = append(keys, stateKey)
	}
	ctx, cancel := s.limitedRead(ctx)
	defer cancel()
	entries, err := s.all.GetAll(ctx, keys)
	if err == nil && check != nil {
		err = check.completeBy(entries[len(entries)-1])
	}
	if err != nil {
		return nil, nil, err
	}
	return entries[:len(ids)], entries[len(ids):], nil
}

// An idRange is a range of IDs, as bytes: first <= ID < end. A nil end is no limit.
type idRange struct{ first, end []byte }

func (r idRange) has(id token.ID) bool {
	return bytes.Compare(id[:], r.first) >= 0 && (r.end == nil || bytes.Compare(id[:], r.end) < 0)
}

// idRanges returns the ranges of the IDs that the query may select, in ascending order. The IDs of
// imported keys say nothing about the time of creation.
func (q *Query) idRanges() ([]idRange, error) {
	all := []idRange{{}}
	if !q.CreatedAfter.IsZero() {
		if id := token.First(q.CreatedAfter.Add(-maxLead)); !isImported(id) {
			all = []idRange{{nil, importedEnd[:]}, {id[:], nil}}
		}
	}
	if q.Cursor == "" {
		return all, nil
	}
	cursor, err := parseID("Query.Cursor: ", q.Cursor)
	if err != nil {
		return nil, err
	}
	next := append(cursor[:], 0) // the smallest text of bytes after the cursor
	var ranges []idRange
	for _, r := range all {
		switch {
		case q.Newest && (r.end == nil || string(cursor[:]) < string(r.end)):
			r.end = cursor[:]
		case !q.Newest && string(next) > string(r.first):
			r.first = next
		}
		if r.end == nil || string(r.first) < string(r.end) {
			ranges = append(ranges, r)
		}
	}
	return ranges, nil
}

// scanKeys returns the entries of the records that the query may select, in descending order if
// newest is true. If the query has an owner, the entries are of the owner index.
func (s *Store) scanKeys(
	ctx context.Context, q *Query, newest bool,
) (iter.Seq2[backend.Entry, error], error) {
	prefix, end := spaceOf(keySpace)
	if q.Owner != "" {
		prefix = ownerPrefix(q.Owner)
		end = after(prefix)
	}
	ranges, err := q.idRanges()
	if err != nil {
		return nil, err
	}
	var scans []iter.Seq2[backend.Entry, error]
	for _, r := range ranges {
		to := end
		if r.end != nil {
			to = slices.Concat(prefix, r.end)
		}
		scan, err := s.scan(ctx, newest, slices.Concat(prefix, r.first), to)
		if err != nil {
			return nil, err
		}
		scans = append(scans, scan)
	}
	if newest {
		slices.Reverse(scans)
	}
	return func(yield func(backend.Entry, error) bool) {
		for _, scan := range scans {
			for e, err := range scan {
				if !yield(e, err) {
					return
				}
			}
		}
	}, nil
}

// scan returns the entries of the backend with from <= key < to, in descending order if newest is
// true.
func (s *Store) scan(
	ctx context.Context, newest bool, from, to []byte,
) (iter.Seq2[backend.Entry, error], error) {
	if !newest {
		return s.backend.Scan(ctx, from, to), nil
	}
	down, ok := s.backend.(backend.DownScanner)
	if !ok {
		return nil, invalid("the backend cannot read the newest first: " +
			"it does not have the method ScanDown of backend.DownScanner")
	}
	return down.ScanDown(ctx, from, to), nil
}

// after returns the first storage key that is greater than all storage keys that begin with prefix.
// The first byte of prefix is a key space, so the result exists.
func after(prefix []byte) []byte {
	end := append([]byte(nil), prefix...)
	for i := len(end) - 1; ; i-- {
		if end[i]++; end[i] != 0 {
			return end[:i+1]
		}
	}
}

// ownedBy reads the record of a key that an entry of the owner index leads to.
func (s *Store) ownedBy(ctx context.Context, id token.ID) (*keyRecord, error) {
	ctx, cancel := s.limitedRead(ctx)
	defer cancel()
	kr, err := s.get(ctx, id)
	if errors.Is(err, ErrCorrupt) && kr == nil {
		kr = &keyRecord{id: id}
	}
	return kr, err
}

// A foundEvent is an event with its stamp.
type foundEvent struct {
	event *record.Event
	stamp int64
}

// foundEvents yields the events with first <= stamp <= last, in the order of the stamps, or in
// descending order if newest is true: of one key, or of all keys if only is zero. For the errors
// see candidates.
func (s *Store) foundEvents(
	ctx context.Context, only token.ID, newest bool, first, last int64,
	yield func(foundEvent, error) bool,
) error {
	if only == (token.ID{}) {
		entries, err := s.scan(ctx, newest, eventKey(first), eventKey(last+1))
		if err != nil {
			return err
		}
		for e, err := range entries {
			if err != nil {
				return s.scanError(ctx, "events", err)
			}
			var f foundEvent
			if f.event, err = parseEvent(e); err == nil {
				f.stamp = stampOf(e.Key)
			}
			if !yield(f, err) {
				return nil
			}
		}
		return nil
	}
	creation, err := s.creation(ctx, only, first, last)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return err
	}
	// The event of the creation is the first event of a key.
	yieldCreation := func() bool {
		return err == nil && creation.event == nil || yield(creation, err)
	}
	if !newest && !yieldCreation() {
		return nil
	}
	more, failed := s.indexedEvents(ctx, only, newest, first, last,
		func(f foundEvent, err error) bool {
			return err == nil && f.stamp == creation.stamp || yield(f, err)
		})
	if newest && more {
		yieldCreation()
	}
	return failed
}

// indexedEvents yields the events of a key that the event index leads to: see foundEvents. more is
// true if there may be more events, because nothing has ended the iteration.
func (s *Store) indexedEvents(
	ctx context.Context, id token.ID, newest bool, first, last int64,
	yield func(foundEvent, error) bool,
) (more bool, err error) {
	check, err := s.checkIndexes(ctx)
	if err != nil {
		return false, err
	}
	entries, err := s.scan(ctx, newest, eventIndexKey(id, first), eventIndexKey(id, last+1))
	if err != nil {
		return false, err
	}
	page := make([]backend.Entry, 0, maxTogether)
	flush := func() (more bool, err error) {
		if err := check.complete(ctx); err != nil {
			return false, err
		}
		more, err = s.readIndexed(ctx, id, page, yield)
		page = page[:0]
		return more, err
	}
	for e, failed := range entries {
		if failed == nil {
			if page = append(page, e); s.processes != nil && len(page) < maxTogether {
				continue
			}
		}
		if more, err := flush(); err != nil || !more {
			return false, err
		}
		if failed != nil {
			return false, s.scanError(ctx, "events", failed)
		}
	}
	return flush()
}

// readIndexed yields the events that entries of the event index lead to: see indexedEvents.
func (s *Store) readIndexed(
	ctx context.Context, id token.ID, entries []backend.Entry, yield func(foundEvent, error) bool,
) (more bool, err error) {
	for _, e := range entries {
		var f foundEvent
		_, stamp, err := parseEventIndexKey(e)
		if err == nil {
			f, err = s.eventOf(ctx, id, stamp)
		}
		if err != nil && !errors.Is(err, ErrCorrupt) {
			return false, err
		}
		if err == nil && f.event == nil {
			continue // the sweep has removed the event since the scan has read the index entry
		}
		if !yield(f, err) {
			return false, nil
		}
	}
	return true, nil
}

// creation returns the event of the creation or of the import of a key, if the record or the grave
// of the key leads to the event, and if the stamp is between first and last. Otherwise the event is
// nil: the event index may lead to the event.
func (s *Store) creation(
	ctx context.Context, id token.ID, first, last int64,
) (foundEvent, error) {
	stamp, err := s.readFirstStamp(ctx, id)
	if err != nil || stamp < first || stamp > last {
		return foundEvent{}, err
	}
	f, err := s.eventOf(ctx, id, stamp)
	if err != nil || f.event == nil || !isFirst(f.event) {
		return foundEvent{}, err
	}
	return f, nil
}

// readFirstStamp returns the firstStamp of the record or the grave of a key, or 0.
func (s *Store) readFirstStamp(ctx context.Context, id token.ID) (int64, error) {
	ctx, cancel := s.limitedRead(ctx)
	defer cancel()
	// The order matters: a Purge in between moves the time from the record to the grave.
	kr, err := s.get(ctx, id)
	if errors.Is(err, ErrNotFound) {
		kr, err = s.readGrave(ctx, id)
	}
	if err != nil {
		return 0, err
	}
	return firstStamp(kr.record), nil
}

// eventOf reads the event of a key with a stamp. The event is nil if there is no such event.
func (s *Store) eventOf(ctx context.Context, id token.ID, stamp int64) (foundEvent, error) {
	ctx, cancel := s.limitedRead(ctx)
	defer cancel()
	e, err := s.backend.Get(ctx, eventKey(stamp))
	if errors.Is(err, backend.ErrNotFound) {
		return foundEvent{}, nil
	}
	if err != nil {
		return foundEvent{}, s.scanError(ctx, "events", err)
	}
	event, err := parseEvent(e)
	if err != nil || token.ID(event.KeyId) != id {
		return foundEvent{}, err
	}
	return foundEvent{event, stamp}, nil
}
