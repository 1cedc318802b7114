package hostiletest

import (
	"context"
	"flag"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/metadata"
)

var manyStreams = flag.Int("manystreams", 10_000, "how many streams one key opens; a fifth of it under the race detector")

// One key opens as many streams as it can get: some that send, some that wait. All of them end with
// it.
func TestManyStreamsOnOneKey(t *testing.T) {
	s := newSite(t)
	const perConn = 1000 // the recommended limit
	streams := *manyStreams
	if raceEnabled {
		streams /= 5
	}
	var cut atomic.Int64
	s.ready = func() bool { return s.handlers.Load() >= int64(streams/perConn*perConn+bystanders) }
	s.under(func(ctx context.Context) {
		// Until they are cut, which may be after the attack's time.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), hang)
		defer cancel()
		each(streams/perConn, func(int) {
			client := s.dial()
			each(perConn, func(i int) {
				ctx := withKey(ctx, s.token)
				if i%100 == 0 {
					ctx = metadata.AppendToOutgoingContext(ctx, "flood", "1")
				}
				stream, err := client.FullDuplexCall(ctx)
				for err == nil {
					_, err = stream.Recv()
				}
				if cutByRevocation(err) == nil {
					cut.Add(1)
				}
			})
		})
	})
	require.EqualValues(t, streams/perConn*perConn, cut.Load(), "streams were not told why they end")
}
