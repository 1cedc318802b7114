// Package scope defines which texts are valid scopes, both for keys that have scopes and for rules
// that require scopes.
package scope

import (
	"errors"
	"fmt"
	"strings"
)

// MaxLength is the length of the longest valid scope, in bytes.
const MaxLength = 128

// Check returns nil if text is a valid scope, and otherwise an error that explains what is wrong.
// The error text continues a sentence with the scope as its subject, such as "is empty". The error
// text does not contain the scope.
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
	if strings.Contains(stem, "*") ||
		(stem != text && stem != "" && !strings.ContainsRune(":./", rune(stem[len(stem)-1]))) {
		return errors.New("has a '*' in an invalid place: '*' is allowed alone, " +
			"or as the last character after ':', '.' or '/'")
	}
	return nil
}
