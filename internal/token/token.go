// Package token defines the text of an API key. The package makes new tokens and finds the ID in a
// token. The package does no I/O.
//
// # Layout
//
//	<prefix>_<id>_<secret><checksum>
//
//	prefix    1 to 32 ASCII letters, digits and inner underscores: names the issuer of the key,
//	          for people and for leak scanners
//	id        a UUIDv7 in 26 characters of Crockford's base32, lower case: sorts by creation,
//	          names the key in logs
//	secret    22 or more printable ASCII characters other than space and underscore, from
//	          crypto/rand
//	checksum  6 base62 characters: the CRC-32 (IEEE) of all bytes before the checksum, most
//	          significant digit first
//
// A token has at most 512 bytes. A token is parsed from the right: no field after the prefix can
// contain an underscore, so underscores in the prefix are not ambiguous.
//
// The layout follows the tokens of GitHub
// (https://github.blog/2021-04-05-behind-githubs-new-authentication-token-formats): a double click
// selects the whole token, and a scanner can be certain that a match is a token. This package adds
// the ID. The ID is readable in the token, so a store finds the key with one point read, and a log
// can name the key without its secret.
//
// With the checksum, a server refuses a mistyped token before any I/O. Anyone can compute the
// checksum, so nothing trusts the checksum.
//
// # Compatibility
//
// [Parse] and [ChecksumOK] do not depend on a [Format]: keys that were issued with another prefix,
// length or charset stay valid. Parse does not require version 7 in the ID either: the store does
// not find an ID that was never issued, whatever the bits of the ID are.
//
// A token has exactly one text. Parse accepts a text only if the parts of the text, written again,
// give the same text. Parse accepts no upper-case ID, no padding and no white space.
package token

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
)

// MaxLength is the length of the longest token, in bytes.
const MaxLength = 512

const (
	maxPrefix = 32

	// minSecret holds for every charset. So Parse, which does not know the charset, can refuse most
	// tokens that were cut off.
	minSecret   = 22
	checksumLen = 6 // 62^6 is the first power of 62 above 2^32
)

// Parse returns the ID in s and true if s has the shape of a token. Otherwise Parse returns the
// zero ID and false. Parse gives no reason, because all refusals must look the same to a client.
//
// Parse runs on each use of a key, and does not allocate. Parse does not check the checksum,
// because the stored digest covers all of s and decides whether s is valid. Call [ChecksumOK]
// before an expensive read from the store.
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
	if first < 1 || s[first] != '_' || s[second] != '_' || !ValidPrefix(s[:first]) {
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

// tailStart returns the index of the first byte after the last byte of s that cannot be in a
// secret. In a token, that is the start of the secret, because a secret contains no underscore.
//
// tailStart looks at 8 bytes at a time, because a loop over single bytes takes 60 ns for a default
// token, and tailStart takes 20 ns.
func tailStart(s string) int {
	i := len(s)
	// The conversion to a slice copies nothing.
	for i >= 8 && allSecret(binary.LittleEndian.Uint64([]byte(s[i-8:i]))) {
		i -= 8
	}
	for i > 0 && classes[s[i-1]]&secret != 0 {
		i--
	}
	return i
}

// allSecret reports whether each of the 8 bytes in w has the class secret. Every line sets the high
// bit of each byte that the line refuses. A sum carries into the next byte only from a byte that
// the first line refuses.
func allSecret(w uint64) bool {
	const each = 0x01_01_01_01_01_01_01_01
	bad := w                             // not ASCII
	bad |= w + 1*each                    // DEL, the last of ASCII
	bad |= ^(w + (0x80-'!')*each)        // before '!': space and control characters
	bad |= ^((w ^ '_'*each) + 0x7f*each) // '_', the only byte that the XOR turns into zero
	return bad&(0x80*each) == 0
}

// ChecksumOK reports whether the end of s is the checksum of the bytes before. ChecksumOK does not
// check the shape of s: call [Parse] for that. ChecksumOK does not allocate.
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

// checksum returns the CRC-32 (IEEE) of s as base62 text. checksum does not call
// crc32.ChecksumIEEE, because the argument of ChecksumIEEE escapes: every call would leave a copy
// of a credential on the heap. The tables are made from the table of hash/crc32. For a default
// token, checksum takes 60 ns with 8 bytes at a time (slicing-by-8), and would take 240 ns with
// single bytes.
func checksum(s string) (text [checksumLen]byte) {
	crc := ^uint32(0)
	for len(s) >= 8 {
		// The conversion to a slice copies nothing.
		w := binary.LittleEndian.Uint64([]byte(s[:8])) ^ uint64(crc)
		crc = slices8[7][byte(w)] ^ slices8[6][byte(w>>8)] ^
			slices8[5][byte(w>>16)] ^ slices8[4][byte(w>>24)] ^
			slices8[3][byte(w>>32)] ^ slices8[2][byte(w>>40)] ^
			slices8[1][byte(w>>48)] ^ slices8[0][w>>56]
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

// slices8[n] is the table of the CRC-32 of each byte followed by n zeros.
var slices8 = func() (t [8][256]uint32) {
	t[0] = *crc32.IEEETable
	for n := 1; n < len(t); n++ {
		for i, crc := range t[n-1] {
			t[n][i] = t[0][byte(crc)] ^ crc>>8
		}
	}
	return t
}()

// base62 lists the digits of the checksum, in the order of their values.
const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// Hint returns a text that may be shown and logged in place of the token s: the part before the
// secret, followed by "_…". If s is not a valid token, Hint returns "…", because the secret
// could be anywhere in s.
func Hint(s string) string {
	if !valid(s) {
		return "…"
	}
	return s[:strings.LastIndexByte(s, '_')] + "_…"
}

// HintOf returns the [Hint] of every token with the prefix and the ID. The store uses HintOf,
// because the store does not keep the token.
func HintOf(prefix string, id ID) string { return prefix + "_" + id.String() + "_…" }

// IDInHint returns the text of the ID in a result of [HintOf]. The text shares the memory of hint.
func IDInHint(hint string) string {
	end := len(hint) - len("_…")
	return hint[end-idLen : end]
}

// ValidPrefix reports whether s can be the prefix of a token.
func ValidPrefix(s string) bool {
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

// The classes of a byte tell in which parts of a token the byte may occur. A byte without a class
// occurs in no token.
const (
	secret       byte = 1 << iota // printable ASCII, without space and '_'
	alphanumeric                  // may occur in the prefix and in the checksum
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
