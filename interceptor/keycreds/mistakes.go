package keycreds

import (
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What people give in place of a key, or around one. None of these texts quotes what was given.
var (
	errHint = status.Error(codes.Unauthenticated,
		"keycreds: this is the hint of an API key, which is safe to show, and not the key "+
			"(it has an ellipsis): the key itself was shown once, when it was created")
	errQuotes = status.Error(codes.Unauthenticated,
		"keycreds: the API key has quotation marks around it: remove them "+
			"(docker --env-file and Kubernetes keep them)")
	errAssignment = status.Error(codes.Unauthenticated,
		"keycreds: the API key has a name and an equals sign before it, as in NAME=key: "+
			"give what comes after the sign")
	errPlaceholder = status.Error(codes.Unauthenticated,
		"keycreds: the API key is a placeholder, such as ${NAME}, which nothing has replaced: "+
			"is the variable expanded where it is set?")
	errTrailing = status.Error(codes.Unauthenticated,
		"keycreds: the API key ends in a comma or a semicolon: remove it")
)

// checkMistake returns an error if the text is not a key, but what often stands in place of a key. A key
// of package keystore is never taken for a mistake, whatever its charset: it begins with a letter
// or a digit, has an underscore before its secret and none inside, and ends in a letter or a digit.
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

// isAssignment looks for NAME=key. What has a lower-case name must have an underscore behind the
// sign too, because an equals sign may be a character of secrets. Padding of base64 is not an
// assignment.
func isAssignment(key string) bool {
	name, value, ok := strings.Cut(key, "=")
	name = strings.TrimSpace(strings.TrimPrefix(name, "export "))
	if !ok || !isName(name) || strings.Trim(value, "= \t") == "" {
		return false
	}
	return name == strings.ToUpper(name) || strings.Contains(value, "_")
}

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

// isName reports whether s is the name of an environment variable.
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
