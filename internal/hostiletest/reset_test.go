package hostiletest

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
)

// Rapid reset (CVE-2023-44487): calls that are cancelled as they are made, so that no limit on
// streams counts them; and the same from a client that does not read what the server says of them.
func TestRapidReset(t *testing.T) {
	for name, reads := range map[string]bool{"a client that reads": true, "a client that does not": false} {
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
