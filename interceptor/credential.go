package interceptor

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/metadata"
)

// A header is where a credential may stand: a lower-case name, and the schemes that are accepted there; "" is none.
type header struct {
	name    string
	schemes []string
}

var (
	errMissing     = errors.New("no credential")
	errSeveral     = errors.New("several credentials")
	errNoScheme    = errors.New("a credential without a scheme")
	errWrongScheme = errors.New("a credential with a scheme that is not accepted")
	errInsecure    = errors.New("an insecure connection")
)

// credential returns the one credential of a call. It does not look at what it is made of.
func (a *Authenticator) credential(ctx context.Context) (string, error) {
	if a.requireTLS && !secure(ctx) {
		return "", errInsecure
	}
	found, credential := false, ""
	var err error
	for i := range a.headers {
		h := &a.headers[i]
		for _, value := range metadata.ValueFromIncomingContext(ctx, h.name) {
			if found {
				return "", errSeveral
			}
			found = true
			credential, err = h.credential(value)
		}
	}
	if !found {
		return "", errMissing
	}
	return credential, err
}

// credential takes the scheme off a header's value.
func (h *header) credential(value string) (string, error) {
	// HTTP takes white space off both ends (RFC 9110, section 5.5); HTTP/2 libraries do not all do it.
	value = strings.Trim(value, " \t")
	if value == "" {
		return "", errMissing
	}
	for _, scheme := range h.schemes {
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
			return "", errMissing
		}
		if rest[0] == ' ' {
			return strings.TrimLeft(rest, " "), nil
		}
	}
	if strings.ContainsAny(value, " \t") {
		return "", errWrongScheme
	}
	return "", errNoScheme
}
