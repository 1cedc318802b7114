// Package hashing makes the digest that a store keeps in place of a token, and compares a token
// with a digest in constant time. For most stores, [SHA256] is enough. If other people can read or
// write the digests, use [HMACSHA256]. To change from one hasher to another, use [Keyring].
//
// # Why a fast hash
//
// Slow, salted hashes such as Argon2 and bcrypt protect passwords, because people choose passwords
// that are easy to guess. A token with at least 112 random bits cannot be guessed at any speed. No
// two tokens are equal, so a table of digests made in advance does not help an attacker. One round
// of SHA-256 is the right hash for such a token: OWASP ASVS 5.0, 6.5.2, and NIST SP 800-63B on
// look-up secrets draw the line at 112 bits. A slow hash would add 50 ms or more to every call, and
// would let strangers use up the CPU.
//
// Do not use [SHA256] or [HMACSHA256] for a password that a person has chosen.
//
// # Pepper
//
// [HMACSHA256] adds a pepper to the hash. A pepper is a secret key that is kept apart from the
// digests, in a secret manager or in the environment. A pepper does not make tokens harder to
// guess. It protects stores that other people can reach, such as backups or a shared database. An
// attacker who reads the digests, but not the pepper, cannot find out whether a given token is in
// the store. An attacker who writes digests cannot add a digest for a token of his own, unless the
// [Keyring] still accepts digests of [SHA256], which need no pepper.
//
// A digest cannot be matched without the pepper that made the digest. If the pepper is lost, every
// key that was hashed with the pepper is lost too, and has to be issued again. Back the pepper up,
// but not together with the digests.
//
// # Changing the scheme
//
// A digest cannot be converted to another scheme. A new digest needs the token, and the store sees
// the token only when a client uses the key. So a [Keyring] makes digests with the current hasher,
// still matches the digests of earlier hashers, and reports such a match as [MatchOutdated]. Remove
// an earlier hasher once no stored digest has its scheme.
//
// # Other schemes
//
// To use another scheme, implement the two methods of [Hasher]. The scheme may use a salt, because
// a store compares digests and never looks a key up by its digest.
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

// A Digest is stored in place of a token. The zero Digest matches no token.
type Digest struct {
	Scheme string // the method that made the digest, such as "sha256"
	Sum    []byte // in the form of the scheme, with the salt if there is one; shared: do not modify
}

// A Result tells whether a digest belongs to a token. The zero Result means no.
type Result uint8

const (
	Mismatch      Result = iota // a different token, an unknown scheme or a damaged digest
	Match                       // the digest belongs to the token
	MatchOutdated               // a match by an earlier hasher: store a new digest when convenient
)

// A Hasher makes digests and matches tokens with digests. The methods must be safe for concurrent
// use. The methods must neither keep nor modify their arguments.
//
// A Hasher may have two more methods, for the digests that other systems have made. If the method
// Slow() bool returns true, a match takes long enough that strangers could use up the CPU with
// wrong tokens: a store then runs one match of the scheme at a time. The method
// WellFormed(sum []byte) bool reports whether Match can match a digest with this Sum: a store
// imports no other digest of the scheme.
type Hasher interface {
	// Digest returns a digest of the token. Two calls may differ.
	Digest(token string) Digest

	// Match reports whether d is a digest of the token. Callers pass any d: for a digest of another
	// scheme, or a damaged digest, Match returns Mismatch. A Result that this package does not
	// declare means that the Hasher has failed, and the store then refuses the token. The duration
	// of Match does not depend on the bytes in d.Sum.
	Match(d Digest, token string) Result
}

// SHA256 returns the Hasher for SHA-256 (FIPS 180-4), with the scheme "sha256". Start with SHA256.
// The section on peppers in the package comment tells when SHA256 is not enough.
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

// Sum256 returns the Sum of the digest of the token. A store that finds this method can hash before
// it has loaded the digest to compare with.
func (sha256Hasher) Sum256(token string) [sha256.Size]byte { return sum256(token) }

// sum256 hashes the token without a copy of its bytes. A plain conversion to a slice allocates, and
// a copy on the stack takes 7 ns, while the hash takes 140 ns. The unsafe slice is safe here,
// because sha256.Sum256 neither keeps nor modifies its argument.
func sum256(token string) [sha256.Size]byte {
	return sha256.Sum256(unsafe.Slice(unsafe.StringData(token), len(token)))
}

// compare takes constant time for sums of equal length. The length of a sum is public.
func compare(stored, sum []byte) Result {
	if !equal(stored, sum) {
		return Mismatch
	}
	return Match
}

// equal does the same as subtle.ConstantTimeCompare, but compares 8 bytes at a time. For the sum of
// a SHA-256, equal takes 18 ns instead of 30 ns; to hash a token takes 140 ns.
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

// HMACSHA256 returns the Hasher for HMAC with SHA-256 (RFC 2104, FIPS 198-1) and a pepper. The
// scheme is "hmac-sha256:" followed by the id. The section on peppers in the package comment tells
// when to use HMACSHA256.
//
// The id consists of 1 to 64 ASCII letters, digits, '.', '_' and '-'. The id is stored with each
// digest and is not secret. Give each pepper a different id, such as the year: only the id shows
// which digests still need an earlier pepper. A store refuses to open if the id is the same but the
// pepper is not.
//
// The pepper has at least 16 bytes from crypto/rand; 32 bytes are better. Do not choose a pepper by
// hand: the store contains a digest of a publicly known text, so an attacker with a copy of the
// store can test guesses. HMACSHA256 copies the pepper. The fmt package never prints the pepper of
// a Hasher.
//
// HMACSHA256 returns an error if the id or the pepper breaks these rules.
func HMACSHA256(id string, pepper []byte) (Hasher, error) {
	if id == "" || len(id) > 64 || strings.Trim(id, idChars) != "" {
		return nil, errors.New("hashing: the id of a pepper must consist of " +
			"1 to 64 ASCII letters, digits, '.', '_' and '-', such as the year")
	}
	if len(pepper) < 16 {
		return nil, fmt.Errorf("hashing: the pepper has %d bytes and needs at least 16: "+
			"use 32 bytes from crypto/rand", len(pepper))
	}
	pepper = slices.Clone(pepper)
	// No field contains the pepper. Only this closure and the states that the closure makes contain
	// the pepper, and fmt prints neither.
	newState := func() any { return &hmacState{mac: hmac.New(sha256.New, pepper)} }
	return &hmacHasher{scheme: "hmac-sha256:" + id, states: sync.Pool{New: newState}}, nil
}

const idChars = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz._-"

type hmacHasher struct {
	scheme string
	// states contains values of type *hmacState. A state is set up with the pepper once, and then
	// used many times: the set-up takes three times as long as one use, and allocates.
	states sync.Pool
}

// An hmacState has all the memory that one HMAC needs, so that the computation does not allocate.
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

// sumOf returns the HMAC of the token. The result is a slice of s; the next call overwrites it.
func (s *hmacState) sumOf(token string) []byte {
	s.token = append(s.token[:0], token...)
	defer clear(s.token) // the state may stay in the pool for a long time after the call
	s.mac.Reset()
	s.mac.Write(s.token)
	return s.mac.Sum(s.sum[:0])
}

// Format prints the scheme for every verb, and nothing else.
func (h *hmacHasher) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "hashing."+h.scheme) }

// Keyring returns a Hasher that makes digests with current and matches the digests of all hashers.
// Match returns [Match] if current matches the token, and [MatchOutdated] if an earlier hasher
// matches the token. Match asks the hashers one after another, which is cheap: a hasher compares
// only the name of the scheme if the digest has another scheme. Keyrings can be nested.
//
// Keyring returns an error if a Hasher is nil, or if two different peppers have the same id. A
// store could not tell the digests of two such peppers apart, and would count no digest as
// outdated. The same pepper twice is harmless and not an error. To detect different peppers,
// Keyring calls the Digest method of each Hasher with a fixed text.
func Keyring(current Hasher, earlier ...Hasher) (Hasher, error) {
	if current == nil {
		return nil, errors.New("hashing: the current hasher of the keyring is nil")
	}
	for i, h := range earlier {
		if h == nil {
			return nil, fmt.Errorf("hashing: earlier[%d] of the keyring is nil", i)
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
	members []member // all hashers, those of nested keyrings too, in the order in which Match asks
}

// A member is a Hasher in a keyring, but never a keyring itself.
type member struct {
	hasher Hasher
	digest Digest // the digest of sample
}

// sample cannot be a token of a store, because a token contains no space.
const sample = "a sample for the hashers of a keyring"

func membersOf(h Hasher) []member {
	if k, ok := h.(*keyring); ok {
		return k.members
	}
	return []member{{h, h.Digest(sample)}}
}

// add adds m to the keyring. add returns an error if an earlier member has the same scheme as m and
// does not match the digests of m.
func (k *keyring) add(m member) error {
	for _, other := range k.members {
		if other.digest.Scheme == m.digest.Scheme && other.hasher.Match(m.digest, sample) != Match {
			return fmt.Errorf("hashing: two hashers of the keyring have the scheme %q "+
				"but different peppers: give each pepper its own id, such as the year",
				m.digest.Scheme)
		}
	}
	k.members = append(k.members, m)
	return nil
}

// Schemes returns the schemes of all hashers in the keyring. A store calls Schemes, if a Hasher has
// this method, to find out which digests the Hasher must be able to match.
func (k *keyring) Schemes() []string {
	schemes := make([]string, len(k.members))
	for i, m := range k.members {
		schemes[i] = m.digest.Scheme
	}
	return schemes
}

// SlowSchemes returns the schemes of the hashers that have a method Slow, if Slow returns true. A
// store calls SlowSchemes, if a Hasher has this method, to find out which matches to run one at a
// time.
func (k *keyring) SlowSchemes() (schemes []string) {
	for _, m := range k.members {
		if h, ok := m.hasher.(interface{ Slow() bool }); ok && h.Slow() {
			schemes = append(schemes, m.digest.Scheme)
		}
	}
	return schemes
}

// Recognizes reports whether a hasher of the keyring can match a digest. A store calls Recognizes,
// if a Hasher has this method, before it imports a digest.
func (k *keyring) Recognizes(d Digest) bool {
	for _, m := range k.members {
		if m.digest.Scheme != d.Scheme {
			continue
		}
		if h, ok := m.hasher.(interface{ WellFormed(sum []byte) bool }); ok {
			return h.WellFormed(d.Sum)
		}
		return len(d.Sum) == len(m.digest.Sum)
	}
	return false
}

// HasEarlier reports whether Match can return MatchOutdated. A store calls HasEarlier, if a Hasher
// has this method, to find out whether to count outdated digests.
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
		default: // the Hasher has failed
			return r
		}
	}
	return Mismatch
}
