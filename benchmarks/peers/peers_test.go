package peers_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// TestPeersGuard checks that the comparison is fair. Over a real socket, for unary calls and for
// streams, each peer accepts the good credentials of all callers, and refuses the bad credential
// and a call without a credential. The peer without auth accepts everything.
func TestPeersGuard(t *testing.T) {
	started, skipped, err := peers.Start(t.Context(), t.TempDir())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, peers.Close(started)) })
	require.Len(t, started, 10-len(skipped))
	for _, s := range skipped {
		t.Logf("SKIPPED: %s: %s", s.Name, s.Why)
	}
	for _, p := range started {
		t.Run(p.Name, func(t *testing.T) {
			echo := &peers.Service{Duplex: func(s peers.Duplex) error { return nil }}
			rig, err := peers.NewRig(echo, append(p.Good, p.Bad, ""), p.Options...)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, rig.Close()) })
			unary := func(i int) codes.Code { return status.Code(rig.Call(t.Context(), i)()) }
			stream := func(i int) codes.Code {
				s, err := rig.Client(i).FullDuplexCall(t.Context())
				require.NoError(t, err)
				_, err = s.Recv()
				require.Error(t, err)
				return status.Code(err)
			}
			require.Len(t, p.Good, peers.Clients)
			ended := status.Code(func() error { // the code of Recv when the handler returns nil
				free, err := peers.NewRig(echo, []string{""})
				require.NoError(t, err)
				defer func() { require.NoError(t, free.Close()) }()
				s, err := free.Client(0).FullDuplexCall(t.Context())
				require.NoError(t, err)
				_, err = s.Recv()
				return err
			}())
			for i := range p.Good {
				require.Equal(t, codes.OK, unary(i))
				require.Equal(t, ended, stream(i))
			}
			for _, i := range []int{peers.Clients, peers.Clients + 1} {
				if p.Name == peers.NoAuth {
					require.Equal(t, codes.OK, unary(i))
					continue
				}
				require.Equal(t, codes.Unauthenticated, unary(i))
				require.Equal(t, codes.Unauthenticated, stream(i))
			}
			if p.Name == peers.NoAuth {
				require.Nil(t, p.Check)
				return
			}
			for _, good := range p.Good {
				require.NoError(t, p.Check(t.Context(), good))
			}
			require.Error(t, p.Check(t.Context(), p.Bad))
		})
	}
}
