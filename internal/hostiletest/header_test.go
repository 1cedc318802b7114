package hostiletest

import (
	"context"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
)

// The attack sends expensive headers, both with the recommended limit and with the default limit of
// grpc-go, 16 MiB.
func TestHeaderBombs(t *testing.T) {
	for limit, opts := range map[string][]grpc.ServerOption{
		"the recommended limit": nil,
		"grpc-go's limit":       {grpc.MaxHeaderListSize(16 << 20)},
	} {
		for name, bomb := range map[string]func(r *raw, token string) error{
			"a huge value": func(r *raw, token string) error {
				huge := hpack.HeaderField{Name: "x-huge", Value: strings.Repeat("~", 1<<20)}
				_, err := r.open(r.block(token, huge))
				return err
			},
			"thousands of headers": func(r *raw, token string) error {
				var fields []hpack.HeaderField
				for i := range 5000 {
					name := "x-" + strconv.Itoa(i)
					fields = append(fields,
						hpack.HeaderField{Name: name, Value: "y", Sensitive: true})
				}
				_, err := r.open(r.block(token, fields...))
				return err
			},
			"a small block that expands": func(r *raw, token string) error {
				// The first field enters the dynamic table, and each of the others takes one byte.
				field := hpack.HeaderField{Name: "x-bomb", Value: strings.Repeat("~", 3000)}
				fields := make([]hpack.HeaderField, 4000)
				for i := range fields {
					fields[i] = field
				}
				_, err := r.open(r.block(token, fields...))
				return err
			},
			"CONTINUATION without end": func(r *raw, token string) error {
				id := r.id()
				err := r.WriteHeaders(
					http2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(token)})
				for err == nil {
					r.buf.Reset()
					more := hpack.HeaderField{Name: "x-more", Value: "y", Sensitive: true}
					for range 100 {
						_ = r.enc.WriteField(more) // never fails: writes to memory
					}
					err = r.WriteContinuation(id, false, r.buf.Bytes())
				}
				return err
			},
			"empty CONTINUATION without end": func(r *raw, token string) error {
				id := r.id()
				err := r.WriteHeaders(
					http2.HeadersFrameParam{StreamID: id, BlockFragment: r.block(token)})
				for err == nil {
					err = r.WriteContinuation(id, false, nil)
				}
				return err
			},
		} {
			t.Run(name+", "+limit, func(t *testing.T) {
				s := newSite(t, opts...)
				var bombs, conns atomic.Int64
				s.under(func(ctx context.Context) {
					each(8, func(int) {
						for ctx.Err() == nil {
							r, closes, err := s.raw(ctx)
							if err != nil {
								continue
							}
							conns.Add(1)
							ended := make(chan struct{})
							go func() {
								defer close(ended)
								_ = r.drain()
							}()
							for bomb(r, s.token) == nil && ctx.Err() == nil {
								bombs.Add(1)
							}
							closes()
							<-ended
						}
					})
				})
				t.Logf("%d bombs over %d connections", bombs.Load(), conns.Load())
				require.NotZero(t, conns.Load())
			})
		}
	}
}
