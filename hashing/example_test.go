package hashing_test

import (
	"bytes"
	"fmt"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

func ExampleSHA256() {
	h := hashing.SHA256()
	stored := h.Digest("the token")

	fmt.Println(stored.Scheme)
	fmt.Println(h.Match(stored, "the token") == hashing.Match)
	fmt.Println(h.Match(stored, "another") == hashing.Mismatch)
	// Output:
	// sha256
	// true
	// true
}

// Replace a pepper. Digests of the old pepper still match, and Match reports them as outdated.
func ExampleKeyring() {
	// In production, use 32 random bytes from a secret manager for each pepper.
	pepper2025 := bytes.Repeat([]byte{5}, 32)
	pepper2026 := bytes.Repeat([]byte{6}, 32)

	old, err := hashing.HMACSHA256("2025", pepper2025)
	if err != nil {
		panic(err)
	}
	current, err := hashing.HMACSHA256("2026", pepper2026)
	if err != nil {
		panic(err)
	}
	ring, err := hashing.Keyring(current, old)
	if err != nil {
		panic(err)
	}

	stored := old.Digest("the token")
	for range 2 {
		switch ring.Match(stored, "the token") {
		case hashing.Match:
			fmt.Println("match:", stored.Scheme)
		case hashing.MatchOutdated:
			fmt.Println("match, outdated:", stored.Scheme)
			stored = ring.Digest("the token")
		default:
			fmt.Println("refused")
		}
	}
	fmt.Println(ring.Match(stored, "another") == hashing.Mismatch)
	// Output:
	// match, outdated: hmac-sha256:2025
	// match: hmac-sha256:2026
	// true
}
