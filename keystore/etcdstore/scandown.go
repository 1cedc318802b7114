package etcdstore

import (
	"context"
	"iter"
	"math/big"
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

// middle returns a key about halfway between two keys, or low if no key lies between low and high.
// low must be lower than high. If keys differ only by zeros at the end, middle may never divide the
// keys. A storage key has at most backend.MaxKeySize bytes, so a page holds all such keys.
func middle(low, high string) string {
	size := max(len(low), len(high)) + 1
	sum := new(big.Int).Add(number(low, size), number(high, size))
	at := text(sum.Rsh(sum, 1), size)
	if low < at && at < high {
		return at
	}
	if next := low + "\x00"; next < high {
		return next
	}
	return low
}

// below returns a key that lies as far below at as top lies above at, or "" if there is no such
// key.
func below(at, top string) string {
	size := max(len(at), len(top))
	n := number(at, size)
	n.Sub(n.Lsh(n, 1), number(top, size))
	if n.Sign() <= 0 {
		return ""
	}
	return text(n, size)
}

// number returns a key as a number of size digits. The digits have base 256.
func number(key string, size int) *big.Int {
	digits := make([]byte, size)
	copy(digits, key)
	return new(big.Int).SetBytes(digits)
}

// text returns the key of a number of size digits, without the zeros at the end.
func text(n *big.Int, size int) string {
	digits := n.FillBytes(make([]byte, size))
	for size > 0 && digits[size-1] == 0 {
		size--
	}
	return string(digits[:size])
}
