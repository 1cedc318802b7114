package interceptor

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc/metadata"
)

// A header is a metadata header that may hold a credential.
type header struct {
	name    string   // lower case
	schemes []string // accepted before the key; "" accepts a key without a scheme
}

var (
	errMissing     = errors.New("no credential")
	errSeveral     = errors.New("several credentials")
	errNoScheme    = errors.New("the credential has no scheme")
	errWrongScheme = errors.New("the scheme of the credential is not accepted")
	errInsecure    = errors.New("the connection is not secure")
)

// A credentialReader finds the credential of a call.
type credentialReader struct {
	headers    []header
	requireTLS bool
}

// credential returns the credential of a call. It does not check the form of the key.
func (c *credentialReader) credential(call *callContext) (string, error) {
	if c.requireTLS && !secure(call.Context) {
		return "", errInsecure
	}
	found, credential := false, ""
	var err error
	md := call.incoming()
	for i := range c.headers {
		h := &c.headers[i]
		for _, value := range valuesOf(md, h.name) {
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

// valuesOf returns the values of a name in md, not a copy. Otherwise valuesOf is
// metadata.ValueFromIncomingContext: the case of names in md does not matter.
func valuesOf(md metadata.MD, lower string) []string {
	if values, ok := md[lower]; ok {
		return values
	}
	for name, values := range md {
		if strings.EqualFold(name, lower) {
			return values
		}
	}
	return nil
}

// present reports whether the call has an accepted header, even an empty one.
func (c *credentialReader) present(ctx context.Context) bool {
	for i := range c.headers {
		if len(metadata.ValueFromIncomingContext(ctx, c.headers[i].name)) > 0 {
			return true
		}
	}
	return false
}

// strip returns a copy of md without the headers that may hold a credential. The copy shares the
// values with md. A transport other than that of gRPC may leave upper-case letters in names, which
// metadata.FromIncomingContext lowers, so strip ignores case. grpc-gateway sends the header
// authorization twice: under its name and, like every permanent HTTP header, with a prefix.
func (c *credentialReader) strip(md metadata.MD) metadata.MD {
	const gateway = "grpcgateway-"
	md = maps.Clone(md)
	maps.DeleteFunc(md, func(name string, _ []string) bool {
		if len(name) > len(gateway) && strings.EqualFold(name[:len(gateway)], gateway) {
			name = name[len(gateway):]
		}
		isName := func(h header) bool { return strings.EqualFold(h.name, name) }
		return slices.ContainsFunc(c.headers, isName)
	})
	return md
}

// credential returns the key in a value of the header, without the scheme.
func (h *header) credential(value string) (string, error) {
	// In HTTP, white space around a value does not belong to the value (RFC 9110, section 5.5). Not
	// every HTTP/2 library removes the white space.
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
