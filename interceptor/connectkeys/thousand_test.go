package connectkeys_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

var (
	streamCount = flag.Int("streams", 100, "how many streams are open when their key is revoked")
	revocations = flag.Int("revocations", 1, "how many times that is done")
)

// farewell is the time that httpkeys gives a client to read the status of a stream.
const farewell = 5 * time.Second

// One Revoke ends all open streams of all protocols, wherever their handlers wait: server-sent
// events over HTTP/1.1, streams over HTTP/2 without a protocol above it, Connect, gRPC and
// gRPC-Web.
//
// The server detects late messages. A message is late if a Read, Write, Receive or Send began after
// Revoke had returned, and succeeded. The test sets a flag after Revoke has returned, so a
// goroutine that loads the flag as true calls after Revoke has returned.
//
// No client takes a stream that was cut for a whole one. A client that reads gets the true status,
// unless the handler is blocked in Send, or the status is not delivered in time: then the stream is
// reset.
func TestRevokeUnderAThousandStreams(t *testing.T) {
	store := keystoretest.New(t, nil)
	auth := newAuth(t, store)
	c := &crowd{}
	mux := service{duplex: c.duplex}.mux(connect.WithInterceptors(auth.Interceptor()))
	mux.HandleFunc("/plain", c.plain)
	server := httptest.NewUnstartedServer(auth.Wrap(mux))
	server.EnableHTTP2 = true
	server.Config.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		_ = conn.(*tls.Conn).NetConn().(*net.TCPConn).SetWriteBuffer(1 << 14)
		return ctx
	}
	server.StartTLS()
	defer server.Close()

	bystander, otherToken := issue(t, store, keystore.Spec{})
	c.bystander = bystander.ID
	http2 := server.Client()
	http2.Transport.(*http.Transport).HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 1 << 16}
	other := newClient(http2, server.URL, duplexMethod).CallBidiStream(t.Context())
	other.RequestHeader().Set("Authorization", "Bearer "+otherToken)
	stillWorks := func() {
		require.NoError(t, other.Send(wrapperspb.Bytes(nil)))
		_, err := other.Receive()
		require.NoError(t, err, "the stream of another key goes on")
	}
	stillWorks()

	for range *revocations {
		key, token := issue(t, store, keystore.Spec{})
		r := c.begin()
		clients := []*http.Client{http2, http1(server)}
		for i := range *streamCount {
			r.clients.Go(func() { r.open(t, clients, server.URL, token, i) })
		}
		r.arrived.Wait()
		time.Sleep(time.Second / 4) // most of the handlers that send are blocked by now
		require.Equal(t, *streamCount+1, store.Stats().Live)
		begin := time.Now()
		r.revokedAt.Store(&begin)
		require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
		revoked := time.Since(begin)
		r.revoked.Store(true)
		r.handlers.Wait()
		handlers := time.Since(begin)
		close(r.after)
		r.clients.Wait()
		t.Logf("%d streams: Revoke %v, the last handler returned after %v, the last client knew "+
			"after %v, %d clients that read got a stream that was reset",
			*streamCount, revoked, handlers, time.Since(begin), r.resets.Load())
		require.Zero(t, r.late.Load(), "messages went through after Revoke had returned")
		for _, client := range clients {
			client.CloseIdleConnections()
		}
		require.Equal(t, 1, store.Stats().Live)
		stillWorks()
	}
	require.NoError(t, other.CloseRequest())
	require.NoError(t, other.CloseResponse())
}

func http1(server *httptest.Server) *http.Client {
	roots := server.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil {
			// Handlers must be blocked in Write. With a smaller buffer, a client that begins to
			// read waits for seconds: the kernel of the server asks rarely whether there is space.
			_ = conn.(*net.TCPConn).SetReadBuffer(1 << 18)
		}
		return conn, err
	}
	return &http.Client{Transport: transport}
}

// A crowd has the handlers of many streams under one key.
type crowd struct {
	bystander string // the ID of the key of one stream that does not end
	round     atomic.Pointer[round]
}

type round struct {
	revoked   atomic.Bool   // set after Revoke has returned
	after     chan struct{} // closed after all handlers have returned
	late      atomic.Int64  // number of late messages
	resets    atomic.Int64  // number of clients that read, and got a stream that was reset
	revokedAt atomic.Pointer[time.Time]
	arrived   sync.WaitGroup
	handlers  sync.WaitGroup
	clients   sync.WaitGroup
}

// sinceRevoke returns the time since Revoke was called, or 0 before the call.
func (r *round) sinceRevoke() time.Duration {
	if at := r.revokedAt.Load(); at != nil {
		return time.Since(*at)
	}
	return 0
}

func (c *crowd) begin() *round {
	r := &round{after: make(chan struct{})}
	r.arrived.Add(*streamCount)
	r.handlers.Add(*streamCount)
	c.round.Store(r)
	return r
}

// What the handler of a stream does until the stream ends.
var works = []string{"waits", "receives", "sends", "sends, and the client does not read"}

// open is the client of stream i.
func (r *round) open(t *testing.T, clients []*http.Client, url, token string, i int) {
	protocol, work := i%5, works[i/5%len(works)]
	reads := work != "sends, and the client does not read"
	if protocol < 3 {
		opts := [][]connect.ClientOption{nil, {connect.WithGRPC()}, {connect.WithGRPCWeb()}}[protocol]
		s := newClient(clients[0], url, duplexMethod, opts...).CallBidiStream(t.Context())
		s.RequestHeader().Set("Authorization", "Bearer "+token)
		s.RequestHeader().Set("Work", work)
		err := s.Send(wrapperspb.Bytes(nil))
		if !reads {
			<-r.after
		}
		for err == nil {
			_, err = s.Receive()
		}
		var failed *connect.Error
		reset := errors.As(err, &failed) && failed.Code() == connect.CodeInternal &&
			strings.Contains(err.Error(), "INTERNAL_ERROR")
		if reset && reads {
			r.resets.Add(1)
		}
		switch {
		case failed != nil && failed.Code() == connect.CodeUnauthenticated:
		case reset && (strings.HasPrefix(work, "sends") || r.sinceRevoke() > farewell):
			// The handler was blocked in Send, or the server could not send the status in time.
		default:
			t.Errorf("protocol %d, a handler that %s: the client got %v", protocol, work, err)
		}
		_ = s.CloseResponse()
		return
	}
	body, pipe := io.Pipe()
	defer pipe.Close()
	request, err := http.NewRequestWithContext(t.Context(), "POST", url+"/plain", body)
	if protocol == 4 { // server-sent events
		request, err = http.NewRequestWithContext(t.Context(), "GET", url+"/plain", nil)
	}
	if err != nil {
		t.Error(err)
		return
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Work", work)
	response, err := clients[protocol-3].Do(request)
	if err != nil {
		t.Errorf("protocol %d: %v", protocol, err)
		return
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		t.Errorf("protocol %d: status %d", protocol, response.StatusCode)
	}
	if !reads {
		<-r.after
	}
	_, err = io.Copy(io.Discard, response.Body)
	if err == nil || protocol == 3 && !strings.Contains(err.Error(), "INTERNAL_ERROR") {
		t.Errorf("protocol %d, a handler that %s: the client got %v after half a response",
			protocol, work, err)
	}
}

// duplex is the handler of Connect, gRPC and gRPC-Web.
func (c *crowd) duplex(ctx context.Context, s *connect.BidiStream[message, message]) error {
	if k, _ := httpkeys.FromContext(ctx); k.ID == c.bystander {
		for {
			m, err := s.Receive()
			if err != nil {
				return nil
			}
			if err := s.Send(m); err != nil {
				return err
			}
		}
	}
	if _, err := s.Receive(); err != nil {
		return err
	}
	return c.round.Load().work(ctx, s.RequestHeader().Get("Work"),
		func() error { _, err := s.Receive(); return err },
		func(page []byte) error { return s.Send(wrapperspb.Bytes(page)) })
}

// plain is the handler of requests without a protocol above HTTP.
func (c *crowd) plain(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	_ = control.Flush()
	_ = c.round.Load().work(r.Context(), r.Header.Get("Work"),
		func() error {
			if r.Body == http.NoBody {
				<-r.Context().Done()
				return context.Cause(r.Context())
			}
			_, err := r.Body.Read(make([]byte, 1))
			return err
		},
		func(page []byte) error {
			if _, err := w.Write(page); err != nil {
				return err
			}
			return control.Flush()
		})
}

// work is the work of a handler.
func (r *round) work(
	ctx context.Context, work string, receive func() error, send func([]byte) error,
) error {
	defer r.handlers.Done()
	r.arrived.Done()
	page := bytes.Repeat([]byte("data: x\n"), 1<<10)
	for {
		if work == "sends" {
			// All of them together send a thousand messages in a second, so that no machine is too
			// busy, and few of the handlers are blocked in Send.
			time.Sleep(time.Duration(*streamCount/len(works)) * time.Millisecond)
		}
		before := r.revoked.Load()
		var err error
		switch work {
		case "waits":
			<-ctx.Done()
			return nil // not the truth
		case "receives":
			err = receive()
		case "sends":
			err = send(page[:8])
		default:
			err = send(page)
		}
		if err != nil {
			return err
		}
		if before {
			r.late.Add(1)
		}
	}
}
