package keystore

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// People read names, owners and reasons in lists, terminals and logs, and decide by the visible
// text. A control character can command a terminal, or begin a forged line of a log. A character
// that turns the direction of writing, or has no width, makes two texts look the same.
//
// If a text that describes a key holds such a character, Create and Update return ErrInvalid. The
// caller can correct the text and call again. The reason and the actor of a change are stored
// with the character escaped, in the escape syntax of Go. A revocation must not fail because of
// its reason. Texts that were stored earlier remain unchanged. The earlier texts do not prevent a
// key from being read, changed or revoked.

// hides reports whether a character does not show, or changes how other characters show:
// controls, formats such as U+202E and U+200B, and the separators of lines and paragraphs.
func hides(r rune) bool {
	if r < utf8.RuneSelf {
		return r < ' ' || r == 0x7f // most texts are ASCII, and the tables are slower
	}
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
}

// hidesInText is hides for a text of several lines.
func hidesInText(r rune) bool { return hides(r) && r != '\n' && r != '\r' && r != '\t' }

// checkHidden refuses a text with a character for which hidden returns true.
func checkHidden(what, text string, hidden func(rune) bool) error {
	if i := strings.IndexFunc(text, hidden); i >= 0 {
		r, _ := utf8.DecodeRuneInString(text[i:])
		return invalid("%s holds the character %U, which is a line break or control character, "+
			"or does not show: leave the character out", what, r)
	}
	return nil
}

// escaped returns the text with hidden characters escaped, as in Go: \n, \u202e. If the text is
// longer than the limit most, in bytes, or is not UTF-8, escaped returns the text unchanged, and
// a later check refuses the text. An escaped text is cut to the limit, and a cut text ends in
// "…".
func escaped(text string, most int) string {
	if len(text) > most || !utf8.ValidString(text) || strings.IndexFunc(text, hides) < 0 {
		return text
	}
	var b strings.Builder
	for i, r := range text {
		next, space := string(r), most
		if hides(r) {
			next = strings.Trim(strconv.QuoteRuneToASCII(r), "'")
		}
		if i+utf8.RuneLen(r) < len(text) {
			space -= len("…")
		}
		if b.Len()+len(next) > space {
			b.WriteString("…")
			break
		}
		b.WriteString(next)
	}
	return b.String()
}
