package hostiletest

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// The attack consists of clients that open a connection and then stop, or almost stop, at each
// point where a server waits for more data. The server must close each of these connections after a
// timeout.
func TestSlowAndHalfOpenConnections(t *testing.T) {
	s := newSite(t,
		// Use short timeouts, so that the timeouts expire in a short test. The good clients must be
		// in time on a busy machine.
		grpc.ConnectionTimeout(max(*duration/2, 3*time.Second)),
		grpc.KeepaliveParams(
			keepalive.ServerParameters{Time: time.Second, Timeout: 2 * time.Second}))
	const each1 = 8 // connections of each kind
	var hung atomic.Int64
	dribble := func(ctx context.Context, conn net.Conn, text []byte) error {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for ; len(text) > 0; text = text[1:] {
			if _, err := conn.Write(text[:1]); err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return nil
			case <-tick.C:
			}
		}
		return nil
	}
	headers := func(r *raw) []byte { // the bytes of a frame
		block := r.block(s.token)
		n := len(block)
		return append([]byte{
			byte(n >> 16), byte(n >> 8), byte(n),
			byte(http2.FrameHeaders), byte(http2.FlagHeadersEndHeaders), 0, 0, 0, 1,
		}, block...)
	}
	kinds := []func(ctx context.Context, conn net.Conn, r *raw) error{
		func(context.Context, net.Conn, *raw) error { return nil },
		func(ctx context.Context, conn net.Conn, _ *raw) error {
			return dribble(ctx, conn, []byte(http2.ClientPreface))
		},
		func(_ context.Context, conn net.Conn, _ *raw) error {
			_, err := conn.Write([]byte(http2.ClientPreface)[:len(http2.ClientPreface)/2])
			return err
		},
		func(_ context.Context, conn net.Conn, _ *raw) error {
			_, err := conn.Write([]byte(http2.ClientPreface))
			return err
		},
		func(_ context.Context, _ net.Conn, r *raw) error {
			frame := headers(r)
			_, err := r.Write(frame[:len(frame)/2])
			return err
		},
		func(ctx context.Context, _ net.Conn, r *raw) error { return dribble(ctx, r, headers(r)) },
		func(_ context.Context, _ net.Conn, r *raw) error {
			return r.WriteHeaders(
				http2.HeadersFrameParam{StreamID: 1, BlockFragment: r.block(s.token)})
		},
		func(_ context.Context, _ net.Conn, r *raw) error { // a call with half of a message
			if _, err := r.open(r.block(s.token)); err != nil {
				return err
			}
			return r.WriteData(1, false, []byte{0, 0, 0, 1, 0, 'x'})
		},
	}
	const withoutRaw = 4 // the first kinds do not complete the handshake
	s.under(func(ctx context.Context) {
		// Wait beyond the end of the attack, until the server closes the connections.
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), hang)
		defer cancel()
		each(len(kinds)*each1, func(i int) {
			i %= len(kinds)
			var conn net.Conn
			var r *raw
			var closes func()
			var err error
			for conn == nil { // retry if the server closes the connection during the handshake
				if i < withoutRaw {
					conn, closes, err = s.connect(patience)
				} else if r, closes, err = s.raw(patience); err == nil {
					conn = r.Conn
				}
				if err != nil && patience.Err() != nil {
					t.Error(err)
					return
				}
			}
			defer closes()
			if r == nil {
				r = &raw{Conn: conn}
			}
			// An error means that the server has closed the connection.
			go func() { _ = kinds[i](patience, conn, r) }()
			if _ = r.drain(); patience.Err() != nil {
				hung.Add(1)
				t.Errorf("the server never closed a connection of kind %d", i)
			}
		})
	})
	require.Zero(t, hung.Load())
}

// A revocation also ends a call whose client has stopped in the middle of a message.
func TestHalfAMessage(t *testing.T) {
	s := newSite(t)
	s.under(func(ctx context.Context) {
		// A client that is slow must still read its status after the end of the attack.
		patience, cancel := context.WithTimeout(context.WithoutCancel(ctx), hang)
		defer cancel()
		each(16, func(int) {
			r, closes, err := s.raw(patience)
			if err != nil {
				t.Error(err)
				return
			}
			defer closes()
			id, err := r.open(r.block(s.token))
			if err == nil {
				err = r.WriteData(id, false, []byte{0, 0, 0, 1, 0, 'x'})
			}
			var code string
			if err == nil {
				code, err = r.awaitTrailers(id)
			}
			if err != nil || code != "16" {
				t.Errorf("status %q, error %v", code, err)
			}
			<-ctx.Done()
		})
	})
}
