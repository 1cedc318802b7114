package interceptor_test

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

// A token of another system passes Tap and the interceptors. A stream under the token is cut when
// the imported key is revoked, and the log of later refusals names the key.
func TestTokensOfAnotherSystem(t *testing.T) {
	sanctum := importer.Sanctum()
	store, err := keystore.New(backendtest.NewMemory(),
		&keystore.Options{Legacy: sanctum.Formats()})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	const token = "67|foPpeJkEtftjB2uG565IkEwset7KeKCJ86NjwiaEfb9bfb39"
	const export = "id,name,token\n" +
		"67,ci,89bcd16e7d857201c82e35d1185f51ec3dd9909a4bd4ee94b42f712c3ebe069b\n"
	_, err = store.Import(t.Context(), sanctum.Read(strings.NewReader(export), nil), nil)
	require.NoError(t, err)
	id, ok := store.KeyID(token)
	require.True(t, ok)

	log := new(lines)
	svc := &service{duplex: func(s duplexStream) error {
		_ = s.SendHeader(nil)
		return handlers["blocked in Recv"](s)
	}, empty: func(ctx context.Context) error {
		key, _ := interceptor.FromContext(ctx)
		assert.Equal(t, id, key.ID)
		return nil
	}}
	auth := newAuth(t, store, interceptor.LogRefusals(slog.New(slog.NewTextHandler(log, nil))))
	conn := dial(t, serve(t, svc, withTap(auth)...))
	require.NoError(t, call(withKey(t.Context(), token), conn))
	for _, bad := range []string{token[3:len(token)-1] + "0", "67|x",
		"67|89bcd16e7d857201c82e35d1185f51ec3dd9909a4bd4ee94b42f712c3ebe069b"} {
		requireRefused(t, call(withKey(t.Context(), bad), conn), codes.Unauthenticated,
			"API_KEY_INVALID")
	}
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	_, err = stream.Header()
	require.NoError(t, err)
	require.NoError(t, store.Revoke(t.Context(), id, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	requireRefused(t, call(withKey(t.Context(), token), conn), codes.Unauthenticated,
		"API_KEY_INVALID")
	require.Contains(t, log.String(), id)
	require.NotContains(t, log.String(), token[3:])
}

// lines is a log that several goroutines write.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
