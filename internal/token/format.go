package token

import (
	"crypto/rand"
	"fmt"
	"math"
	"strings"

	"github.com/google/uuid"
)

// Charsets for secrets. The charsets and their names are from passlib.pwd
// (https://passlib.readthedocs.io/en/stable/lib/passlib.pwd.html).
const (
	// ASCII62 is all digits and letters.
	ASCII62 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	// ASCII50 is ASCII62 without the characters that look alike.
	ASCII50 = "234679abcdefghjkmnpqrstuvwxyzACDEFGHJKMNPQRTUVWXYZ"
	Hex     = "0123456789abcdef"
)

const (
	minCharset = 10
	// minBits is the least entropy of a secret, in bits. With this entropy, a fast hash without a
	// salt is good enough for the stored digest (OWASP ASVS 5.0, 6.5.2; NIST SP 800-63B, look-up
	// secrets).
	minBits = 112
)

// A Format makes tokens. A Format is immutable and safe for concurrent use.
type Format struct {
	prefix  string
	length  int
	charset string
	size    int // the length of a token, in bytes
}

// NewFormat returns a Format for tokens with the given prefix and a secret of length characters
// from the charset. There are no defaults.
//
// The prefix consists of 1 to 32 ASCII letters, digits and inner underscores. The charset consists
// of 10 or more different printable ASCII characters, without '_' and space. The length is at least
// 22 and gives the secret at least 112 bits. The whole token has at most [MaxLength] bytes. If a
// rule is broken, the error explains what is wrong and what to use instead.
func NewFormat(prefix string, length int, charset string) (*Format, error) {
	if !ValidPrefix(prefix) {
		// The error does not quote the prefix, because a user may have passed a token by mistake.
		return nil, fmt.Errorf("the prefix of %d bytes is invalid: "+
			"use 1 to %d ASCII letters, digits and inner underscores, such as my_api",
			len(prefix), maxPrefix)
	}
	if err := checkCharset(charset); err != nil {
		return nil, err
	}
	size := len(prefix) + len("_") + idLen + len("_") + length + checksumLen
	f := &Format{prefix, length, charset, size}

	perChar := math.Log2(float64(len(charset)))
	enough := max(minSecret, int(math.Ceil(minBits/perChar)))
	if bits := float64(length) * perChar; length > 0 && bits < minBits {
		return nil, fmt.Errorf("a secret of %d characters from a charset of %d has "+
			"%d × log2(%d) = %.1f bits, and needs at least %d: use %d characters or more",
			length, len(charset), length, len(charset), bits, minBits, enough)
	}
	if length < minSecret {
		return nil, fmt.Errorf("a secret of %d characters is too short: use %d characters or more",
			length, enough)
	}
	if most := length - (f.size - MaxLength); length > most {
		return nil, fmt.Errorf("a secret of %d characters makes the token longer than %d bytes: "+
			"use %d characters or fewer", length, MaxLength, most)
	}
	return f, nil
}

func checkCharset(charset string) error {
	for i, c := range charset {
		if c > '~' || classes[c]&secret == 0 {
			return fmt.Errorf("the charset contains %q: "+
				"use printable ASCII characters other than '_' and space", c)
		}
		if strings.ContainsRune(charset[:i], c) {
			return fmt.Errorf("the charset contains %q twice: "+
				"use each character once, so that all characters are equally likely", c)
		}
	}
	if len(charset) < minCharset {
		return fmt.Errorf("the charset has %d characters: use %d or more", len(charset), minCharset)
	}
	return nil
}

// Prefix returns the prefix of the tokens.
func (f *Format) Prefix() string { return f.prefix }

// Locate returns the ID in s as two words, the more significant word first, and true. Locate
// returns false if s is not as long as a token of the format, or if the position of the ID holds no
// ID. Locate checks nothing else about s: only [Parse], or a digest that matches, shows that s is a
// token.
func (f *Format) Locate(s string) (hi, lo uint64, ok bool) {
	begin := len(f.prefix) + len("_")
	if len(s) != f.size || begin+idLen > len(s) { // the second condition is never true
		return 0, 0, false
	}
	return parseWords(s[begin : begin+idLen])
}

// New returns a new ID and a token with this ID. The ID sorts after all earlier IDs of this
// process, even if the clock was set back.
func (f *Format) New() (ID, string) {
	// uuid.NewV7 is not safe here, because any code in the program can replace its source of random
	// bytes with uuid.SetRand. Must never panics, because rand.Reader never returns an error: the
	// process ends instead.
	id := ID(uuid.Must(uuid.NewV7FromReader(rand.Reader)))
	return id, f.Renew(id)
}

// Renew returns another token with the same ID and a new secret, to rotate a key.
func (f *Format) Renew(id ID) string {
	var b strings.Builder
	b.Grow(f.size)
	b.WriteString(f.prefix)
	b.WriteByte('_')
	b.WriteString(id.String())
	b.WriteByte('_')
	writeSecret(&b, f.length, f.charset, random)
	sum := checksum(b.String())
	b.Write(sum[:])
	return b.String()
}

// random fills b with random bytes. Since Go 1.24, crypto/rand ends the process instead of
// returning an error.
func random(b []byte) { _, _ = rand.Read(b) }

// writeSecret writes n characters from the charset, each character with the same probability. The
// charset has at most 256 characters. fill is random, except in tests.
//
// A byte modulo the length of the charset would favour the first characters: with 62 characters,
// the first eight would be a quarter more likely. So writeSecret rejects the highest bytes, which
// do not cover the whole charset.
func writeSecret(b *strings.Builder, n int, charset string, fill func([]byte)) {
	rounds := 256 / len(charset) * len(charset)
	for buf := make([]byte, n); n > 0; {
		buf = buf[:n]
		fill(buf)
		for _, c := range buf {
			if int(c) < rounds {
				b.WriteByte(charset[int(c)%len(charset)])
				n--
			}
		}
	}
}
