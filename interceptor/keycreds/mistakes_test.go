package keycreds_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Each frequent mistake has its own error, which does not quote the text.
func TestMistakes(t *testing.T) {
	const (
		quotes, assignment, placeholder = "quotation marks", "equals sign", "placeholder"
		trailing, hint                  = "a comma or a semicolon", "the hint"
	)
	s := serveTLS(t)
	for token, sentence := range map[string]string{
		`"` + testKey + `"`:                quotes,
		"'" + testKey + "'\n":              quotes,
		"`" + testKey + "`":                quotes,
		"“" + testKey + "”":                quotes,
		`"` + testKey:                      quotes,
		testKey + "'":                      quotes,
		`"` + testKey + `",`:               quotes,
		"API_KEY=" + testKey:               assignment,
		"api_key=" + testKey:               assignment,
		"export API_KEY=" + testKey:        assignment,
		`API_KEY="` + testKey + `"`:        assignment,
		"API_KEY = " + testKey:             assignment,
		"KEY=abc":                          assignment,
		"API_KEY=" + testKey + "\nOTHER=1": assignment,
		"${API_KEY}":                       placeholder,
		"$API_KEY":                         placeholder,
		"$(API_KEY)":                       placeholder,
		"{{ .Values.apiKey }}":             placeholder,
		"<key>":                            placeholder,
		"%API_KEY%":                        placeholder,
		testKey + ",":                      trailing,
		testKey + ";\n":                    trailing,
		"oil_01k9x3v7q2f8hr6m5w0c4tzbnd_…": hint,
		"keystore.Secret(oil_01k9x3v7q2f8hr6m5w0c4t_…)": hint,
	} {
		t.Run(token, func(t *testing.T) {
			creds := keycreds.New(token)
			err := check(t, s.dial(t, grpc.WithPerRPCCredentials(creds)))
			require.Equal(t, codes.Unauthenticated, status.Code(err), err)
			require.ErrorContains(t, err, sentence)
			require.NotContains(t, err.Error(), "notAReal")
			require.NotContains(t, err.Error(), "01k9")
			require.Empty(t, s.calls())
		})
	}
}

// No key of a store looks like a mistake, for every charset of the secret. Neither do unusual keys
// of other programs.
func TestKeysAreNotMistakes(t *testing.T) {
	var all strings.Builder
	for c := byte('!'); c <= '~'; c++ {
		if c != '_' {
			all.WriteByte(c)
		}
	}
	keys := []string{"a=b", "c2VjcmV0a2V5cw==", "JBSWY3DPEB3W64TMMQ======", "{abc}", "$1", "$a-b",
		"100%", "a,b;c", "x<y>z", "='=x"}
	for _, prefix := range []string{"oil", "OIL", "OIL_LIVE", "a1"} {
		for charset, n := range map[string]int{all.String(): 3000, "=A'\"`$,;<>{}%": 300} {
			format, err := token.NewFormat(prefix, 64, charset)
			require.NoError(t, err)
			for range n {
				_, text := format.New()
				keys = append(keys, text)
			}
		}
	}
	for _, key := range keys {
		md, err := keycreds.New(key, keycreds.AllowInsecure()).GetRequestMetadata(t.Context())
		require.NoError(t, err)
		require.Equal(t, "Bearer "+key, md["authorization"])
	}
}

// A nilError is an error that panics when it is printed.
type nilError struct{ text string }

func (e *nilError) Error() string { return e.text }

func TestSourceThatPanics(t *testing.T) {
	s := serveTLS(t)
	cause := errors.New("the cause, with " + testKey)
	none := make([]error, 0)
	for name, tt := range map[string]struct {
		source func() error
		text   string
		is     error
	}{
		"with the key": {func() error {
			panic("no use for " + testKey)
		}, "panic with a value of type string", nil},
		"with an error": {func() error {
			panic(cause)
		}, "panic with a value of type *errors.errorString", cause},
		"with a runtime error":      {func() error { return none[0] }, "index out of range", nil},
		"with nil":                  {func() error { panic(nil) }, "panic called with nil", nil},
		"when its error is printed": {func() error { return (*nilError)(nil) }, "nil pointer", nil},
	} {
		t.Run(name, func(t *testing.T) {
			creds := keycreds.FromSource(func(context.Context) (string, error) {
				return testKey, tt.source()
			})
			for _, err := range []error{
				check(t, s.dial(t, grpc.WithPerRPCCredentials(creds))),
				check(t, s.dial(t), grpc.PerRPCCredentials(creds)),
				watch(t, s.dial(t, grpc.WithPerRPCCredentials(creds))),
			} {
				require.Equal(t, codes.Unavailable, status.Code(err), err)
				require.ErrorContains(t, err, "keycreds: the source of the API key failed: ")
				require.ErrorContains(t, err, tt.text)
				require.NotContains(t, err.Error(), testKey)
				if tt.is != nil {
					require.ErrorIs(t, err, tt.is)
				}
			}
			require.Empty(t, s.calls())
		})
	}
}

// When gRPC checks the health of a server, it gets the key on an internal goroutine, where panics
// are not recovered.
func TestSourceThatPanicsOnAGoroutineOfGRPC(t *testing.T) {
	s := serveTLS(t)
	asked := make(chan struct{}, 100)
	creds := keycreds.FromSource(func(context.Context) (string, error) {
		select {
		case asked <- struct{}{}:
		default:
		}
		panic("in the source")
	})
	const config = `{"loadBalancingConfig": [{"round_robin": {}}],
		"healthCheckConfig": {"serviceName": ""}}`
	conn, err := grpc.NewClient(s.target, append(s.dialOptions,
		grpc.WithPerRPCCredentials(creds), grpc.WithDefaultServiceConfig(config))...)
	require.NoError(t, err)
	defer conn.Close()
	conn.Connect()
	<-asked
	<-asked // gRPC tries again, so the process has survived the first panic
}
