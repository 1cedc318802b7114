package hostiletest

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
)

// Clients that ask for a flood and do not read it: the windows of flow control are full, handlers are blocked in Send,
// and the server's own writes to the socket block as well. site.under sees every handler end.
func TestClientsThatNeverRead(t *testing.T) {
	const perConn = 50
	flood := hpack.HeaderField{Name: "flood", Value: "1"}
	for name, settings := range map[string][]http2.Setting{
		"the default windows": nil,
		"windows of nothing":  {{ID: http2.SettingInitialWindowSize, Val: 0}},
		"huge windows":        {{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.under(func(ctx context.Context) {
				each(8, func(int) {
					r, closes, err := s.raw(ctx, settings...)
					if err != nil {
						t.Error(err)
						return
					}
					defer closes()
					if len(settings) > 0 && settings[0].Val > 0 { // the connection's own
						err = r.WriteWindowUpdate(0, 1<<31-1-65535)
					}
					for range perConn {
						if err == nil {
							_, err = r.open(r.block(s.token, flood))
						}
					}
					if err != nil {
						t.Error(err)
					}
					<-ctx.Done()
				})
			})
		})
	}
	t.Run("grpc-go's client", func(t *testing.T) {
		s := newSite(t)
		var cut atomic.Int64
		s.under(func(ctx context.Context) {
			var streams []testpb.TestService_FullDuplexCallClient
			client := s.dial()
			for range 200 {
				stream, err := client.FullDuplexCall(metadata.AppendToOutgoingContext(withKey(context.WithoutCancel(ctx), s.token), "flood", "1"))
				if err != nil {
					t.Error(err)
					return
				}
				streams = append(streams, stream)
			}
			<-ctx.Done()
			for _, stream := range streams { // at last
				var err error
				for err == nil {
					_, err = stream.Recv()
				}
				if err := cutByRevocation(err); err != nil {
					t.Error(err)
				}
				cut.Add(1)
			}
		})
		require.EqualValues(t, 200, cut.Load())
	})
}
