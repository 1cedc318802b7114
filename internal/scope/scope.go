// Package scope says what the text of a scope may be, for keys that have scopes and for rules that
// require scopes.
package scope

import (
	"errors"
	"fmt"
	"strings"
)

// MaxLength is the longest that a scope may be, in bytes.
const MaxLength = 128

// Check returns nil, or an error that says what is wrong with the text of a scope. The error
// continues a sentence whose subject is the scope: "is empty". The error does not hold the text.
func Check(text string) error {
	if text == "" {
		return errors.New("is empty")
	}
	if len(text) > MaxLength {
		return fmt.Errorf("has %d bytes: at most %d are allowed", len(text), MaxLength)
	}
	for _, c := range []byte(text) {
		if c <= ' ' || c >= 0x7f {
			return fmt.Errorf("holds the character %q: use printable ASCII without space", rune(c))
		}
	}
	stem, _ := strings.CutSuffix(text, "*")
	if strings.Contains(stem, "*") || (stem != text && stem != "" && !strings.ContainsRune(":./", rune(stem[len(stem)-1]))) {
		return errors.New("has a '*' that is not the last character, alone or behind ':', '.' or '/'")
	}
	return nil
}
