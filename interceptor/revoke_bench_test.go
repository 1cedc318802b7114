package interceptor_test

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// BenchmarkRevokeUnderStreams alternates between a Revoke without live streams and a Revoke with
// many. It reports the medians, and their ratio to the median without streams. The figures are
// meaningful for -benchtime 10x and more.
func BenchmarkRevokeUnderStreams(b *testing.B) {
	store := openStore(b)
	var started, handlers sync.WaitGroup
	svc := &service{duplex: func(s duplexStream) error {
		defer handlers.Done()
		started.Done()
		if k, _ := interceptor.FromContext(s.Context()); k.Name == "waiting" {
			<-s.Context().Done()
			return context.Cause(s.Context())
		}
		_, err := s.Recv()
		return err
	}}
	addr := serve(b, svc, newAuth(b, store).ServerOptions()...)
	var clients []testpb.TestServiceClient
	for range 10 {
		clients = append(clients, testpb.NewTestServiceClient(dial(b, addr)))
	}
	streams := func(n int) func(token string) (over func()) {
		return func(token string) func() {
			started.Add(n)
			handlers.Add(n)
			var open []testpb.TestService_FullDuplexCallClient
			for i := range n {
				s, err := clients[i%len(clients)].FullDuplexCall(withKey(b.Context(), token))
				require.NoError(b, err)
				open = append(open, s)
			}
			started.Wait()
			return func() {
				for _, s := range open {
					_, err := s.Recv()
					require.Equal(b, "API_KEY_REVOKED", reasonOf(err))
				}
				handlers.Wait()
			}
		}
	}
	contexts := func(n int) func(token string) (over func()) {
		return func(token string) func() {
			var sessions []*keystore.Session
			for range n {
				session, err := store.Bind(b.Context(), token)
				require.NoError(b, err)
				sessions = append(sessions, session)
			}
			return func() {
				for _, session := range sessions {
					session.Close()
				}
			}
		}
	}
	kinds := []struct {
		name string // of the key, and of the figure
		open func(token string) (over func())
	}{
		{"none", streams(0)},
		{"1000", streams(1000)},
		{"10000", streams(10000)},
		{"waiting", streams(10000)}, // for their contexts
		{"contexts", contexts(10000)},
	}
	took := make([][]time.Duration, len(kinds))
	for b.Loop() {
		for i, kind := range kinds {
			key, token := issue(b, store, keystore.Spec{Name: kind.name})
			over := kind.open(token)
			took[i] = append(took[i],
				timed(func() { require.NoError(b, store.Revoke(b.Context(), key.ID, "")) }))
			require.Zero(b, store.Stats().Live)
			over()
		}
	}
	none := quantile(took[0], 50)
	for i, kind := range kinds {
		median := quantile(took[i], 50)
		b.ReportMetric(float64(median)/1e6, kind.name+"-ms")
		b.ReportMetric(float64(median)/float64(none), kind.name+"-ratio")
		slices.Sort(took[i])
		b.Logf("%s: %v to %v, median %v, %s times none, %v more", kind.name, took[i][0],
			took[i][len(took[i])-1], median,
			strconv.FormatFloat(float64(median)/float64(none), 'f', 2, 64), median-none)
	}
}
