package token

import (
	"encoding/binary"
	"time"
)

// An ID identifies a key. An ID is a UUIDv7 (RFC 9562, section 5.7), most significant byte first.
// IDs sort by creation, both as bytes and as text. IDs can be compared with ==.
type ID [16]byte

// idLen is the length of the text of an ID. 26 characters of 5 bits have 130 bits, and an ID has
// 128: the first two bits are zero.
const idLen = 26

// alphabet is Crockford's base32 (https://www.crockford.com/base32.html) in lower case. Crockford's
// decoder also accepts upper case, and reads i, l and o as the digits 1, 1 and 0. ParseID refuses
// these characters, because two texts of one ID would have two digests.
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"

// values maps each character of the alphabet to its value, and every other byte to invalid. An OR
// of valid values is below 32, and so is never equal to invalid.
var values = func() (v [256]byte) {
	for i := range v {
		v[i] = invalid
	}
	for i, c := range alphabet {
		v[c] = byte(i)
	}
	return v
}()

const invalid = 0xff

// String returns the text of the ID, 26 characters. [ParseID] returns the ID of such a text.
func (id ID) String() string {
	hi, lo := binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:])
	var text [idLen]byte
	for i := idLen - 1; i >= 0; i-- {
		text[i] = alphabet[lo&31]
		lo = lo>>5 | hi<<59
		hi >>= 5
	}
	return string(text[:])
}

// Time returns the time of the ID, to the millisecond. The time of a new ID is the time of the
// clock, or later.
func (id ID) Time() time.Time {
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16)).UTC()
}

// First returns an ID that is no new key's: the smallest ID whose Time is not before t, to the
// millisecond. If t is before 1970, First returns the smallest ID. If t is after the year 10,000,
// First returns the greatest ID.
func First(t time.Time) (id ID) {
	switch {
	case t.Year() < 1970:
	case t.Year() > 10_000: // the 48 bits of the milliseconds end in the year 10889
		for i := range id {
			id[i] = 0xff
		}
	default:
		binary.BigEndian.PutUint64(id[:8], uint64(t.UnixMilli())<<16)
	}
	return id
}

// ParseID returns the ID with the text s, and true. If [ID.String] never returns s, ParseID returns
// the zero ID and false. ParseID does not allocate.
func ParseID(s string) (ID, bool) {
	hi, lo, ok := parseWords(s)
	if !ok {
		return ID{}, false
	}
	var id ID
	binary.BigEndian.PutUint64(id[:8], hi)
	binary.BigEndian.PutUint64(id[8:], lo)
	return id, true
}

// parseWords does the same as ParseID, but returns the ID as two words, which stay in registers.
// Bytes would be slow: a read of single bytes right after a write of whole words takes as long as a
// third of the parsing.
func parseWords(s string) (hi, lo uint64, ok bool) {
	const half = idLen / 2
	if len(s) != idLen || s[0] > '7' { // from '8', the value has more than 128 bits
		return 0, 0, false
	}
	// The loop parses both halves in parallel, because each step depends on the step before. The
	// check for invalid characters comes after the loop, because invalid characters are rare. A
	// half has 65 bits. The upper two bits of the first half are zero. The shifts lose the
	// uppermost bit of the second half, so the return statement adds that bit again.
	var seen byte
	for i := range half {
		h, l := values[s[i]], values[s[half+i]]
		hi, lo = hi<<5|uint64(h), lo<<5|uint64(l)
		seen |= h | l
	}
	if seen == invalid {
		return 0, 0, false
	}
	return hi<<1 | uint64(values[s[half]]>>4), lo, true
}
