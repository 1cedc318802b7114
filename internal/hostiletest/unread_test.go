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

// The attack consists of clients that request a flood of messages and do not read the messages. The
// windows of flow control are full, the handlers are blocked in Send, and the writes of the server
// to the socket block too. The method under of site checks that every handler returns.
func TestClientsThatNeverRead(t *testing.T) {
	const conns, perConn = 8, 50
	flood := hpack.HeaderField{Name: "flood", Value: "1"}
	for name, settings := range map[string][]http2.Setting{
		"the default windows": nil,
		"empty windows":       {{ID: http2.SettingInitialWindowSize, Val: 0}},
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
						// the window of the connection
						if len(settings) > 0 && settings[0].Val > 0 {
							err = r.WriteWindowUpdate(0, 1<<31-1-65535)
						}
						for range perConn {
							if err == nil {
								_, err = r.open(r.block(s.token, flood))
							}
						}
						// Continue until the server closes the connection: the keepalive timeout of
						// the server is also a timeout of TCP.
						for err == nil && ctx.Err() == nil {
							time.Sleep(50 * time.Millisecond)
							err = r.WritePriority(1, http2.PriorityParam{}) // has no effect
						}
						closes()
					}
				})
			})
		})
	}
	t.Run("the client of grpc-go", func(t *testing.T) {
		const streams = 200
		s := newSite(t)
		s.ready = func() bool { return s.handlers.Load() >= streams+bystanders }
		var ended atomic.Int64
		s.under(func(ctx context.Context) {
			var opened []testpb.TestService_FullDuplexCallClient
			client := s.dial()
			for range streams {
				call := withKey(context.WithoutCancel(ctx), s.token)
				call = metadata.AppendToOutgoingContext(call, "flood", "1")
				stream, err := client.FullDuplexCall(call)
				if err != nil {
					t.Error(err)
					return
				}
				opened = append(opened, stream)
			}
			<-ctx.Done()
			for _, stream := range opened { // read only now
				var err error
				for err == nil {
					_, err = stream.Recv()
				}
				if err := endedByRevocation(err); err != nil {
					t.Error(err)
				}
				ended.Add(1)
			}
		})
		require.EqualValues(t, streams, ended.Load())
	})
}
