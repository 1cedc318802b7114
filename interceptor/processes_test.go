package interceptor_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// openShared returns the store of one of several processes. With a long freshness, a slow machine
// closes no gate.
func openShared(t *testing.T, b backend.Feeder, freshness time.Duration) *keystore.Store {
	t.Helper()
	s, err := keystore.New(b, &keystore.Options{Freshness: freshness, Timeout: 2 * time.Minute})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// Two servers have a store each, on one engine. A Revoke in one process ends the streams in the
// other process before the Revoke returns: the next message fails, and the client gets the reason.
func TestRevokeEndsStreamsOfAnotherProcess(t *testing.T) {
	shared := backendtest.NewShared()
	a, b := openShared(t, shared.Open(), time.Minute), openShared(t, shared.Open(), time.Minute)
	revoked, returned := make(chan struct{}), make(chan error, 2)
	all := map[string]func(s duplexStream) error{
		"that receives after the Revoke": func(s duplexStream) error {
			<-revoked
			m, err := s.Recv() // the client has sent the message before the Revoke
			assert.Error(t, err, "%v", m)
			return err
		},
		"that sends after the Revoke": func(s duplexStream) error {
			<-revoked
			err := s.Send(payload(1))
			assert.Error(t, err)
			return err
		},
		"that looks at its context after the Revoke": func(s duplexStream) error {
			<-revoked
			assert.Error(t, s.Context().Err())
			return s.Context().Err()
		},
	}
	for name, handler := range handlers {
		all[name] = handler
	}
	for name, handler := range all {
		t.Run("a handler "+name, func(t *testing.T) {
			revoked = make(chan struct{})
			key, token := issue(t, a, keystore.Spec{})
			started := make(chan struct{})
			svc := &service{duplex: func(s duplexStream) error {
				assert.NoError(t, s.SendHeader(nil))
				close(started)
				err := handler(s)
				returned <- err
				return err
			}}
			conn := dial(t, serve(t, svc, newAuth(t, b).ServerOptions()...))
			stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
				withKey(t.Context(), token))
			require.NoError(t, err)
			<-started
			if name == "that receives after the Revoke" {
				require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
			}
			require.NoError(t, a.Revoke(t.Context(), key.ID, ""))
			close(revoked)
			<-returned
			for err = nil; err == nil; { // messages that were sent before
				_, err = stream.Recv()
			}
			requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
			for _, err := range both(withKey(t.Context(), token), conn) {
				requireRefused(t, err, codes.Unauthenticated, "API_KEY_INVALID")
			}
		})
	}
}

// requireUnavailable checks that an error asks the client to try again, and does not blame the key.
func requireUnavailable(t *testing.T, err error) {
	t.Helper()
	requireRefused(t, err, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE")
	for _, d := range status.Convert(err).Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok {
			require.Positive(t, retry.RetryDelay.AsDuration())
			return
		}
	}
	require.Fail(t, "the status has no RetryInfo", "%v", err)
}

// A process that has lost contact with the others refuses every key as Unavailable, also a key that
// was revoked meanwhile, and ends its streams the same way. Afterwards the process serves again
// without help.
func TestProcessThatLostContactIsUnavailable(t *testing.T) {
	const freshness = time.Second
	shared := backendtest.NewShared()
	link := badlink.Open(shared)
	a, b := openShared(t, shared.Open(), freshness), openShared(t, link, freshness)
	_, good := issue(t, a, keystore.Spec{})
	key, doomed := issue(t, a, keystore.Spec{})
	svc := &service{duplex: func(s duplexStream) error {
		for {
			if _, err := s.Recv(); err != nil {
				return nil
			}
			if err := s.Send(payload(1)); err != nil {
				return err
			}
		}
	}}
	conn := dial(t, serve(t, svc, newAuth(t, b).ServerOptions()...))
	client := testpb.NewTestServiceClient(conn)

	// awaitCalls calls until a unary call returns the wanted code. Until then, and afterwards, a
	// call succeeds or is Unavailable.
	awaitCalls := func(token string, want codes.Code) {
		for {
			_, err := client.EmptyCall(withKey(t.Context(), token), &testpb.Empty{})
			if status.Code(err) == want {
				return
			}
			if err != nil {
				requireUnavailable(t, err)
			}
			time.Sleep(time.Millisecond)
		}
	}
	awaitCalls(good, codes.OK)
	stream, err := client.FullDuplexCall(withKey(t.Context(), good))
	require.NoError(t, err)
	_ = stream.Send(&testpb.StreamingOutputCallRequest{}) // Recv has the error
	_, err = stream.Recv()
	if err != nil { // the machine was too slow for a heartbeat
		requireUnavailable(t, err)
	}

	link.Set(badlink.Faults{Silent: true})
	_, err = stream.Recv() // blocks until the gate closes
	requireUnavailable(t, err)
	for _, token := range []string{good, doomed} {
		for _, err := range both(withKey(t.Context(), token), conn) {
			requireUnavailable(t, err)
		}
	}
	require.NoError(t, a.Revoke(t.Context(), key.ID, ""))
	for _, err := range both(withKey(t.Context(), doomed), conn) {
		requireUnavailable(t, err)
	}

	link.Set(badlink.Faults{})
	awaitCalls(good, codes.OK)
	awaitCalls(doomed, codes.Unauthenticated)
}
