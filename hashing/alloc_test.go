//go:build !race

// Under the race detector, a sync.Pool drops values at random.

package hashing_test

import (
	"crypto/sha256"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

func TestMatchDoesNotAllocate(t *testing.T) {
	current, old := peppered(t, "a", make([]byte, 32)), peppered(t, "b", make([]byte, 32))
	ring := keyring(t, current, old, hashing.SHA256())
	for _, text := range []string{token, strings.Repeat("x", 128)} {
		for _, h := range []hashing.Hasher{hashing.SHA256(), current, old} {
			d := h.Digest(text)
			require.Zero(t, testing.AllocsPerRun(1000, func() { h.Match(d, text) }), d.Scheme)
			require.Zero(t, testing.AllocsPerRun(1000, func() { ring.Match(d, text) }), d.Scheme)
		}
	}
}

func BenchmarkMatch(b *testing.B) {
	current := peppered(b, "a", make([]byte, 32))
	b.Run("bare sha256.Sum256", func(b *testing.B) {
		text := []byte(token)
		for b.Loop() {
			sha256.Sum256(text)
		}
	})
	for _, bb := range []struct {
		name    string
		h, made hashing.Hasher
	}{
		{"SHA256", hashing.SHA256(), hashing.SHA256()},
		{"HMACSHA256", current, current},
		{"Keyring, outdated", keyring(b, current, hashing.SHA256()), hashing.SHA256()},
	} {
		b.Run(bb.name, func(b *testing.B) {
			d := bb.made.Digest(token)
			b.ReportAllocs()
			for b.Loop() {
				bb.h.Match(d, token)
			}
		})
	}
}
