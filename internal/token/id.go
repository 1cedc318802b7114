package token

import "encoding/binary"

// An ID names a key. It is a UUIDv7 (RFC 9562, section 5.7), most significant byte first: IDs sort by creation, as
// bytes and as texts alike. IDs can be compared with ==.
type ID [16]byte

// idLen is the length of an ID's text: 26 characters of 5 bits have room for 130, and the first two are zero.
const idLen = 26

// alphabet is Crockford's (https://www.crockford.com/base32.html) in lower case. His decoder also takes upper case,
// and i, l and o for the digits that they look like. Ours does not: two texts of one ID would have two digests.
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz"

// values has the value of each character of the alphabet, and invalid for all others. No values below 32 combine to
// invalid.
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

// String returns the ID's text: 26 characters, which [ParseID] takes back.
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

// ParseID returns the ID that s is the text of, and true; or, for anything that [ID.String] does not return, the zero
// ID and false. It does not allocate.
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

// parseWords is ParseID in two words, which stay in registers: to read bytes right after they were written as words
// takes as long as to parse a third of them.
func parseWords(s string) (hi, lo uint64, ok bool) {
	const half = idLen / 2
	if len(s) != idLen || s[0] > '7' { // from '8', the value has more than 128 bits
		return 0, 0, false
	}
	// Two halves at once, because each step waits for the one before; all errors at the end, because they are rare.
	// A half is 65 bits: of the first the upper two are zero, and of the second the uppermost is lost, to be fetched
	// below.
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
