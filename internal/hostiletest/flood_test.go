package hostiletest

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// The attack sends well-formed keys that were never issued, over 64 connections. Each call costs
// one read of the store. No call may evict a valid key from the cache.
func TestFloodOfUnknownKeys(t *testing.T) {
	s := newSite(t)
	elsewhere, err := keystore.New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, elsewhere.Close()) })
	tokens := make([]string, 10_000)
	for i := range tokens {
		issued, err := elsewhere.Create(t.Context(), keystore.Spec{Name: "test"})
		require.NoError(t, err)
		tokens[i] = issued.Secret.Reveal()
	}
	var calls atomic.Int64
	s.under(func(ctx context.Context) {
		each(64, func(i int) {
			client := s.dial()
			each(4, func(j int) {
				for n := i*4 + j; ctx.Err() == nil; n += 256 {
					call := withKey(ctx, tokens[n%len(tokens)])
					var err error
					if n%2 == 0 {
						_, err = client.EmptyCall(call, &testpb.Empty{})
					} else if stream, opened := client.FullDuplexCall(call); opened == nil {
						_, err = stream.Recv()
					} else {
						err = opened
					}
					if code := status.Code(err); code != codes.Unauthenticated && ctx.Err() == nil {
						t.Errorf("code %v", code)
						return
					}
					calls.Add(1)
				}
			})
		})
	})
	t.Logf("%d calls with unknown keys; %d keys in the cache", calls.Load(), s.store.Stats().Cached)
	require.LessOrEqual(t, s.store.Stats().Cached, 2)
}
