package admission

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Header is a header that may hold a credential.
type Header struct {
	Name    string   // lower case
	Schemes []string // accepted before the key; "" accepts a key without a scheme
}

// Why a call is refused before its credential reaches the Verifier. ErrNoRule and ErrTwice are
// mistakes of the server.
var (
	ErrMissing     = errors.New("no credential")
	ErrSeveral     = errors.New("several credentials")
	ErrNoScheme    = errors.New("the credential has no scheme")
	ErrWrongScheme = errors.New("the scheme of the credential is not accepted")
	ErrInsecure    = errors.New("the connection is not secure")
	ErrNoRule      = errors.New("the method has no rule")
	ErrPath        = errors.New("the path can be read in two ways")
	// The first Authenticator removes the credential, so the second one would report a missing
	// credential.
	ErrTwice = errors.New("two Authenticators on one call")
)

// Headers are the headers that may hold a credential.
type Headers []Header

// Add accepts keys in the header name, after the scheme. An empty scheme accepts the key alone.
func (h *Headers) Add(name, scheme string) error {
	lower := strings.ToLower(name)
	if err := checkHeader(lower); err != nil {
		return fmt.Errorf("Header %q: %w", name, err)
	}
	if !isToken(scheme) {
		return fmt.Errorf("Header %q: the scheme %q is not an RFC 9110 token", name, scheme)
	}
	i := slices.IndexFunc(*h, func(h Header) bool { return h.Name == lower })
	if i < 0 {
		i = len(*h)
		*h = append(*h, Header{Name: lower})
	}
	schemes := &(*h)[i].Schemes
	isScheme := func(s string) bool { return strings.EqualFold(s, scheme) }
	if slices.ContainsFunc(*schemes, isScheme) {
		return fmt.Errorf("Header %q with the scheme %q is given twice", name, scheme)
	}
	*schemes = append(*schemes, scheme)
	return nil
}

// SetDefault accepts keys in the header authorization after the scheme Bearer, if no header was
// added. It returns an error if the header of the proxies may hold a credential.
func (h *Headers) SetDefault(proxies *Proxies) error {
	if len(*h) == 0 {
		*h = Headers{{Name: "authorization", Schemes: []string{"Bearer"}}}
	}
	if proxies.header != "" && h.Has(proxies.header) {
		return fmt.Errorf("the header %q cannot hold both the key and the caller's address",
			proxies.header)
	}
	return nil
}

// Has reports whether the header may hold a credential. Upper and lower case do not matter.
func (h Headers) Has(name string) bool {
	return slices.ContainsFunc(h, func(h Header) bool { return strings.EqualFold(h.Name, name) })
}

// Credential returns the credential of a call. It does not check the form of the key. The function
// values returns the values of a header, by its name in lower case.
func (h Headers) Credential(values func(lower string) []string) (string, error) {
	found, credential := false, ""
	var err error
	for i := range h {
		for _, value := range values(h[i].Name) {
			if found {
				return "", ErrSeveral
			}
			found = true
			credential, err = h[i].credential(value)
		}
	}
	if !found {
		return "", ErrMissing
	}
	return credential, err
}

// credential returns the key in a value of the header, without the scheme.
func (h *Header) credential(value string) (string, error) {
	// In HTTP, white space around a value does not belong to the value (RFC 9110, section 5.5). Not
	// every HTTP/2 library removes the white space.
	value = strings.Trim(value, " \t")
	if value == "" {
		return "", ErrMissing
	}
	for _, scheme := range h.Schemes {
		if scheme == "" {
			if !strings.ContainsAny(value, " \t") {
				return value, nil
			}
			continue
		}
		if len(value) < len(scheme) || !strings.EqualFold(value[:len(scheme)], scheme) {
			continue
		}
		rest := value[len(scheme):]
		if rest == "" {
			return "", ErrMissing
		}
		if rest[0] == ' ' {
			return strings.TrimLeft(rest, " "), nil
		}
	}
	if strings.ContainsAny(value, " \t") {
		return "", ErrWrongScheme
	}
	return "", ErrNoScheme
}

// checkHeader returns an error if clients or proxies cannot set a metadata header with the
// lower-case name.
func checkHeader(lower string) error {
	switch {
	case lower == "" || strings.Trim(lower, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "":
		return errors.New("a header name consists of letters, digits, '-', '_' and '.'")
	case strings.HasSuffix(lower, "-bin"):
		return errors.New("gRPC encodes headers whose name ends in -bin: choose another name")
	case strings.HasPrefix(lower, "grpc-"):
		return errors.New("gRPC reserves names that begin with grpc-: choose another name")
	case slices.Contains([]string{"connection", "content-type", "host", "te", "user-agent"}, lower):
		return errors.New("gRPC or HTTP/2 uses this header: choose another name")
	}
	return nil
}

// isToken reports whether s is empty or a token (RFC 9110, section 5.6.2).
func isToken(s string) bool {
	for _, c := range []byte(s) {
		alnum := '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
		if !alnum && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return true
}
