package importer

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"strings"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The lookup of a format without a public part is the SHA-256 of the secret, in hexadecimal. The
// digest that the other system stores is the same sum. The store hashes what a caller presents
// before it looks for the key, so a stolen digest finds nothing.
func lookupOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// sumFormat is a format without a public part. The whole token is the secret.
func sumFormat(name string, has func(token string) bool) keystore.LegacyFormat {
	return keystore.LegacyFormat{Name: name,
		Parse: func(token string) (lookup, secret string, ok bool) {
			if !has(token) {
				return "", "", false
			}
			return lookupOf(token), token, true
		}}
}

// sumDigest fills in the key for a SHA-256 in hexadecimal or base64, as all systems write one.
func (r *row) sumDigest(k *keystore.Imported, text string) {
	sum, ok := parseSum(text)
	if !ok {
		r.refuse(keystore.ImportDigest, "the digest is not a SHA-256 in hexadecimal or base64")
		return
	}
	k.Lookup = hex.EncodeToString(sum)
	k.Digest = hashing.Digest{Scheme: "sha256", Sum: sum}
}

func parseSum(text string) (sum []byte, ok bool) {
	var err error
	switch len(text) {
	case hex.EncodedLen(sha256.Size):
		sum, err = hex.DecodeString(text)
	case base64.StdEncoding.EncodedLen(sha256.Size):
		sum, err = base64.StdEncoding.Strict().DecodeString(text)
	case base64.RawURLEncoding.EncodedLen(sha256.Size):
		sum, err = base64.RawURLEncoding.Strict().DecodeString(text)
	}
	return sum, err == nil && len(sum) == sha256.Size
}

const (
	digits  = "0123456789"
	letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	alnum   = digits + letters
	hexes   = "0123456789abcdef"
)

// only reports whether a text has at least so many characters, all from a set.
func only(text, set string, least int) bool {
	return len(text) >= least && strings.Trim(text, set) == ""
}

// tail returns the parts of a text before and after the last underscore.
func tail(text string) (before, after string) {
	i := strings.LastIndexByte(text, '_')
	return text[:max(i, 0)], text[i+1:]
}
