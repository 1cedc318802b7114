package hostiletest

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
)

// Clients that ask for a flood and do not read it: the windows of flow control are full, handlers
// are blocked in Send, and the server's own writes to the socket block as well. site.under sees
// every handler end.
func TestClientsThatNeverRead(t *testing.T) {
	const conns, perConn = 8, 50
	flood := hpack.HeaderField{Name: "flood", Value: "1"}
	for name, settings := range map[string][]http2.Setting{
		"the default windows": nil,
		"windows of nothing":  {{ID: http2.SettingInitialWindowSize, Val: 0}},
		"huge windows":        {{ID: http2.SettingInitialWindowSize, Val: 1<<31 - 1}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			s.ready = func() bool { return s.handlers.Load() >= conns*perConn+bystanders }
			s.under(func(ctx context.Context) {
				each(conns, func(int) {
					for ctx.Err() == nil {
						r, closes, err := s.raw(ctx, settings...)
						if err != nil {
							continue
						}
						if len(settings) > 0 && settings[0].Val > 0 { // the connection's own
							err = r.WriteWindowUpdate(0, 1<<31-1-65535)
						}
						for range perConn {
							if err == nil {
								_, err = r.open(r.block(s.token, flood))
							}
						}
						for err == nil && ctx.Err() == nil { // until the server has had enough: its keepalive timeout holds for TCP too
							time.Sleep(50 * time.Millisecond)
							err = r.WritePriority(1, http2.PriorityParam{}) // which does nothing
						}
						closes()
					}
				})
			})
		})
	}
	t.Run("grpc-go's client", func(t *testing.T) {
		const streams = 200
		s := newSite(t)
		s.ready = func() bool { return s.handlers.Load() >= streams+bystanders }
		var cut atomic.Int64
		s.under(func(ctx context.Context) {
			var opened []testpb.TestService_FullDuplexCallClient
			client := s.dial()
			for range streams {
				stream, err := client.FullDuplexCall(metadata.AppendToOutgoingContext(withKey(context.WithoutCancel(ctx), s.token), "flood", "1"))
				if err != nil {
					t.Error(err)
					return
				}
				opened = append(opened, stream)
			}
			<-ctx.Done()
			for _, stream := range opened { // at last
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
		require.EqualValues(t, streams, cut.Load())
	})
}
