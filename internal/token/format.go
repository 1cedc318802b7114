package token

import (
	"crypto/rand"
	"fmt"
	"math"
	"strings"

	"github.com/google/uuid"
)

// Charsets for secrets: those of passlib.pwd, by its names
// (https://passlib.readthedocs.io/en/stable/lib/passlib.pwd.html).
const (
	ASCII62 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" // digits and letters
	ASCII50 = "234679abcdefghjkmnpqrstuvwxyzACDEFGHJKMNPQRTUVWXYZ"             // without those that look alike
	Hex     = "0123456789abcdef"
)

const (
	minCharset = 10
	// minBits is the entropy from which on a fast hash without a salt will do for the stored digest (OWASP ASVS 5.0,
	// 6.5.2; NIST SP 800-63B, look-up secrets).
	minBits = 112
)

// A Format makes tokens. It is immutable, and safe for concurrent use.
type Format struct {
	prefix  string
	length  int
	charset string
	size    int // of a token
}

// NewFormat returns the format of tokens with the prefix and a secret of length characters of the charset. There are
// no defaults.
//
// The prefix is 1 to 32 ASCII letters, digits and inner underscores. The charset is 10 or more printable ASCII
// characters, each once, without '_' and space. The length is 22 or more, gives the secret 112 bits or more, and
// leaves room in [MaxLength] for the rest. Otherwise the error says what is wrong, and what to use instead.
func NewFormat(prefix string, length int, charset string) (*Format, error) {
	if !validPrefix(prefix) {
		// It is not quoted. What is no prefix may be a token that was put in its place.
		return nil, fmt.Errorf("the prefix, of %d bytes, cannot begin a token: "+
			"use 1 to %d ASCII letters, digits and inner underscores, such as my_api", len(prefix), maxPrefix)
	}
	if err := checkCharset(charset); err != nil {
		return nil, err
	}
	size := len(prefix) + len("_") + idLen + len("_") + length + checksumLen
	f := &Format{prefix, length, charset, size}

	perChar := math.Log2(float64(len(charset)))
	enough := max(minSecret, int(math.Ceil(minBits/perChar)))
	if bits := float64(length) * perChar; length > 0 && bits < minBits {
		return nil, fmt.Errorf("a secret of %d characters from a set of %d has %d × log2(%d) = %.1f bits; "+
			"at least %d are needed: use %d characters or more",
			length, len(charset), length, len(charset), bits, minBits, enough)
	}
	if length < minSecret {
		return nil, fmt.Errorf("a secret of %d characters is too short: use %d or more", length, enough)
	}
	if most := length - (f.size - MaxLength); length > most {
		return nil, fmt.Errorf("a secret of %d characters makes a token of more than %d bytes: use %d or fewer",
			length, MaxLength, most)
	}
	return f, nil
}

func checkCharset(charset string) error {
	for i, c := range charset {
		if c > '~' || classes[c]&secret == 0 {
			return fmt.Errorf("the charset has %q: use printable ASCII characters other than '_' and space", c)
		}
		if strings.ContainsRune(charset[:i], c) {
			return fmt.Errorf("the charset has %q twice: use each character once, or some would be likelier", c)
		}
	}
	if len(charset) < minCharset {
		return fmt.Errorf("the charset has %d characters: use %d or more", len(charset), minCharset)
	}
	return nil
}

// Prefix returns the prefix of the tokens.
func (f *Format) Prefix() string { return f.prefix }

// Locate returns the ID that s has where a token of the format has it, as two words, the first the more significant, and
// true, if s is as long as a token and there is an ID. It looks at nothing else: whether s is a token is for [Parse] to
// say, or for a digest that matches.
func (f *Format) Locate(s string) (hi, lo uint64, ok bool) {
	begin := len(f.prefix) + len("_")
	if len(s) != f.size || begin+idLen > len(s) { // the latter never
		return 0, 0, false
	}
	return parseWords(s[begin : begin+idLen])
}

// New returns a new ID and a token of it. The ID sorts after all that this process made before, even when the clock
// is set back.
func (f *Format) New() (ID, string) {
	// Not NewV7: its source is that of uuid.SetRand, for all of the program to change. Must never panics, because the
	// reader that is given here does not fail: the process ends first.
	id := ID(uuid.Must(uuid.NewV7FromReader(rand.Reader)))
	return id, f.Renew(id)
}

// Renew returns another token of the ID, with a secret of its own: for a key that is rotated.
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

// random fills b. Since Go 1.24, crypto/rand ends the process rather than return an error.
func random(b []byte) { _, _ = rand.Read(b) }

// writeSecret writes n characters of the charset, which has at most 256, each as likely as the others.
//
// The remainder of a byte alone would favour the charset's first characters (of 62, the first eight by a quarter), so
// the bytes of the last, incomplete round are rejected. fill is random, except in tests.
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
