package hashing_test

import (
	"bytes"
	"crypto/rand"
	"crypto/sha512"
	"crypto/subtle"
	"fmt"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

// saltedSHA512 is a user-defined scheme. A Sum is the salt, followed by the SHA-512 of salt and
// token.
type saltedSHA512 struct{}

const (
	saltedScheme = "salted-sha512"
	saltLen      = 16
)

func (saltedSHA512) Digest(token string) hashing.Digest {
	salt := make([]byte, saltLen)
	rand.Read(salt) // never fails
	return hashing.Digest{Scheme: saltedScheme, Sum: append(salt, sumOf(salt, token)...)}
}

func (saltedSHA512) Match(d hashing.Digest, token string) hashing.Result {
	if d.Scheme != saltedScheme || len(d.Sum) != saltLen+sha512.Size {
		return hashing.Mismatch
	}
	salt, sum := d.Sum[:saltLen], d.Sum[saltLen:]
	if subtle.ConstantTimeCompare(sum, sumOf(salt, token)) != 1 {
		return hashing.Mismatch
	}
	return hashing.Match
}

func sumOf(salt []byte, token string) []byte {
	h := sha512.New()
	h.Write(salt)
	h.Write([]byte(token))
	return h.Sum(nil)
}

func ExampleHasher() {
	// Digests of the default hasher still match, so existing keys continue to work.
	h, err := hashing.Keyring(saltedSHA512{}, hashing.SHA256())
	if err != nil {
		panic(err)
	}

	one, two := h.Digest("the token"), h.Digest("the token")
	fmt.Println(one.Scheme, bytes.Equal(one.Sum, two.Sum))
	fmt.Println(h.Match(one, "the token") == hashing.Match,
		h.Match(two, "the token") == hashing.Match)
	fmt.Println(h.Match(one, "another") == hashing.Mismatch)
	fmt.Println(h.Match(hashing.SHA256().Digest("the token"), "the token") == hashing.MatchOutdated)
	// Output:
	// salted-sha512 false
	// true true
	// true
	// true
}
