package keycreds

import (
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Frequent mistakes: other text in place of a key, or around a key. These errors never quote the
// text.
var (
	errHint = status.Error(codes.Unauthenticated,
		"keycreds: this text is the hint of an API key (it contains an ellipsis), not the key: "+
			"the key was shown once, when it was created")
	errQuotes = status.Error(codes.Unauthenticated,
		"keycreds: the API key is enclosed in quotation marks: remove the quotation marks "+
			"(docker --env-file and Kubernetes do not remove them)")
	errAssignment = status.Error(codes.Unauthenticated,
		"keycreds: the API key follows a name and an equals sign, as in NAME=key: "+
			"give the text after the equals sign")
	errPlaceholder = status.Error(codes.Unauthenticated,
		"keycreds: the API key is a placeholder such as ${NAME}: "+
			"make sure that the variable is expanded")
	errTrailing = status.Error(codes.Unauthenticated,
		"keycreds: the API key ends in a comma or a semicolon: remove that character")
)

// checkMistake returns an error if the text is a frequent mistake and not a key. A key of package
// keystore never looks like a mistake, whatever its charset: the key begins with a
// letter or a digit, has an underscore before the secret and none inside the secret, and ends in a
// letter or a digit.
func checkMistake(key string) error {
	switch {
	case strings.Contains(key, "…"):
		return errHint
	case isAssignment(key):
		return errAssignment
	case strings.Trim(key, "\"'`“”„‘’«»") != key:
		return errQuotes
	case isPlaceholder(key):
		return errPlaceholder
	case strings.HasSuffix(key, ",") || strings.HasSuffix(key, ";"):
		return errTrailing
	}
	return nil
}

// isAssignment reports whether the text looks like NAME=key. If the name has lower-case letters,
// the value must contain an underscore too, because secrets may contain equals signs. The padding
// of base64 is not an assignment.
func isAssignment(key string) bool {
	name, value, ok := strings.Cut(key, "=")
	name = strings.TrimSpace(strings.TrimPrefix(name, "export "))
	if !ok || !isName(name) || strings.Trim(value, "= \t") == "" {
		return false
	}
	return name == strings.ToUpper(name) || strings.Contains(value, "_")
}

// isPlaceholder reports whether the text looks like a variable or a template: ${NAME}, $(NAME),
// {{NAME}}, <NAME>, $NAME or %NAME%.
func isPlaceholder(key string) bool {
	for _, p := range [][2]string{{"${", "}"}, {"$(", ")"}, {"{{", "}}"}, {"<", ">"}} {
		if strings.HasPrefix(key, p[0]) && strings.HasSuffix(key, p[1]) {
			return true
		}
	}
	if name, ok := strings.CutPrefix(key, "$"); ok && isName(name) {
		return true
	}
	inner, ok := strings.CutPrefix(key, "%")
	name, closed := strings.CutSuffix(inner, "%")
	return ok && closed && isName(name)
}

// isName reports whether s can be the name of an environment variable.
func isName(s string) bool {
	if s == "" || '0' <= s[0] && s[0] <= '9' {
		return false
	}
	for _, c := range []byte(s) {
		if c != '_' && !('0' <= c && c <= '9') && !('a' <= c|0x20 && c|0x20 <= 'z') {
			return false
		}
	}
	return true
}
