package interceptor

import (
	"context"
	"maps"
	"strings"

	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

// A credentialReader finds the credential of a call.
type credentialReader struct {
	headers    admission.Headers
	requireTLS bool
}

// credential returns the credential of a call. It does not check the form of the key.
func (c *credentialReader) credential(call *callContext) (string, error) {
	if c.requireTLS && !secure(call.Context) {
		return "", admission.ErrInsecure
	}
	md := call.incoming()
	return c.headers.Credential(func(lower string) []string { return valuesOf(md, lower) })
}

// valuesOf returns the values of a name in md, as metadata.ValueFromIncomingContext does: the case
// of names in md does not matter. But the values are not a copy.
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
		if len(metadata.ValueFromIncomingContext(ctx, c.headers[i].Name)) > 0 {
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
		return c.headers.Has(name)
	})
	return md
}
