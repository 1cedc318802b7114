package hostiletest

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
)

// The attack is a rapid reset (CVE-2023-44487): the client cancels each call immediately, so that
// no limit on streams counts the call. In the second case, the client also does not read the
// responses of the server.
func TestRapidReset(t *testing.T) {
	for name, reads := range map[string]bool{
		"a client that reads": true, "a client that does not read": false,
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			var resets atomic.Int64
			s.under(func(ctx context.Context) {
				each(8, func(int) {
					for ctx.Err() == nil {
						r, closes, err := s.raw(ctx)
						if err != nil {
							continue
						}
						ended := make(chan struct{})
						go func() {
							defer close(ended)
							if reads {
								_ = r.drain()
							}
						}()
						for err == nil && r.next < 1<<30 {
							var id uint32
							if id, err = r.open(r.block(s.token)); err == nil {
								err = r.WriteRSTStream(id, http2.ErrCodeCancel)
							}
							resets.Add(1)
						}
						closes()
						<-ended
					}
				})
			})
			t.Logf("%d resets", resets.Load())
			require.NotZero(t, resets.Load())
		})
	}
}
