package keystore

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// A name, an owner, a reason: people read these in lists, terminals and logs, and decide by what
// they see. A control character can command a terminal or begin a line of a log that nobody wrote;
// one that turns the direction of writing, or has no width, makes two texts look the same.
//
// What describes a key is refused with ErrInvalid if it holds such a character: Create and Update
// can be called again. What goes with a change, the reason and the actor, is stored with the
// character escaped, as Go writes it: a revocation must not fail for its reason. Texts that were
// stored earlier stay as they are, and keep no key from being read, changed or revoked.

// hides reports whether a character does not show, or changes how others show: controls, formats
// such as U+202E and U+200B, and the separators of lines and paragraphs.
func hides(r rune) bool {
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp)
}

// hidesInText is hides for a text of several lines.
func hidesInText(r rune) bool { return hides(r) && r != '\n' && r != '\r' && r != '\t' }

// checkHidden refuses a text with a character for which a function returns true.
func checkHidden(what, text string, hidden func(rune) bool) error {
	if i := strings.IndexFunc(text, hidden); i >= 0 {
		r, _ := utf8.DecodeRuneInString(text[i:])
		return invalid("%s holds the character %U, which is a line break or control character, "+
			"or does not show: leave the character out", what, r)
	}
	return nil
}

// escaped returns a text whose hidden characters are escaped, as in Go: \n, \u202e. A text of more
// than so many bytes, or one that is not UTF-8, is returned as it is, for a check to refuse. The
// result is cut to so many bytes, and ends in "…" then.
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
