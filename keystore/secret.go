package keystore

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A Secret is the text of a key, as the bearer presents the key. Only the caller of Create gets the
// Secret, once: the store keeps a digest.
//
// Code that prints, logs or encodes a Secret gets only the public part, for example
// oil_01k9x3v7q2f8hr6m5w0c4tzbnd_…, and only Reveal returns the text. The zero Secret is empty.
type Secret struct {
	hint string // the public part
	// A pointer, for two reasons. If fmt reaches a struct through an unexported field, fmt prints
	// the fields without calling any methods, but stops at a pointer. And with a pointer, a Secret
	// equals its copies.
	hidden *hidden
}

// A hidden holds the text of a key where no reflection finds the text. Test libraries print the
// operands of a failed assertion in full: the libraries follow pointers and read unexported fields.
// But the libraries print a function as an address.
type hidden struct {
	reveal func() string
}

// NewSecret returns the Secret for the text of a token, for Import.
func NewSecret(text string) Secret { return newSecret(text) }

func newSecret(text string) Secret {
	return Secret{token.Hint(text), &hidden{func() string { return text }}}
}

// Reveal returns the text of the key. Show the text to the owner of the key, once, and do not keep
// the text.
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

// Format writes the public part for every verb.
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
