// Package hashing makes the digest that is stored in place of a token, and compares a token with it in constant time.
//
// # Why a fast hash
//
// Slow, salted hashes (Argon2, bcrypt) make up for how easily the passwords that people choose are guessed. A token
// with 112 random bits or more cannot be guessed at any speed, and no two are equal, so that a table of digests made
// in advance helps nobody. One round of SHA-256 is right for it: OWASP ASVS 5.0, 6.5.2, and NIST SP 800-63B on
// look-up secrets draw the line at 112 bits. A slow hash would add its 50 ms and more to every call, and give
// strangers a way to use up the CPU.
//
// Do not use [SHA256] or [HMACSHA256] for what a person has chosen.
//
// # Pepper
//
// [HMACSHA256] mixes in a pepper: a key that is kept apart from the digests, in a secret manager or the environment.
// It does not make tokens harder to guess. It is for stores that others can get at, such as backups or a shared
// database: without the pepper, who reads the digests cannot tell whether a token that he has found is among them,
// and who writes them cannot add one for a token of his own; not, that is, once no [Keyring] with SHA256 accepts such
// a one.
//
// A digest cannot be matched without its pepper. When the pepper is lost, so are all keys that it was used for: they
// have to be issued again. Back it up, but not together with the digests.
//
// # Changing the scheme
//
// A digest cannot be turned into one of another scheme; that takes the token, which comes by when it is used.
// [Keyring] makes digests with the current hasher and still matches those of earlier ones, and says so
// ([MatchOutdated]). Once no stored digest has the scheme of an earlier hasher, that can go.
//
// # Other schemes
//
// A [Hasher] of one's own has two methods. It may add a salt: digests are matched, never looked up.
package hashing

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"
	"sync"
	"unsafe"
)

// A Digest is what is stored of a token. The zero Digest matches no token.
type Digest struct {
	Scheme string // names the way it was made, such as "sha256"
	Sum    []byte // as the scheme has it, a salt included; shared, and not to be changed
}

// A Result says whether a digest is that of a token. The zero Result is no.
type Result uint8

const (
	Mismatch      Result = iota // it is not, or the scheme is unknown, or the digest is damaged
	Match                       // it is
	MatchOutdated               // it is, and was made by an earlier hasher: digest the token anew when convenient
)

// A Hasher makes digests and matches tokens with them. Its methods must be safe for concurrent use, and neither keep
// nor change what they are given.
type Hasher interface {
	// Digest returns a digest of the token. Two calls may differ.
	Digest(token string) Digest

	// Match says whether d is a digest of the token. It is asked about any d, those of other
	// schemes and damaged ones included: they are a Mismatch. A Result that this package does not
	// declare means trouble, and admits nobody. The time that Match takes does not depend on the
	// bytes in d.Sum.
	Match(d Digest, token string) Result
}

// SHA256 returns the Hasher for SHA-256 (FIPS 180-4), with the scheme "sha256". It is the one to begin with; for when
// it is not enough, see Pepper above.
func SHA256() Hasher { return sha256Hasher{} }

type sha256Hasher struct{}

const sha256Scheme = "sha256"

func (sha256Hasher) Digest(token string) Digest {
	sum := sum256(token)
	return Digest{sha256Scheme, sum[:]}
}

func (sha256Hasher) Match(d Digest, token string) Result {
	if d.Scheme != sha256Scheme {
		return Mismatch
	}
	sum := sum256(token)
	return compare(d.Sum, sum[:])
}

// sum256 reads the token's bytes in place, because a plain conversion to a slice allocates, and copying them to the stack
// takes 7 ns, where a hash takes 140. Sum256 neither keeps nor changes what it is given.
func sum256(token string) [sha256.Size]byte {
	return sha256.Sum256(unsafe.Slice(unsafe.StringData(token), len(token)))
}

// compare is constant in time for sums of equal length. Lengths are public.
func compare(stored, sum []byte) Result {
	if !equal(stored, sum) {
		return Mismatch
	}
	return Match
}

// equal is subtle.ConstantTimeCompare, 8 bytes at a time: for a SHA-256 that saves 12 ns of 30, where hashing a token
// takes 140.
func equal(a, b []byte) bool {
	if len(a) != len(b) {
		return false
	}
	var differ uint64
	for len(a) >= 8 && len(b) >= 8 {
		differ |= binary.LittleEndian.Uint64(a) ^ binary.LittleEndian.Uint64(b)
		a, b = a[8:], b[8:]
	}
	for i := range a {
		differ |= uint64(a[i] ^ b[i])
	}
	return differ == 0
}

// HMACSHA256 returns the Hasher for HMAC with SHA-256 (RFC 2104, FIPS 198-1) and a pepper, with the scheme
// "hmac-sha256:" followed by the id. See Pepper in the package's comment for when to use it.
//
// The id has 1 to 64 letters, digits, '.', '_' and '-'. It is stored with each digest and is no
// secret. Give each pepper an id of its own, such as the year: it is the only way to see which
// digests still need an earlier one. A store that is opened with another pepper under the same id
// refuses to open.
//
// The pepper has 16 bytes or more, better 32, from crypto/rand. Whoever has a copy of a store can
// guess at a pepper that a person chose: the store holds a digest of a text that everybody knows.
// The pepper is copied. Nothing that the fmt package prints of the Hasher has it.
//
// The error is about an id or a pepper that is not so.
func HMACSHA256(id string, pepper []byte) (Hasher, error) {
	if id == "" || len(id) > 64 || strings.Trim(id, idChars) != "" {
		return nil, errors.New("hashing: the id of a pepper must have 1 to 64 letters, digits, '.', '_' and '-'; " +
			"the year will do")
	}
	if len(pepper) < 16 {
		return nil, fmt.Errorf("hashing: a pepper of %d bytes is too short: use 16 or more, better 32, from crypto/rand",
			len(pepper))
	}
	pepper = slices.Clone(pepper)
	// No field holds the pepper, only this closure and the states it keys: fmt prints neither.
	newState := func() any { return &hmacState{mac: hmac.New(sha256.New, pepper)} }
	return &hmacHasher{scheme: "hmac-sha256:" + id, states: sync.Pool{New: newState}}, nil
}

const idChars = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz._-"

type hmacHasher struct {
	scheme string
	// states are keyed once and used again: keying one takes three times as long as using it, and allocates.
	states sync.Pool // of *hmacState
}

// An hmacState has all that one sum needs, so that making it allocates nothing.
type hmacState struct {
	mac   hash.Hash
	token []byte
	sum   [sha256.Size]byte
}

func (h *hmacHasher) Digest(token string) Digest {
	s := h.states.Get().(*hmacState)
	defer h.states.Put(s)
	return Digest{h.scheme, slices.Clone(s.sumOf(token))}
}

func (h *hmacHasher) Match(d Digest, token string) Result {
	if d.Scheme != h.scheme {
		return Mismatch
	}
	s := h.states.Get().(*hmacState)
	defer h.states.Put(s)
	return compare(d.Sum, s.sumOf(token))
}

// sumOf returns a slice of s, which the next call overwrites.
func (s *hmacState) sumOf(token string) []byte {
	s.token = append(s.token[:0], token...)
	defer clear(s.token) // the state outlives the call, and may lie in the pool for long
	s.mac.Reset()
	s.mac.Write(s.token)
	return s.mac.Sum(s.sum[:0])
}

// Format prints the scheme, whatever the verb.
func (h *hmacHasher) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "hashing."+h.scheme) }

// Keyring returns a Hasher that makes digests with current, and matches those of all: what current matches is a
// Match, and what one of the earlier matches is [MatchOutdated]. It asks one after the other, which costs little,
// since for the digests of other schemes each has but a name to compare. Keyrings can be nested.
//
// The error is about a Hasher that is nil, or about two peppers with one id: a store could not tell
// their digests apart, and would count none as outdated. The same pepper twice is harmless, and is
// not an error. To find out, Keyring asks each Hasher for a digest of a fixed text.
func Keyring(current Hasher, earlier ...Hasher) (Hasher, error) {
	if current == nil {
		return nil, errors.New("hashing: the current hasher of a keyring is nil")
	}
	for i, h := range earlier {
		if h == nil {
			return nil, fmt.Errorf("hashing: earlier hasher %d of a keyring, counted from 0, is nil", i)
		}
	}
	k := &keyring{current: current, earlier: slices.Clone(earlier)}
	for _, h := range append([]Hasher{current}, earlier...) {
		for _, m := range membersOf(h) {
			if err := k.add(m); err != nil {
				return nil, err
			}
		}
	}
	return k, nil
}

type keyring struct {
	current Hasher
	earlier []Hasher
	members []member // of all hashers and nested keyrings, in the order in which Match asks them
}

// A member is a Hasher of a keyring that is no keyring.
type member struct {
	hasher Hasher
	digest Digest // of sample
}

// sample is no token of a store: a token has no space.
const sample = "a sample for the hashers of a keyring"

func membersOf(h Hasher) []member {
	if k, ok := h.(*keyring); ok {
		return k.members
	}
	return []member{{h, h.Digest(sample)}}
}

// add adds a member, unless an earlier one makes digests of the same scheme and does not match
// those of the member.
func (k *keyring) add(m member) error {
	for _, other := range k.members {
		if other.digest.Scheme == m.digest.Scheme && other.hasher.Match(m.digest, sample) != Match {
			return fmt.Errorf("hashing: two hashers of a keyring make digests of the scheme %q, and with "+
				"different peppers: give each pepper an id of its own, such as the year", m.digest.Scheme)
		}
	}
	k.members = append(k.members, m)
	return nil
}

// Schemes returns the schemes of all hashers of a keyring. A store asks for them, of any Hasher, to
// know whose digests the Hasher has to match.
func (k *keyring) Schemes() []string {
	schemes := make([]string, len(k.members))
	for i, m := range k.members {
		schemes[i] = m.digest.Scheme
	}
	return schemes
}

// HasEarlier reports whether a Match may be outdated. A store asks for it, of any Hasher, to know whether there may be
// digests to count.
func (k *keyring) HasEarlier() bool {
	current, ok := k.current.(interface{ HasEarlier() bool })
	return len(k.earlier) > 0 || ok && current.HasEarlier()
}

func (k *keyring) Digest(token string) Digest { return k.current.Digest(token) }

func (k *keyring) Match(d Digest, token string) Result {
	if r := k.current.Match(d, token); r != Mismatch {
		return r
	}
	for _, h := range k.earlier {
		switch r := h.Match(d, token); r {
		case Mismatch:
		case Match, MatchOutdated:
			return MatchOutdated
		default: // of a Hasher that has failed
			return r
		}
	}
	return Mismatch
}
