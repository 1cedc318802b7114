package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// pageEntries is the largest number of entries that one request reads.
const pageEntries = 256

// Get implements backend.Backend.
func (b *Backend) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	r, generation, err := b.read(ctx, "read", b.base+string(key))
	if err != nil {
		return backend.Entry{}, err
	}
	if len(r.Kvs) == 0 || len(key) == 0 { // the key base alone is the marker
		return backend.Entry{}, backend.ErrNotFound
	}
	e, err := b.parse(r.Kvs[0])
	if err != nil {
		return backend.Entry{}, err
	}
	b.history.note(generation, e, r.Kvs[0].ModRevision)
	return e, nil
}

// GetAll implements backend.AllGetter. GetAll is one transaction of etcd, and one round trip.
func (b *Backend) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	if len(keys) > backend.MaxChanges {
		return nil, fmt.Errorf("etcdstore: read %d keys at once: at most %d are allowed", len(keys),
			backend.MaxChanges)
	}
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	entries := make([]backend.Entry, len(keys))
	if len(keys) == 0 {
		return entries, nil
	}
	gets := make([]clientv3.Op, len(keys))
	for i, key := range keys {
		gets[i] = clientv3.OpGet(b.base + string(key))
	}
	for {
		before := b.history.now()
		r, err := b.kv.Txn(joined).Then(gets...).Commit()
		if err != nil {
			return nil, b.wrap(ctx, "read", err)
		}
		if b.history.observe(b, before, r.Header) != nil {
			continue // as in read
		}
		for i, one := range r.Responses {
			found := one.GetResponseRange().GetKvs()
			if len(found) == 0 || len(keys[i]) == 0 {
				continue
			}
			if entries[i], err = b.parse(found[0]); err != nil {
				return nil, err
			}
			b.history.note(before.generation, entries[i], found[0].ModRevision)
		}
		return entries, nil
	}
}

// read makes one linearizable read, and returns the generation of the response too.
func (b *Backend) read(
	ctx context.Context, op, key string, opts ...clientv3.OpOption,
) (*clientv3.GetResponse, uint64, error) {
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return nil, 0, err
	}
	defer end()
	for {
		before := b.history.now()
		r, err := b.kv.Get(joined, key, opts...)
		if err != nil {
			return nil, 0, b.wrap(ctx, op, err)
		}
		if b.history.observe(b, before, r.Header) == nil {
			return r, before.generation, nil
		}
		// The history changed during the read. A second read shows the present history.
	}
}

// bounds returns the range of etcd's keys for a range of storage keys. A range with from >= to is
// empty. The marker of the store is in no range.
func (b *Backend) bounds(from, to []byte) (start, end string) {
	start = b.base + string(from)
	if len(from) == 0 {
		start = b.base + "\x00"
	}
	if to == nil {
		return start, clientv3.GetPrefixRangeEnd(b.base)
	}
	return start, b.base + string(to)
}

// Scan implements backend.Backend. Scan reads up to 256 entries with one request.
func (b *Backend) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	start, end := b.bounds(from, to)
	return func(yield func(backend.Entry, error) bool) {
		b.scan(ctx, start, end, yield, func(p part) (*clientv3.GetResponse, error) {
			r, _, err := b.read(ctx, "read", p.from, clientv3.WithRange(p.to),
				clientv3.WithLimit(pageEntries))
			return r, err
		})
	}
}

// Snapshot implements backend.Backend. Snapshot reads all entries as of the revision of the first
// request. If etcd compacts the revision before Snapshot has read everything, Snapshot yields an
// error: etcd must keep its history for longer than a Snapshot takes.
func (b *Backend) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	start, end := b.bounds(from, to)
	return func(yield func(backend.Entry, error) bool) {
		var revision int64 // of the snapshot; 0: no page was read
		var first uint64   // the generation of the first page
		b.scan(ctx, start, end, yield, func(p part) (*clientv3.GetResponse, error) {
			r, generation, err := b.read(ctx, "read a snapshot", p.from, clientv3.WithRange(p.to),
				clientv3.WithLimit(pageEntries), clientv3.WithRev(revision))
			switch {
			case errors.Is(err, rpctypes.ErrCompacted):
				return nil, fmt.Errorf("etcdstore: read a snapshot: etcd has compacted revision "+
					"%d while the snapshot was read: keep the history for longer: start etcd "+
					"with --auto-compaction-mode=periodic and a longer "+
					"--auto-compaction-retention: %w", revision, rpctypes.ErrCompacted)
			case err != nil:
				return nil, err
			case revision == 0:
				revision, first = r.Header.Revision, generation
			case generation != first:
				return nil, fmt.Errorf("etcdstore: read a snapshot: %w while the snapshot was "+
					"read: read the snapshot again", errRestored)
			}
			return r, nil
		})
	}
}

// scan yields the entries of a range. page reads the first entries of a part of the range.
func (b *Backend) scan(ctx context.Context, start, end string,
	yield func(backend.Entry, error) bool, page func(part) (*clientv3.GetResponse, error),
) {
	for p := (part{start, end}); ; {
		if err := b.calls.Ended(ctx); err != nil {
			yield(backend.Entry{}, err)
			return
		}
		if p.from >= end {
			return
		}
		r, err := page(p)
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		if !b.yieldAll(ctx, r.Kvs, yield) {
			return
		}
		p = p.next(r, end)
	}
}

// yieldAll yields entries, and reports whether the iteration continues. An iteration that ends with
// an error has yielded the error.
func (b *Backend) yieldAll(
	ctx context.Context, kvs []*mvccpb.KeyValue, yield func(backend.Entry, error) bool,
) bool {
	// An error after the last entry of a page comes with the next step, not before the body has
	// seen the page: a body that calls Close must see ErrClosed even if no page follows.
	for _, kv := range kvs {
		e, err := b.parse(kv)
		if err == nil {
			err = b.calls.Ended(ctx)
		}
		if err != nil {
			yield(backend.Entry{}, err)
			return false
		}
		if !yield(e, nil) {
			return false
		}
	}
	if err := b.calls.Ended(ctx); err != nil && len(kvs) > 0 {
		yield(backend.Entry{}, err)
		return false
	}
	return true
}
