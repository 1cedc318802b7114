package keystore

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A Secret is the text of a key, as its bearer presents it. It is in the hands of whoever called Create, once, and
// nowhere else: the store keeps a digest.
//
// Whatever prints, logs or encodes a Secret gets its public part, such as oil_01k9x3v7q2f8hr6m5w0c4tzbnd_…; only
// Reveal gives the text. The zero Secret is empty.
type Secret struct {
	hint string // the public part
	// A pointer, because fmt prints the fields of a struct that it reached through an unexported field without asking
	// for methods, and stops at a pointer; and so that a Secret equals its copies.
	hidden *hidden
}

// A hidden holds the text of a key where no reflection finds the text. The assertions of test
// libraries print what they compare in full: they follow pointers and read unexported fields. They
// print a function as its address.
type hidden struct {
	reveal func() string
}

func newSecret(text string) Secret {
	return Secret{token.Hint(text), &hidden{func() string { return text }}}
}

// Reveal returns the text of the key. Show it to its owner, once, and let go of it.
func (s Secret) Reveal() string {
	if s.hidden == nil {
		return ""
	}
	return s.hidden.reveal()
}

// String returns the public part.
func (s Secret) String() string { return s.hint }

// GoString returns the public part.
func (s Secret) GoString() string { return "keystore.Secret(" + s.String() + ")" }

// Format writes the public part, whatever the verb.
func (s Secret) Format(f fmt.State, verb rune) {
	text := s.String()
	if verb == 'v' && f.Flag('#') {
		text = s.GoString()
	}
	_, _ = io.WriteString(f, text)
}

// MarshalText returns the public part. JSON, XML and YAML encoders use it.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// LogValue returns the public part.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }
