package interceptor

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

type noVerifier struct{}

func (noVerifier) Verify(context.Context, string) (*keystore.Key, error) {
	return nil, errors.ErrUnsupported
}

func (noVerifier) Bind(context.Context, string) (*keystore.Session, error) {
	return nil, errors.ErrUnsupported
}

// For all metadata, credential returns one credential or an error, and the handler sees no
// credential.
func FuzzCredential(f *testing.F) {
	f.Add("authorization", "Bearer k", "x-api-key", "k", "k")
	f.Add("Authorization", "bearer  k ", "authorization", "", "k")
	f.Add("X-Api-Key", " k", "user-agent", "x", "k")
	f.Add("authorization", "Bearer k", "grpcgateway-authorization", "Bearer k", "")
	f.Add("authorization-bin", "\xff", "x-api-key", "Bearer k", "")
	a, err := New(noVerifier{}, Header("authorization", "Bearer"), Header("x-api-key", ""))
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, name1, value1, name2, value2, value3 string) {
		md := metadata.MD{}
		md.Append(name1, value1)
		md.Append(name2, value2, value3)
		ctx := metadata.NewIncomingContext(context.Background(), md)
		credential, err := a.credentials.credential(&callContext{Context: ctx, auth: a})
		sent := append(md.Get("authorization"), md.Get("x-api-key")...)
		switch {
		case err == nil:
			require.Len(t, sent, 1)
			require.NotEmpty(t, credential)
			require.True(t, strings.Contains(sent[0], credential))
			require.Equal(t, credential, strings.Trim(credential, " "))
		case len(sent) == 0:
			require.Equal(t, admission.ErrMissing, err)
		case len(sent) > 1:
			require.Equal(t, admission.ErrSeveral, err)
		default:
			require.Contains(t, []error{admission.ErrMissing, admission.ErrNoScheme, admission.ErrWrongScheme}, err)
		}
		if err != nil {
			require.Empty(t, credential)
		}
		seen, ok := metadata.FromIncomingContext(&callContext{Context: ctx, auth: a})
		require.True(t, ok)
		require.Empty(t, seen.Get("authorization"))
		require.Empty(t, seen.Get("x-api-key"))
		require.Empty(t, seen.Get("grpcgateway-authorization"))
		for name := range md {
			if bare := strings.TrimPrefix(name, "grpcgateway-"); bare != "authorization" &&
				bare != "x-api-key" {
				require.Equal(t, md[name], seen[name])
			}
		}
	})
}
