package interceptor_test

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A leaseHolder holds back a write of one entry, such as a lease of credits.
type leaseHolder struct {
	backend.Backend
	hold atomic.Pointer[chan struct{}]
}

func (b *leaseHolder) Apply(ctx context.Context, changes ...backend.Change) error {
	if hold := b.hold.Load(); hold != nil && len(changes) == 1 {
		<-*hold
	}
	return b.Backend.Apply(ctx, changes...)
}

// A key is changed while a unary call waits for credits. Once the change has returned, the call
// decides by the changed key, and takes one use from the RateLimit.
func TestChangeWhileAUnaryCallWaitsForCredits(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*keystore.Spec)
		code   codes.Code
	}{
		"no scope": {func(spec *keystore.Spec) { spec.Scopes = nil }, codes.PermissionDenied},
		"expired": {
			func(spec *keystore.Spec) { spec.ExpiresAt = time.Now().Add(time.Millisecond) },
			codes.Unauthenticated,
		},
		"more scopes": {
			func(spec *keystore.Spec) { spec.Scopes = append(spec.Scopes, "read") }, codes.OK,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &leaseHolder{Backend: backendtest.NewMemory()}
				s, err := keystore.New(b, nil)
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				i, err := s.Create(t.Context(), keystore.Spec{Name: "test",
					Scopes: []string{"write"}, Credits: &keystore.Credits{Remaining: 1000},
					RateLimit: keystore.RateLimit{PerSecond: 1e-6, Burst: 1}})
				require.NoError(t, err)
				a, err := interceptor.New(s, interceptor.Require("/s/M", "write"))
				require.NoError(t, err)
				hold := make(chan struct{})
				b.hold.Store(&hold)
				ctx := metadata.NewIncomingContext(t.Context(),
					metadata.Pairs("authorization", "Bearer "+i.Secret.Reveal()))
				var ran atomic.Bool
				done := make(chan error, 1)
				go func() {
					_, err := a.Unary()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/s/M"},
						func(ctx context.Context, _ any) (any, error) {
							key, ok := interceptor.FromContext(ctx)
							assert.True(t, ok)
							assert.Equal(t, i.Key.Revision+1, key.Revision)
							ran.Store(true)
							return nil, nil
						})
					done <- err
				}()
				synctest.Wait()
				require.False(t, ran.Load(), "the call has not waited")
				_, err = s.Update(t.Context(), i.Key.ID, func(spec *keystore.Spec) error {
					c.change(spec)
					return nil
				})
				require.NoError(t, err)
				time.Sleep(time.Second)
				close(hold)
				require.Equal(t, c.code, status.Code(<-done))
				require.Equal(t, c.code == codes.OK, ran.Load())
			})
		})
	}
}
