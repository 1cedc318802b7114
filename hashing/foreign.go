package hashing

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"strconv"
	"strings"
)

// The hashers of this file match digests that other systems have made: put them into a [Keyring],
// as earlier hashers, for keys that a store has imported. A new store needs none of them.

// SHA512 returns the Hasher for SHA-512 (FIPS 180-4), with the scheme "sha512". SHA512 is for keys
// of djangorestframework-api-key 3 and later. SHA512 is as fast as [SHA256], and not safer for
// tokens.
func SHA512() Hasher { return sha512Hasher{} }

type sha512Hasher struct{}

const sha512Scheme = "sha512"

func (sha512Hasher) Digest(token string) Digest {
	sum := sha512.Sum512([]byte(token))
	return Digest{sha512Scheme, sum[:]}
}

func (sha512Hasher) Match(d Digest, token string) Result {
	if d.Scheme != sha512Scheme {
		return Mismatch
	}
	sum := sha512.Sum512([]byte(token))
	return compare(d.Sum, sum[:])
}

// PBKDF2SHA256 returns the Hasher for PBKDF2 with HMAC-SHA-256 (RFC 8018), with the scheme
// "pbkdf2-sha256". The Sum has the text form of Django, pbkdf2_sha256$iterations$salt$base64, with
// 1 to 10,000,000 iterations. PBKDF2SHA256 is for keys of djangorestframework-api-key before
// version 3.
//
// A match takes as long as the digest says, often 100 ms and more, so a store runs one match at a
// time: see the method Slow in [Hasher]. New digests have 1,000 iterations, because a random token
// needs no slow hash.
func PBKDF2SHA256() Hasher { return pbkdf2Hasher{} }

type pbkdf2Hasher struct{}

const (
	pbkdf2Scheme  = "pbkdf2-sha256"
	pbkdf2Name    = "pbkdf2_sha256$"
	maxIterations = 10_000_000
)

// Slow reports that a match takes long.
func (pbkdf2Hasher) Slow() bool { return true }

func (pbkdf2Hasher) Digest(token string) Digest {
	const iterations = 1000
	salt := rand.Text()
	key, err := pbkdf2.Key(sha256.New, token, []byte(salt), iterations, sha256.Size)
	if err != nil {
		return Digest{} // no store keeps a digest without a scheme
	}
	text := pbkdf2Name + strconv.Itoa(iterations) + "$" + salt + "$" +
		base64.StdEncoding.EncodeToString(key)
	return Digest{pbkdf2Scheme, []byte(text)}
}

func (pbkdf2Hasher) Match(d Digest, token string) Result {
	if d.Scheme != pbkdf2Scheme {
		return Mismatch
	}
	iterations, salt, stored, ok := parsePBKDF2(string(d.Sum))
	if !ok {
		return Mismatch
	}
	key, err := pbkdf2.Key(sha256.New, token, []byte(salt), iterations, sha256.Size)
	if err != nil {
		return Mismatch
	}
	return compare(stored, key)
}

// WellFormed reports whether Match can match a digest with this Sum.
func (pbkdf2Hasher) WellFormed(sum []byte) bool {
	_, _, _, ok := parsePBKDF2(string(sum))
	return ok
}

// parsePBKDF2 parses a digest in the text form of Django.
func parsePBKDF2(text string) (iterations int, salt string, sum []byte, ok bool) {
	parts := strings.Split(strings.TrimPrefix(text, pbkdf2Name), "$")
	if len(parts) != 3 || !strings.HasPrefix(text, pbkdf2Name) {
		return 0, "", nil, false
	}
	iterations, err := strconv.Atoi(parts[0])
	if err != nil || iterations < 1 || iterations > maxIterations || parts[1] == "" {
		return 0, "", nil, false
	}
	sum, err = base64.StdEncoding.Strict().DecodeString(parts[2])
	return iterations, parts[1], sum, err == nil && len(sum) == sha256.Size
}
