package hostiletest

import (
	"context"
	"flag"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/metadata"
)

var manyStreams = flag.Int("manystreams", 10_000,
	"the number of streams with one key; a fifth of this number under the race detector")

// The attack opens as many streams as possible with one key. Some streams send, and the others
// wait. All streams must end with the key.
func TestManyStreamsOnOneKey(t *testing.T) {
	s := newSite(t)
	const perConn = 1000 // the recommended limit
	streams := *manyStreams
	if raceEnabled {
		streams /= 5
	}
	var ended atomic.Int64
	s.ready = func() bool { return s.handlers.Load() >= int64(streams/perConn*perConn+bystanders) }
	s.under(func(ctx context.Context) {
		// Wait until the streams end, which may be after the end of the attack.
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
				if endedByRevocation(err) == nil {
					ended.Add(1)
				}
			})
		})
	})
	require.EqualValues(t, streams/perConn*perConn, ended.Load(),
		"some clients did not receive the reason for the end of their stream")
}
