package etcdstore

import (
	"context"
	"iter"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// ScanDown implements backend.DownScanner.
//
// For a request in descending order, etcd would read and sort the whole range. So ScanDown divides
// the range into parts of at most 256 entries, from the upper end, and reads each part in ascending
// order. To find a part, ScanDown asks how many entries lie above a key. etcd answers from memory.
func (b *Backend) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	low, end := b.bounds(from, to)
	return func(yield func(backend.Entry, error) bool) {
		high, guess := end, ""
		for {
			if err := b.calls.Ended(ctx); err != nil {
				yield(backend.Entry{}, err)
				return
			}
			if low >= high {
				return
			}
			at, err := b.lastPart(ctx, low, high, guess)
			var r *clientv3.GetResponse
			if err == nil {
				r, _, err = b.read(ctx, "read", at, clientv3.WithRange(high))
			}
			if err != nil {
				yield(backend.Entry{}, err)
				return
			}
			slices.Reverse(r.Kvs)
			if !b.yieldAll(ctx, r.Kvs, yield) {
				return
			}
			if high, guess = at, ""; len(r.Kvs) > 0 {
				guess = below(at, string(r.Kvs[0].Key)) // the next part may be as wide
			}
		}
	}
}

// lastPart returns a key. The range from the key up to high has at most 256 entries, unless other
// calls add entries. guess is the key to try first; "" means that there is no guess. If the key is
// higher than low, the range has at least one entry.
func (b *Backend) lastPart(ctx context.Context, low, high, guess string) (string, error) {
	if low < guess && guess < high {
		first, n, err := b.count(ctx, guess, high)
		switch {
		case err != nil || 0 < n && n <= pageEntries:
			return guess, err
		case n == 0:
			high = guess
		default:
			low = first
		}
	}
	first, n, err := b.count(ctx, low, high)
	if err != nil || n <= pageEntries {
		return low, err
	}
	// Invariant: the range from low up to high has more than 256 entries, and the range from high
	// up to the upper end has none.
	for low = first; ; {
		at := middle(low, high)
		if at == low {
			return low, nil
		}
		first, n, err := b.count(ctx, at, high)
		switch {
		case err != nil || 0 < n && n <= pageEntries:
			return at, err
		case n == 0:
			high = at
		default:
			low = first
		}
	}
}

// count returns the lowest key of a range, and the number of entries in the range.
func (b *Backend) count(ctx context.Context, from, to string) (first string, n int64, err error) {
	r, _, err := b.read(ctx, "read", from, clientv3.WithRange(to), clientv3.WithLimit(1),
		clientv3.WithKeysOnly())
	if err != nil || len(r.Kvs) == 0 {
		return "", 0, err
	}
	return string(r.Kvs[0].Key), r.Count, nil
}
