package hostiletest

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const duplex = "/grpc.testing.TestService/FullDuplexCall"

// A raw is a client that writes single HTTP/2 frames.
type raw struct {
	net.Conn
	*http2.Framer
	buf  bytes.Buffer
	enc  *hpack.Encoder
	next uint32
}

// connect returns a connection, and a function to close the connection. The connection also closes
// when the context is done.
func (s *site) connect(ctx context.Context) (net.Conn, func(), error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.addr)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	return conn, func() { stop(); _ = conn.Close() }, nil
}

func (s *site) raw(ctx context.Context, settings ...http2.Setting) (*raw, func(), error) {
	conn, closes, err := s.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	r := &raw{Conn: conn, Framer: http2.NewFramer(conn, conn), next: 1}
	r.AllowIllegalWrites = true
	r.enc = hpack.NewEncoder(&r.buf)
	if _, err = conn.Write([]byte(http2.ClientPreface)); err == nil {
		err = r.WriteSettings(settings...)
	}
	if err != nil {
		closes()
		return nil, nil, err
	}
	return r, closes, nil
}

// id returns the ID of the next stream.
func (r *raw) id() uint32 {
	id := r.next
	r.next += 2
	return id
}

// block encodes the headers of a call.
func (r *raw) block(token string, more ...hpack.HeaderField) []byte {
	r.buf.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: duplex},
		{Name: ":authority", Value: "localhost"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
		{Name: "authorization", Value: "Bearer " + token, Sensitive: true},
	}, more...) {
		_ = r.enc.WriteField(f) // never fails: writes to memory
	}
	return r.buf.Bytes()
}

// open starts a call with headers of any size.
func (r *raw) open(block []byte) (id uint32, err error) {
	id = r.id()
	const most = 16 << 10
	first := block[:min(len(block), most)]
	block = block[len(first):]
	err = r.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: first, EndHeaders: len(block) == 0,
	})
	if err != nil {
		return 0, err
	}
	for len(block) > 0 {
		part := block[:min(len(block), most)]
		block = block[len(part):]
		if err := r.WriteContinuation(id, len(block) == 0, part); err != nil {
			return 0, err
		}
	}
	return id, nil
}

// drain reads until the connection ends, and returns the error.
func (r *raw) drain() error {
	buf := make([]byte, 64<<10)
	for {
		if _, err := r.Read(buf); err != nil {
			return err
		}
	}
}

// awaitTrailers reads frames until the server has ended the stream, and returns the grpc-status of
// the stream. awaitTrailers answers pings, so that the server keeps the connection open.
func (r *raw) awaitTrailers(id uint32) (string, error) {
	r.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		f, err := r.ReadFrame()
		if err != nil {
			return "", err
		}
		if ping, ok := f.(*http2.PingFrame); ok && !ping.IsAck() {
			if err := r.WritePing(true, ping.Data); err != nil {
				return "", err
			}
		}
		if f, ok := f.(*http2.MetaHeadersFrame); ok && f.StreamID == id && f.StreamEnded() {
			for _, field := range f.Fields {
				if field.Name == "grpc-status" {
					return field.Value, nil
				}
			}
			return "", fmt.Errorf("stream %d ended without a status", id)
		}
	}
}

// each runs f in n goroutines, and waits until all of them have returned.
func each(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}
