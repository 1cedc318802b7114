package keystore

import (
	"flag"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

var manyKeys = flag.Int("keys", 2000, "how many keys one RevokeAll of one of two processes revokes")

// C11: RevokeAll waits for the other processes once, whatever the number of keys. The other process
// has cached keys and has sessions: none is admitted afterwards, and each session has ended. The
// long run is
//
//	go test ./keystore -run OneBarrierForEachRevokeAll -keys 100000 -timeout 0
func TestOneBarrierForEachRevokeAll(t *testing.T) {
	others := goleak.IgnoreCurrent()
	shared := backendtest.NewShared()
	a, err := New(shared.Open(), realTime())
	require.NoError(t, err)
	b, err := New(shared.Open(), realTime())
	require.NoError(t, err)

	tokens := make([]string, *manyKeys)
	var makers sync.WaitGroup
	const workers = 8
	for w := range workers {
		makers.Go(func() {
			for i := w; i < len(tokens); i += workers {
				issued, err := a.Create(t.Context(), Spec{Name: "many", Owner: "acme"})
				if err != nil {
					t.Errorf("Create: %v", err)
					return
				}
				tokens[i] = issued.Secret.Reveal()
			}
		})
	}
	makers.Wait()
	require.False(t, t.Failed())
	var sessions []*Session
	for i, token := range tokens {
		_, err := b.Verify(t.Context(), token)
		require.NoError(t, err)
		if i%100 == 0 {
			s, err := b.Bind(t.Context(), token)
			require.NoError(t, err)
			sessions = append(sessions, s)
		}
	}

	before := a.processes.cluster.Stats()
	began := time.Now()
	n, err := a.RevokeAll(t.Context(), Query{Owner: "acme"}, "", nil)
	took := time.Since(began)
	require.NoError(t, err)
	require.Equal(t, *manyKeys, n)
	for _, s := range sessions {
		require.ErrorIs(t, s.Cause(), ErrRevoked)
		s.Close()
	}
	for _, token := range tokens {
		_, err := b.Verify(t.Context(), token)
		require.ErrorIs(t, err, ErrRevoked)
	}
	after := a.processes.cluster.Stats()
	require.EqualValues(t, 1, after.Acked+after.Deadlines-before.Acked-before.Deadlines)

	require.NoError(t, b.Close())
	require.Len(t, membersIn(t, shared), 2, "the member record and the guard entry of a")
	require.NoError(t, a.Close())
	require.Empty(t, membersIn(t, shared))
	goleak.VerifyNone(t, others)
	figures.Record(t, "%d keys, cached in another process, with %d sessions: one barrier, and then "+
		"0 keys admitted and 0 sessions alive; RevokeAll took %v", *manyKeys, len(sessions),
		took.Round(time.Millisecond))
}
