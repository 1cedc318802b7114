// Package sha2crypt has the hasher for digests of SHA-crypt, as crypt(3) of glibc and sha512_crypt
// and sha256_crypt of passlib make them. The hasher is for keys of flask-api-key, which hashes keys
// as if they were passwords. Put the hasher into a [hashing.Keyring] as an earlier hasher, and
// remove the hasher when no key has such a digest any more. A new store does not need the package.
package sha2crypt

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"fmt"
	"hash"
	"strconv"
	"strings"

	"github.com/go-crypt/x/crypt"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

// Scheme is the scheme of the digests.
const Scheme = "sha2-crypt"

// New returns the Hasher for SHA-crypt (https://www.akkadia.org/drepper/SHA-crypt.txt). The Sum of
// a digest is the text that crypt(3) returns, $6$rounds=656000$salt$key, with $6$ for SHA-512 or
// $5$ for SHA-256, and 1,000 to 5,000,000 rounds. Without rounds=, a digest has 5,000 rounds.
//
// A match with the usual 656,000 rounds takes more than a second of CPU, so a store runs one match
// at a time: see the method Slow in [hashing.Hasher]. New digests have 1,000 rounds, because a
// random token needs no slow hash.
func New() hashing.Hasher { return hasher{} }

type hasher struct{}

const (
	minRounds     = 1000
	defaultRounds = 5000
	maxRounds     = 5_000_000
	maxSalt       = 16
	// saltChars are the characters of a salt and of a key.
	saltChars = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)

// Slow reports that a match takes long.
func (hasher) Slow() bool { return true }

func (hasher) Digest(token string) hashing.Digest {
	salt := rand.Text()[:maxSalt]
	key := crypt.KeySHACrypt(sha512.New, []byte(token), []byte(salt), minRounds)
	text := fmt.Appendf(nil, "$6$rounds=%d$%s$%s", minRounds, salt, key)
	return hashing.Digest{Scheme: Scheme, Sum: text}
}

func (hasher) Match(d hashing.Digest, token string) hashing.Result {
	if d.Scheme != Scheme {
		return hashing.Mismatch
	}
	p, ok := parse(string(d.Sum))
	if !ok {
		return hashing.Mismatch
	}
	key := crypt.KeySHACrypt(p.newHash, []byte(token), []byte(p.salt), p.rounds)
	if subtle.ConstantTimeCompare(key, []byte(p.key)) != 1 {
		return hashing.Mismatch
	}
	return hashing.Match
}

// WellFormed reports whether Match can match a digest with this Sum.
func (hasher) WellFormed(sum []byte) bool {
	_, ok := parse(string(sum))
	return ok
}

// A parsed is a digest without a token.
type parsed struct {
	newHash   func() hash.Hash
	rounds    int
	salt, key string
}

func parse(text string) (p parsed, ok bool) {
	parts := strings.Split(text, "$")
	if len(parts) < 4 || parts[0] != "" {
		return p, false
	}
	keyLen := 0
	switch parts[1] {
	case "5":
		p.newHash, keyLen = sha256.New, 43
	case "6":
		p.newHash, keyLen = sha512.New, 86
	default:
		return p, false
	}
	parts = parts[2:]
	p.rounds = defaultRounds
	if rounds, ok := strings.CutPrefix(parts[0], "rounds="); ok {
		n, err := strconv.Atoi(rounds)
		if err != nil || n < minRounds || n > maxRounds {
			return p, false
		}
		p.rounds, parts = n, parts[1:]
	}
	if len(parts) != 2 {
		return p, false
	}
	p.salt, p.key = parts[0], parts[1]
	return p, len(p.salt) <= maxSalt && len(p.key) == keyLen &&
		strings.Trim(p.salt+p.key, saltChars) == ""
}
