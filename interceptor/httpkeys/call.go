package httpkeys

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A call is a request whose key was accepted, and which ends with its key.
//
// In net/http, a server ends a request when the handler returns, and only then. A handler that is
// blocked in a Read of the body, or in a Write of the response, does not return because its context
// is cancelled. So the call ends in steps:
//
//	the session ends    before Revoke returns: a Read or Write that begins now returns an error
//	the context ends    in the background: a handler that waits for its context returns
//	cut                 immediately afterwards: SetReadDeadline(past), if the body is not at its end
//	cutLate             200 ms later: SetWriteDeadline(past), if the response has begun or a Write is
//	                    blocked; after one second, a hijacked connection is closed, even if the
//	                    handler has returned
//	conclude            when the handler has returned: the caller gets 401 if the handler has sent
//	                    nothing, and otherwise the connection, or the stream of HTTP/2, is aborted,
//	                    so that the caller does not take half a response for a whole one
//
// The invariants:
//
//  1. The session has ended before Revoke returns. Read, Write, WriteHeader and Flush check the
//     session at their start, and Read, Write and Flush check again before they return. So no call
//     that begins after Revoke has returned transfers anything, and none that was blocked during
//     Revoke reports success.
//  2. No deadline is set after the handler has returned: net/http has then given the stream of
//     HTTP/2 back, and SetReadDeadline would dereference nil and end the process. A connection of
//     HTTP/1.1 may then serve another request. So cut and cutLate hold mu and check returned, and
//     finish sets returned under mu before ServeHTTP returns.
//  3. Once the session has ended, no Write of the handler begins, except after HandOver. So a Write
//     that counts in writing when cutLate runs was blocked for 200 ms, or belongs to the end of the
//     response that another protocol writes.
//  4. The session of a hijacked connection lasts until the connection is closed and the handler has
//     returned, whichever is later. So cut always finds the connection.
type call struct {
	auth    *Authenticator
	ctx     *requestContext // the parent of the session's context
	request *http.Request   // for the handler, which may change it: without the credential
	pattern string          // of the rule
	method  string
	path    string

	// What is known of the caller. The key is nil in a public request, and until the key is
	// verified.
	key   *keystore.Key
	keyID string
	addr  netip.Addr
	proxy string

	session *keystore.Session // nil unless a key was accepted; nil in a public request
	control *http.ResponseController
	outer   http.Header // of the response, before the handler ran; nil if there were none

	bodyAtEnd   atomic.Bool  // the body has no more bytes: a Read does not block
	writing     atomic.Int32 // Writes and Flushes that are running
	wroteHeader atomic.Bool  // the status of the response was given to net/http
	handedOver  atomic.Bool  // see HandOver
	reportOnce  sync.Once

	stop func() bool // of OnEnd of the session; set before the handler runs

	mu       sync.Mutex // guards all below, and is held while a deadline is set
	returned bool       // the handler has returned or panicked
	farewell bool       // the end of the response is being written, with its own limit of time
	timer    *time.Timer
	hijacked bool     // the handler has hijacked the connection
	conn     net.Conn // the hijacked connection; nil before the hijack, and after the end
}

const (
	// writeGrace is the time that a Write has to return after the end of the session.
	writeGrace = 200 * time.Millisecond
	// farewellGrace is the time that a client has to read the end of the response.
	farewellGrace = 5 * time.Second
	// hijackGrace is the time that a handler has to say goodbye on a hijacked connection.
	hijackGrace = time.Second
)

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// serve calls the handler. The session ends the call.
func (c *call) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	c.control = http.NewResponseController(w)
	if r.Body == nil || r.Body == http.NoBody {
		c.bodyAtEnd.Store(true)
	} else {
		c.request.Body = &body{r.Body, c}
	}
	c.stop = c.session.OnEnd(c.cut)
	defer c.finish()
	defer c.giveBack(r)
	if h := w.Header(); len(h) > 0 {
		c.outer = h.Clone()
	}
	next.ServeHTTP(&writer{w, c}, c.request)
	c.conclude(w)
}

// giveBack gives the request of net/http what the handler has set in its copy of the request: the
// pattern, for middleware that logs, and the form with files, whose temporary files net/http
// removes.
func (c *call) giveBack(r *http.Request) {
	r.Pattern, r.MultipartForm = c.request.Pattern, c.request.MultipartForm
}

// An EndedError is the error of Read, Write and Flush when the key has ended the request. errors.Is
// finds the reason, such as keystore.ErrRevoked.
type EndedError struct{ cause error }

func (e *EndedError) Error() string {
	return fmt.Sprintf("httpkeys: the request ended with its API key: %v", e.cause)
}

// Unwrap returns the cause of the session.
func (e *EndedError) Unwrap() error { return e.cause }

// ended returns an *EndedError if the key has ended the request. If the context of the caller has
// ended, ended returns nil, and net/http ends the request.
func (c *call) ended() error {
	if cause := c.session.Cause(); cause != nil && admission.EndedByStore(cause) {
		return &EndedError{cause}
	}
	return nil
}

// cut unblocks the handler after the key has ended the session. It runs on a goroutine of the
// store.
func (c *call) cut() {
	if c.ended() == nil {
		return
	}
	if hook := c.auth.hooks.beforeCut; hook != nil {
		hook()
	}
	defer c.reportEnd()
	c.mu.Lock()
	defer c.mu.Unlock()
	grace := writeGrace
	switch {
	case c.conn != nil:
		grace = hijackGrace
	case (c.returned || c.farewell) && !c.auth.hooks.forgetReturned:
		return
	case !c.bodyAtEnd.Load():
		// An error means that the ResponseWriter of a middleware has no deadlines.
		_ = c.control.SetReadDeadline(past)
	}
	c.timer = time.AfterFunc(grace, c.cutLate)
}

// cutLate unblocks a handler that does not return without help.
func (c *call) cutLate() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		go func(conn net.Conn) { // over TLS, Close may take 5 s
			_ = conn.Close()
			c.forget()
		}(c.conn)
		return
	}
	if c.returned || c.farewell {
		return
	}
	blocked := c.writing.Load() > 0
	if begun := c.wroteHeader.Load() && !c.handedOver.Load(); begun || blocked {
		_ = c.control.SetWriteDeadline(past)
	}
	if blocked {
		// Over TLS, net/http then closes the connection, and package tls sets a deadline of 5 s of
		// its own for that, which must pass too.
		c.timer = time.AfterFunc(writeGrace, c.cutLate)
	}
}

// finish ends the work of the call after the handler has returned or panicked. Afterwards no
// deadline is set. If the handler has left a hijacked connection open, the session continues.
func (c *call) finish() {
	c.mu.Lock()
	c.returned = true
	open := c.conn != nil
	if c.timer != nil && !open {
		c.timer.Stop()
	}
	c.mu.Unlock()
	if c.ended() != nil {
		c.reportEnd()
	}
	if !open {
		c.release()
	}
}

// release closes the session. A second call does nothing.
func (c *call) release() {
	c.stop()
	c.session.Close()
}

// forget notes that the hijacked connection is closed.
func (c *call) forget() {
	c.mu.Lock()
	c.conn = nil
	if c.timer != nil {
		c.timer.Stop()
	}
	returned := c.returned
	c.mu.Unlock()
	if returned {
		c.release()
	}
}

// conclude writes the end of the response of a handler that has returned, if the key has ended the
// request.
func (c *call) conclude(w http.ResponseWriter) {
	ended := c.ended()
	if ended == nil || c.handedOver.Load() {
		return
	}
	c.mu.Lock()
	hijacked := c.hijacked
	c.mu.Unlock()
	if hijacked {
		return
	}
	if c.wroteHeader.Load() {
		if files := c.request.MultipartForm; files != nil {
			_ = files.RemoveAll() // after a panic, net/http does not
		}
		panic(http.ErrAbortHandler)
	}
	c.dropHeaders(w.Header())
	c.Farewell()
	c.writing.Add(1)
	defer c.writing.Add(-1)
	problem, _ := c.Ended()
	c.writeProblem(w, c.refusal(c.session.Cause()), problem)
}

// dropHeaders removes the headers and the trailers of the handler, which may have the result of the
// request. The headers of middleware around Wrap remain.
func (c *call) dropHeaders(h http.Header) {
	clear(h)
	maps.Copy(h, c.outer)
}

// HandOver, Ended and Farewell are for package connectkeys, which finds the call in the context of
// a handler, under admission.SeenContext. Its protocols can say in the response why a stream ended.
// After HandOver, connectkeys checks Ended before and after each message, and the writer refuses
// nothing.
func (c *call) HandOver() { c.handedOver.Store(true) }

// Ended returns what the caller may know of the end, if the key has ended the request.
func (c *call) Ended() (p Problem, ended bool) {
	if c.session == nil || c.ended() == nil {
		return Problem{}, false
	}
	cause := c.session.Cause()
	return c.auth.problem(c.ctx, admission.EndKind(cause), cause), true
}

// Farewell limits the time for the end of the response, once the key has ended the request, and
// before the end of the response is written. HTTP/1.1 has only deadlines of the connection, which
// the next request would inherit.
func (c *call) Farewell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.returned {
		return
	}
	c.farewell = true
	if !c.bodyAtEnd.Load() {
		// In HTTP/1.1, net/http first reads the rest of the body, however slowly the caller sends
		// it.
		_ = c.control.SetReadDeadline(past)
	}
	if c.timer != nil {
		c.timer.Stop()
	}
	if c.request.ProtoMajor >= 2 {
		_ = c.control.SetWriteDeadline(time.Now().Add(farewellGrace))
	} else {
		c.timer = time.AfterFunc(farewellGrace, c.cutFarewell)
	}
}

// cutFarewell ends a connection of HTTP/1.1 whose client does not read the end of the response.
func (c *call) cutFarewell() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.returned && c.writing.Load() > 0 {
		_ = c.control.SetWriteDeadline(past)
	}
}

// reportEnd reports once that the request ended with its key.
func (c *call) reportEnd() {
	c.reportOnce.Do(func() {
		cause := c.session.Cause()
		c.report(requestEnded, c.refusal(cause), statusOf[admission.EndKind(cause)])
	})
}

// A body is the body of the request for the handler.
type body struct {
	io.ReadCloser
	call *call
}

func (b *body) Read(p []byte) (int, error) {
	if err := b.call.ended(); err != nil {
		return 0, err
	}
	n, err := b.ReadCloser.Read(p)
	if ended := b.call.ended(); ended != nil {
		return 0, ended
	}
	if err == io.EOF {
		b.call.bodyAtEnd.Store(true)
	}
	return n, err
}

// A writer is the ResponseWriter for the handler.
type writer struct {
	http.ResponseWriter
	call *call
}

// Unwrap lets an http.ResponseController set deadlines.
func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// refused returns an error if the handler must not write any more.
func (w *writer) refused() error {
	if w.call.handedOver.Load() {
		return nil
	}
	return w.call.ended()
}

func (w *writer) WriteHeader(status int) {
	if w.refused() != nil {
		return
	}
	if status >= http.StatusOK || status == http.StatusSwitchingProtocols {
		w.call.wroteHeader.Store(true)
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(p []byte) (int, error) {
	w.call.writing.Add(1) // before the check of the session: see invariant 3
	defer w.call.writing.Add(-1)
	if err := w.refused(); err != nil {
		return 0, err
	}
	w.call.wroteHeader.Store(true)
	n, err := w.ResponseWriter.Write(p)
	if ended := w.refused(); ended != nil {
		return n, ended
	}
	return n, err
}

// Flush implements http.Flusher.
func (w *writer) Flush() { _ = w.FlushError() }

// FlushError is Flush for an http.ResponseController.
func (w *writer) FlushError() error {
	w.call.writing.Add(1)
	defer w.call.writing.Add(-1)
	if err := w.refused(); err != nil {
		return err
	}
	err := w.call.control.Flush()
	if !errors.Is(err, http.ErrNotSupported) {
		w.call.wroteHeader.Store(true)
	}
	if ended := w.refused(); ended != nil {
		return ended
	}
	return err
}

// Hijack implements http.Hijacker. After the end of the session, the handler has one second to say
// goodbye on the connection, and then the connection is closed.
func (w *writer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if err := w.call.ended(); err != nil {
		return nil, nil, err
	}
	conn, buffered, err := w.call.control.Hijack()
	if err != nil {
		return nil, nil, err
	}
	w.call.mu.Lock()
	w.call.hijacked, w.call.conn = true, conn
	w.call.mu.Unlock()
	// cut may have run before it could find the connection.
	if err := w.call.ended(); err != nil {
		_ = conn.Close()
		w.call.forget()
		return nil, nil, err
	}
	own := &hijackedConn{conn, w.call}
	return own, bufio.NewReadWriter(readerOf(own, buffered.Reader), buffered.Writer), nil
}

// readerOf returns a Reader of a connection, which has buffered the same bytes as the Reader of
// net/http.
func readerOf(conn net.Conn, r *bufio.Reader) *bufio.Reader {
	early, _ := r.Peek(r.Buffered()) // never fails
	rest := io.MultiReader(bytes.NewReader(bytes.Clone(early)), conn)
	own := bufio.NewReaderSize(rest, r.Size())
	_, _ = own.Peek(len(early))
	return own
}

// A hijackedConn is a hijacked connection for the handler.
type hijackedConn struct {
	net.Conn
	call *call
}

// Read returns nothing that arrives after the end of the session. Read drops such bytes, and
// returns an error once the connection is closed. So a message that the client sends after Revoke
// has returned does not arrive, and a handler that reads and says goodbye in two goroutines does
// not have to say goodbye before the next message.
func (h *hijackedConn) Read(p []byte) (int, error) {
	for {
		n, err := h.Conn.Read(p)
		switch {
		case h.call.ended() == nil || len(p) == 0:
			return n, err
		case err != nil:
			return 0, err
		}
	}
}

func (h *hijackedConn) Close() error {
	err := h.Conn.Close()
	h.call.forget()
	return err
}

// CloseWrite is for httputil.ReverseProxy.
func (h *hijackedConn) CloseWrite() error {
	if c, ok := h.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return errors.ErrUnsupported
}

// NetConn returns the connection of net/http, as NetConn of a tls.Conn does.
func (h *hijackedConn) NetConn() net.Conn { return h.Conn }
