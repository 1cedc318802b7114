package admin_test

import (
	"context"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// A server with every kind of logging: of the store, of the service, of refusals, of gRPC at its
// highest level, of messages and of contexts. No secret is in the log, whatever the callers do.
func TestNoSecretInTheLog(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	store := keystoretest.Open(t, dir, nil)
	var secrets []string
	for _, scopes := range [][]string{{"keys:admin"}, {"keys:read"}, {"keys:write"}, nil} {
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: scopes})
		secrets = append(secrets, issued.Secret.Reveal())
	}
	require.NoError(t, store.Close())
	child := startServer(t, dir, socketDir(t),
		"GRPC_GO_LOG_SEVERITY_LEVEL=info", "GRPC_GO_LOG_VERBOSITY_LEVEL=99")
	all := []clients{dial(t, "unix:"+child.socket, localCreds)}
	over := &rig{tls: child.addr, roots: child.roots}
	for _, secret := range secrets {
		all = append(all, over.with(t, secret))
	}
	ctx := t.Context()
	for i, c := range all {
		name := "keys/" + noID
		id := uuid.NewString()
		for range 2 {
			made, err := c.CreateKey(ctx, &adminpb.CreateKeyRequest{
				Key: &adminpb.Key{DisplayName: "a"}, RequestId: id})
			if err == nil {
				secrets = append(secrets, made.Secret)
				name = made.Key.Name
			}
			rotated, err := c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name, RequestId: id})
			if err == nil {
				secrets = append(secrets, rotated.Secret)
			}
		}
		for _, secret := range secrets {
			_, _ = c.LookupKey(ctx, &adminpb.LookupKeyRequest{Token: secret})
			if i > 0 {
				continue // the log of messages has what a caller writes into other fields
			}
			_, _ = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: secret})
			_, _ = c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: "keys/" + secret})
			_, _ = c.CreateKey(ctx, &adminpb.CreateKeyRequest{RequestId: secret})
			_, _ = c.ListKeys(ctx, &adminpb.ListKeysRequest{PageToken: secret})
		}
		_, _ = c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name, Reason: "done"})
		_, _ = c.GetStats(ctx, &adminpb.GetStatsRequest{})
		for _, m := range allMethods() {
			_ = m.call(t, c.conn)
		}
	}
	bad := dial(t, "unix:"+child.socket, localCreds, grpc.WithUserAgent("bad"))
	_, _ = bad.GetKey(ctx, &adminpb.GetKeyRequest{})
	child.stop(t)
	log := child.stderr.String()
	for _, text := range []string{"API key changed", "admin call refused", "payload", "call refused",
		"transport"} {
		require.Contains(t, log, text, "this kind of logging is on")
	}
	require.Greater(t, len(secrets), 12)
	for i, secret := range secrets {
		require.False(t, strings.Contains(log, secret), "secret %d is in the log", i)
	}
}

// levels sends the level of each line that a logger gets.
type levels struct {
	slog.Handler
	to chan slog.Level
}

func (l levels) Handle(_ context.Context, r slog.Record) error {
	l.to <- r.Level
	return nil
}

// The end of a watch is no refusal that an operator should look at.
func TestLevelOfACallThatTheClientEnds(t *testing.T) {
	lines := levels{slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug}),
		make(chan slog.Level, 8)}
	r := newRig(t, keystoretest.New(t, nil), admin.Logger(slog.New(lines)))
	c := r.local(t)
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.WatchEvents(ctx, &adminpb.WatchEventsRequest{})
	require.NoError(t, err)
	_, err = stream.Recv() // the watch has begun
	require.NoError(t, err)
	cancel()
	require.Equal(t, slog.LevelDebug, <-lines.to)
	_, err = c.GetKey(t.Context(), &adminpb.GetKeyRequest{Name: "keys/" + noID})
	require.Error(t, err)
	require.Equal(t, slog.LevelInfo, <-lines.to)
}

// A handler of the logger that panics changes no answer.
func TestLoggerThatPanics(t *testing.T) {
	server, err := admin.New(keystoretest.New(t, nil), admin.Logger(slog.New(panicking{})))
	require.NoError(t, err)
	defer server.Close()
	var keys adminpb.KeyServiceServer
	server.RegisterKeys(registrar(func(service any) { keys = service.(adminpb.KeyServiceServer) }))
	require.NotPanics(t, func() {
		_, err := keys.GetKey(t.Context(), new(adminpb.GetKeyRequest))
		require.Equal(t, codes.Unauthenticated, status.Code(err))
	})
}

// A panicking handler panics on each line.
type panicking struct{ slog.Handler }

func (panicking) Enabled(context.Context, slog.Level) bool { panic("the handler panics") }

// A registrar receives the service that a Server registers.
type registrar func(service any)

func (r registrar) RegisterService(_ *grpc.ServiceDesc, service any) { r(service) }
