package etcdstore

import (
	"math/big"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// A part is the range of keys of one request: from <= key < to. For each request, etcd counts the
// entries of the whole range, whatever the limit is. So a scan of a long range reads the range in
// parts: without parts, the time of the scan would grow with the square of its entries.
//
// Nothing tells the scan how many entries a part has. So the scan guesses from the part before,
// with keys as numbers: the digits are the bytes.
type part struct{ from, to string }

// A part without entries makes the next part widerIfEmpty times as wide, so that a scan passes a
// gap after few requests. A part of which all entries were read makes the next part widerIfRead
// times as wide.
const (
	widerIfEmpty = 4
	widerIfRead  = 2
)

// next returns the part that a scan up to end reads after p. r is the response for p. After the
// last part, next.from is end.
func (p part) next(r *clientv3.GetResponse, end string) (next part) {
	switch n := len(r.Kvs); {
	case r.More:
		next.from = string(r.Kvs[n-1].Key) + "\x00"
		next.to = beyond(p.from, next.from, 1)
	case n == 0:
		next.from, next.to = p.to, beyond(p.from, p.to, widerIfEmpty)
	default:
		next.from, next.to = p.to, beyond(p.from, p.to, widerIfRead)
	}
	if next.to <= next.from || next.to > end {
		next.to = end
	}
	return next
}

// beyond returns a key that lies times as far above at as low lies below at, or "" if there is no
// such key.
func beyond(low, at string, times int64) string {
	size := max(len(low), len(at))
	n := number(at, size)
	distance := new(big.Int).Sub(n, number(low, size))
	n.Add(n, distance.Mul(distance, big.NewInt(times)))
	if n.BitLen() > 8*size {
		return ""
	}
	return text(n, size)
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
