package interceptor

import (
	"context"
	"errors"
	"maps"
	"slices"
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

// A credentialReader finds the credential of a call.
type credentialReader struct {
	headers    []header
	requireTLS bool
}

// credential returns the one credential of a call. It does not look at what it is made of.
func (c *credentialReader) credential(ctx context.Context) (string, error) {
	if c.requireTLS && !secure(ctx) {
		return "", errInsecure
	}
	found, credential := false, ""
	var err error
	for i := range c.headers {
		h := &c.headers[i]
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

// present reports whether an accepted header is there, also an empty one.
func (c *credentialReader) present(ctx context.Context) bool {
	for i := range c.headers {
		if len(metadata.ValueFromIncomingContext(ctx, c.headers[i].name)) > 0 {
			return true
		}
	}
	return false
}

// strip returns md without the headers that may hold a credential. The values are shared, as those of the original
// are. A transport other than gRPC's own may have left names in upper case, which metadata.FromIncomingContext
// lowers. grpc-gateway sends authorization as it is and, like any header of HTTP's own, a second time behind its prefix.
func (c *credentialReader) strip(md metadata.MD) metadata.MD {
	const gateway = "grpcgateway-"
	md = maps.Clone(md)
	maps.DeleteFunc(md, func(name string, _ []string) bool {
		if len(name) > len(gateway) && strings.EqualFold(name[:len(gateway)], gateway) {
			name = name[len(gateway):]
		}
		return slices.ContainsFunc(c.headers, func(h header) bool { return strings.EqualFold(h.name, name) })
	})
	return md
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
