package interceptor

import (
	"context"
	"net/http"
	"reflect"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A publicStream is the stream of a method that needs no key. Only the context is replaced.
type publicStream struct {
	grpc.ServerStream
	ctx *callContext
}

func (s *publicStream) Context() context.Context { return s.ctx }

// A stream ends when its key is revoked, disabled or narrowed, or when the key expires. With
// CancelUnary, a unary call has a stream without messages, and ends in the same way.
//
// gRPC lets a server end a stream in only one way: the handler returns (grpc-go issues 465 and
// 3909). But a handler that is blocked in RecvMsg or SendMsg does not return. Two alternatives do
// not work. Cancelling a context that is derived from the context of the stream does not unblock
// the handler. Cancelling the context of the transport, which a tap handle can do, sends Canceled
// to the client.
//
// Writing the status of the stream works: the write unblocks the handler, and the client gets the
// right status. gRPC itself writes the status after a handler returns, and also from any goroutine
// that meets an error in RecvMsg or SendMsg. After the status, the transport accepts nothing more.
// The stream of the transport has the method WriteStatus, which is exported although the type is
// internal. WriteStatus costs nothing until the key is revoked. The handler stays on its own
// goroutine, where its panics belong. The client gets the status even if the handler never returns.
//
// Some transports have no WriteStatus: a transport other than that of grpc-go, or perhaps a later
// version of grpc-go. Under grpc.Server.ServeHTTP, WriteStatus exists, but does not unblock a write
// that waits for flow control. In both cases each RecvMsg and SendMsg runs in a new goroutine,
// which the handler can abandon. That costs four allocations per message and, in a ping-pong on
// loopback, 5 to 15 µs (BenchmarkStreamMessage). The handler then returns, and its return ends the
// stream and the abandoned call. Under ServeHTTP, the watcher also writes the status, for clients
// of handlers that do not return. No goroutine waits for this write, because a client that does not
// read can block the write until the connection ends.
//
// The mode of a stream depends on the transport:
//
//	mode           RecvMsg                  SendMsg, SendHeader      when the handler returns
//	interruptible  on the goroutine of the  on the goroutine of the  finish waits for the watcher,
//	               handler; WriteStatus     handler; WriteStatus     or writes the status if the
//	               unblocks the call        unblocks the call        watcher has not started
//	serveHTTP      in a new goroutine into  in a new goroutine       finish stops the watcher,
//	               a new message; the       that the handler can     without waiting; gRPC writes
//	               handler can abandon it   abandon                  the status
//	foreign        as in serveHTTP          as in serveHTTP          gRPC writes the status
//
// In the modes interruptible and serveHTTP, a watcher writes the status when the key ends. In the
// mode foreign there is no watcher, so the client gets the status after the handler has returned.
//
// The invariants:
//
//  1. The session has ended before Revoke returns. RecvMsg, SendMsg and SendHeader check the
//     session at their start and again before they return. So a call that begins after Revoke has
//     returned transfers no message, and a call that was blocked during Revoke does not report
//     success. SetHeader and SetTrailer check the session at their start. So do grpc.SetHeader,
//     grpc.SendHeader and grpc.SetTrailer with the context of the handler. A
//     grpc.ServerTransportStream that the handler took from its context earlier does not check the
//     session.
//  2. The client gets one status, made from the cause of the end. Every goroutine that asks for the
//     status gets this status. A SendMsg that checked the session before the end may still send its
//     message before the status. After the status, the transport accepts no message.
type stream struct {
	grpc.ServerStream
	ctx          *callContext
	session      *keystore.Session
	clientStatus func() *status.Status // after the end: what the client gets; always the same

	reportEnd func() // reports the end, once; nil without LogRefusals and Observe

	// onLimit reports that the key exceeds its rate limit or its credits, and returns the status
	// for the client. It is nil without LimitMessages.
	onLimit     func(error) *status.Status
	limitStatus atomic.Pointer[status.Status] // set when a message has exceeded the limits
	cost        int64                         // of a message, in credits

	mode          mode
	transport     statusWriter  // nil in mode foreign
	stopWatch     func() bool   // stops the watcher; nil in mode foreign
	statusWritten chan struct{} // closed when the watcher has run; nil in mode foreign
}

// A mode says how a stream can end. See the table at stream.
type mode int

const (
	foreign       mode = iota // the transport has no WriteStatus
	serveHTTP                 // WriteStatus does not unblock a write that waits for flow control
	interruptible             // WriteStatus unblocks RecvMsg and SendMsg
)

// A statusWriter is a stream of a transport that another goroutine can end.
type statusWriter interface{ WriteStatus(*status.Status) error }

// modeOf returns the mode for the context of a stream, and the statusWriter unless the mode is
// foreign.
func modeOf(ctx context.Context) (mode, statusWriter) {
	w, ok := grpc.ServerTransportStreamFromContext(ctx).(statusWriter)
	switch {
	case !ok:
		return foreign, nil
	case ctx.Value(http.ServerContextKey) != nil:
		return serveHTTP, w
	default:
		return interruptible, w
	}
}

// newStream returns the stream for the handler, in place of ss. The context of the session ends
// with the key. The context call does not, and goes to the ErrorMapper and the logger.
func (a *Authenticator) newStream(
	ss grpc.ServerStream, session *keystore.Session, call *callContext, fullMethod string,
	known bool,
) *stream {
	key := session.Key()
	s := &stream{ServerStream: ss, session: session}
	s.ctx = &callContext{Context: session.Context(), auth: a, key: key, stream: s}
	refusal := func() *Refusal {
		return a.newRefusal(call, fullMethod, &Refusal{KeyID: key.ID, err: s.session.Cause()})
	}
	s.clientStatus = sync.OnceValue(func() *status.Status {
		return a.mapStatus(call, refusal(), endStatus(s.session.Cause()))
	})
	if a.log.Logger != nil || len(a.observers) > 0 {
		s.reportEnd = sync.OnceFunc(func() {
			code := endStatus(s.session.Cause()).Code()
			a.report(call, callEnded, known, refusal(), code)
		})
	}
	if a.limitMessages {
		s.onLimit = func(err error) *status.Status {
			r := a.newRefusal(call, fullMethod, &Refusal{KeyID: key.ID, err: err})
			byDefault := a.defaultStatus(call, err)
			a.report(call, callEnded, known, r, byDefault.Code())
			return a.mapStatus(call, r, byDefault)
		}
	}
	s.mode, s.transport = modeOf(ss.Context())
	if s.mode == foreign {
		return s
	}
	s.statusWritten = make(chan struct{})
	s.stopWatch = session.OnEnd(func() {
		defer close(s.statusWritten)
		if admission.EndedByStore(s.session.Cause()) {
			// An error means that the connection is closed, which unblocks the handler too.
			_ = s.transport.WriteStatus(s.clientStatus())
			s.reportIfEnded()
		}
	})
	return s
}

// finish ends the work of s after the handler has returned or panicked. Afterwards the watcher does
// not run, except under ServeHTTP, where it may still write the status. If the key has ended, but
// the handler returned before the watcher started, finish writes the status itself.
func (s *stream) finish() {
	defer s.reportIfEnded()
	switch s.mode {
	case foreign:
	case serveHTTP:
		s.stopWatch()
	case interruptible:
		if !s.stopWatch() {
			<-s.statusWritten
		} else if admission.EndedByStore(s.session.Cause()) {
			_ = s.transport.WriteStatus(s.clientStatus())
		}
	}
}

// reportIfEnded reports once that the stream ended with its key, if it did. Call reportIfEnded
// after the client got the status, because a logger may block.
func (s *stream) reportIfEnded() {
	if s.reportEnd != nil && s.limitStatus.Load() == nil && admission.EndedByStore(s.session.Cause()) {
		s.reportEnd()
	}
}

// ended returns the status for the client if the key has ended the stream, and nil otherwise. If
// the context of the caller has ended, ended returns nil, and gRPC ends the stream.
func (s *stream) ended() error {
	if st := s.limitStatus.Load(); st != nil {
		return st.Err()
	}
	if cause := s.session.Cause(); cause == nil || !admission.EndedByStore(cause) {
		return nil
	}
	return s.clientStatus().Err()
}

func (s *stream) Context() context.Context { return s.ctx }

// hasEnded reports whether ended returns an error. Once true, hasEnded stays true.
func (s *stream) hasEnded() bool {
	return s.limitStatus.Load() != nil || admission.EndedByStore(s.session.Cause())
}

func (s *stream) SetHeader(md metadata.MD) error {
	if err := s.ended(); err != nil {
		return err
	}
	return s.ServerStream.SetHeader(md)
}

func (s *stream) SetTrailer(md metadata.MD) {
	if !s.hasEnded() {
		s.ServerStream.SetTrailer(md)
	}
}

func (s *stream) SendHeader(md metadata.MD) error {
	send := func() error { return s.ServerStream.SendHeader(md) }
	if s.mode != interruptible {
		return s.callAbandonable(send)
	}
	if err := s.ended(); err != nil {
		return err
	}
	err := send()
	if ended := s.ended(); ended != nil {
		return ended
	}
	return err
}

// An endedTransport replaces the stream of the transport in the context of a handler whose stream
// has ended. It makes grpc.SetHeader, grpc.SendHeader and grpc.SetTrailer fail. Before the end, the
// context has the stream of the transport itself, because grpc.SetSendCompressor accepts no other
// type.
type endedTransport struct {
	grpc.ServerTransportStream
	stream *stream
}

func (t endedTransport) SetHeader(metadata.MD) error  { return t.stream.ended() }
func (t endedTransport) SendHeader(metadata.MD) error { return t.stream.ended() }
func (t endedTransport) SetTrailer(metadata.MD) error { return t.stream.ended() }

func (s *stream) RecvMsg(m any) error {
	if s.mode != interruptible {
		return s.recvAbandonable(m)
	}
	if err := s.ended(); err != nil {
		return err
	}
	err := s.ServerStream.RecvMsg(m)
	if ended := s.ended(); ended != nil {
		return ended
	}
	return s.countMessage(err)
}

// recvAbandonable is RecvMsg in a goroutine that the handler can abandon. An abandoned call may
// still receive a message, and must not write to m, because the handler may use m again. So the
// call fills a new message. recvAbandonable moves the fields to m only if the call was not
// abandoned.
func (s *stream) recvAbandonable(m any) error {
	target, ok := m.(proto.Message)
	if !ok || reflect.TypeOf(target.ProtoReflect().Interface()) != reflect.TypeOf(m) {
		// m is not a protobuf message. Only the codec of the user can fill m.
		return s.countMessage(s.callAbandonable(func() error { return s.ServerStream.RecvMsg(m) }))
	}
	message := target.ProtoReflect().New()
	err := s.callAbandonable(func() error { return s.ServerStream.RecvMsg(message.Interface()) })
	if err := s.countMessage(err); err != nil {
		return err
	}
	proto.Reset(target)
	to := target.ProtoReflect()
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		to.Set(field, value)
		return true
	})
	to.SetUnknown(message.GetUnknown())
	return nil
}

// countMessage counts a received message as a use of the key, and takes its cost. If the message
// exceeds the rate limit or the credits, countMessage ends the stream. The argument is the error of
// RecvMsg: if it is not nil, countMessage returns it.
func (s *stream) countMessage(err error) error {
	if err != nil || s.onLimit == nil {
		return err
	}
	limited := s.session.Allow()
	if limited == nil {
		limited = s.session.Spend(s.session.Context(), s.cost)
	}
	// While Spend waited for the storage, the stream may have ended.
	if ended := s.ended(); ended != nil || limited == nil {
		return ended
	}
	if err := s.session.Context().Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	s.limitStatus.CompareAndSwap(nil, s.onLimit(limited))
	if s.mode == interruptible {
		_ = s.transport.WriteStatus(s.limitStatus.Load())
	}
	return s.ended()
}

func (s *stream) SendMsg(m any) error {
	if s.mode != interruptible {
		return s.callAbandonable(func() error { return s.ServerStream.SendMsg(m) })
	}
	if err := s.ended(); err != nil {
		return err
	}
	err := s.ServerStream.SendMsg(m)
	if ended := s.ended(); ended != nil {
		return ended
	}
	return err
}

// callAbandonable runs f in a new goroutine and returns the error of f. If the stream ends with its
// key before f returns, callAbandonable returns immediately, and f continues alone. If f panics,
// callAbandonable panics with the same value.
func (s *stream) callAbandonable(f func() error) error {
	if err := s.ended(); err != nil {
		return err
	}
	type result struct {
		err      error
		panicked any
	}
	results := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			r.panicked = recover()
			results <- r
		}()
		r.err = f()
	}()
	done := s.session.Context().Done()
	for {
		select {
		case r := <-results:
			if r.panicked != nil {
				panic(r.panicked)
			}
			if err := s.ended(); err != nil {
				return err
			}
			return r.err
		case <-done:
			if err := s.ended(); err != nil {
				return err
			}
			done = nil // the caller has ended the call, and f will return
		}
	}
}
