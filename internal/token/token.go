// Package token is the text of an API key: how it is made, and how its ID is found again. It does no I/O.
//
// # Layout
//
//	<prefix>_<id>_<secret><checksum>
//
//	prefix    1 to 32 ASCII letters, digits and inner underscores: whose key it is, for people and for leak scanners
//	id        a UUIDv7 in 26 characters of Crockford's base32, lower case: sorts by creation, names the key in logs
//	secret    22 or more printable ASCII characters other than space and underscore, from crypto/rand
//	checksum  6 base62 characters: the CRC-32 (IEEE) of all bytes before them, most significant digit first
//
// The whole has at most 512 bytes. It is read from the right: no field behind the prefix can hold an underscore, so
// one in the prefix is no ambiguity.
//
// The layout follows GitHub's (https://github.blog/2021-04-05-behind-githubs-new-authentication-token-formats): a
// double click selects all of it, and a scanner can be certain of what it found. The ID is our addition. With it in
// clear, a key is found by one point read and named without its secret.
//
// The checksum lets a server drop what was mistyped before any I/O. Anyone can compute it, so nothing trusts it.
//
// # Compatibility
//
// [Parse] and [ChecksumOK] know no [Format]: keys that were issued under another prefix, length or charset stay
// valid. Nor do they ask for version 7 in the ID; an ID that was never issued is found to be unknown, whatever it
// holds.
//
// A token has one text: whatever Parse accepts is what its parts would be written as. There is no upper-case ID, no
// padding, and no white space to forgive.
package token

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
)

// MaxLength is the length of the longest token, in bytes.
const MaxLength = 512

const (
	maxPrefix   = 32
	minSecret   = 22 // known to the reader too, which does not know the charset: most of what is cut off is shorter
	checksumLen = 6  // 62^6 is the first power of 62 above 2^32
)

// Parse returns the ID of the token that s has the shape of, and true; or the zero ID and false, without a reason,
// because all refusals are to look the same.
//
// It runs on each use of a key and neither allocates nor checks the checksum: a stored digest, which covers all of s,
// decides about the rest. Ask [ChecksumOK] before paying for I/O.
func Parse(s string) (ID, bool) {
	if len(s) > MaxLength {
		return ID{}, false
	}
	// prefix _ id _ tail
	//        ^    ^ ^
	//        |    | tail
	//        |    second
	//        first
	tail := tailStart(s)
	second := tail - len("_")
	first := second - idLen - len("_")
	if first < 1 || s[first] != '_' || s[second] != '_' || !validPrefix(s[:first]) {
		return ID{}, false
	}
	if len(s)-tail < minSecret+checksumLen {
		return ID{}, false
	}
	for i := len(s) - checksumLen; i < len(s); i++ {
		if classes[s[i]]&alphanumeric == 0 {
			return ID{}, false
		}
	}
	return ParseID(s[first+1 : second])
}

// tailStart returns where the run of secret bytes that s ends with begins. That is where the secret begins, because
// an underscore is not one of them.
//
// The words are worth it: byte by byte, this takes 60 ns of a default token, and 20 ns as it is.
func tailStart(s string) int {
	i := len(s)
	for i >= 8 && allSecret(binary.LittleEndian.Uint64([]byte(s[i-8:i]))) { // the conversion copies nothing
		i -= 8
	}
	for i > 0 && classes[s[i-1]]&secret != 0 {
		i--
	}
	return i
}

// allSecret reports whether each of the 8 bytes in w is a secret one, as classes has it. Every line sets the high bit
// of the bytes that it objects to. A sum carries into the next byte only from one that the first line objects to.
func allSecret(w uint64) bool {
	const each = 0x01_01_01_01_01_01_01_01
	bad := w                             // not ASCII
	bad |= w + 1*each                    // DEL, the last of ASCII
	bad |= ^(w + (0x80-'!')*each)        // before '!': space and control characters
	bad |= ^((w ^ '_'*each) + 0x7f*each) // '_', which alone becomes zero
	return bad&(0x80*each) == 0
}

// ChecksumOK reports whether s ends in the checksum of the bytes before. It says nothing else about s, which is for
// [Parse]; and it does not allocate.
func ChecksumOK(s string) bool {
	i := len(s) - checksumLen
	if i < 0 {
		return false
	}
	sum := checksum(s[:i])
	return string(sum[:]) == s[i:]
}

// valid reports whether s has both the shape of a token and its checksum.
func valid(s string) bool {
	_, ok := Parse(s)
	return ok && ChecksumOK(s)
}

// checksum is written out, with tables made from that of hash/crc32, because what is passed to ChecksumIEEE escapes: every
// call would leave a copy of a credential on the heap. Eight bytes at a time (slicing-by-8) it takes 60 ns of a default
// token, and one by one 240.
func checksum(s string) (text [checksumLen]byte) {
	crc := ^uint32(0)
	for len(s) >= 8 {
		w := binary.LittleEndian.Uint64([]byte(s[:8])) ^ uint64(crc) // the conversion copies nothing
		crc = slices8[7][byte(w)] ^ slices8[6][byte(w>>8)] ^ slices8[5][byte(w>>16)] ^ slices8[4][byte(w>>24)] ^
			slices8[3][byte(w>>32)] ^ slices8[2][byte(w>>40)] ^ slices8[1][byte(w>>48)] ^ slices8[0][w>>56]
		s = s[8:]
	}
	for i := range len(s) {
		crc = slices8[0][byte(crc)^s[i]] ^ crc>>8
	}
	crc = ^crc
	for i := checksumLen - 1; i >= 0; i-- {
		text[i] = base62[crc%62]
		crc /= 62
	}
	return text
}

// slices8[n] has the CRC-32 of each byte followed by n zeros.
var slices8 = func() (t [8][256]uint32) {
	t[0] = *crc32.IEEETable
	for n := 1; n < len(t); n++ {
		for i, crc := range t[n-1] {
			t[n][i] = t[0][byte(crc)] ^ crc>>8
		}
	}
	return t
}()

// base62 has the digits of the checksum, in the order of their values.
const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// Hint returns what may be shown and logged of the token s: all that is left of the secret, and "_…". It is "…" for
// what is not valid: nobody knows where the secret is in that.
func Hint(s string) string {
	if !valid(s) {
		return "…"
	}
	return s[:strings.LastIndexByte(s, '_')] + "_…"
}

// HintOf returns the [Hint] of all tokens with the prefix and the ID, for the store, which has no token.
func HintOf(prefix string, id ID) string { return prefix + "_" + id.String() + "_…" }

// IDInHint returns the ID's text in what [HintOf] has returned, sharing its memory.
func IDInHint(hint string) string {
	end := len(hint) - len("_…")
	return hint[end-idLen : end]
}

// validPrefix reports whether s can be the prefix of a token.
func validPrefix(s string) bool {
	if len(s) == 0 || len(s) > maxPrefix || s[0] == '_' || s[len(s)-1] == '_' {
		return false
	}
	for i := range len(s) {
		if classes[s[i]]&(alphanumeric|underscore) == 0 {
			return false
		}
	}
	return true
}

// What a byte can be part of; none of it is not in a token at all.
const (
	secret       byte = 1 << iota // printable ASCII, without space and '_'
	alphanumeric                  // of prefix and checksum
	underscore
)

var classes = func() (c [256]byte) {
	for b := '!'; b <= '~'; b++ {
		c[b] = secret
	}
	for _, b := range base62 {
		c[b] |= alphanumeric
	}
	c['_'] = underscore
	return c
}()
