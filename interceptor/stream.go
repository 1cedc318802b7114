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

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A publicStream is the stream of a public method: only its context differs.
type publicStream struct {
	grpc.ServerStream
	ctx *callContext
}

func (s *publicStream) Context() context.Context { return s.ctx }

// A stream ends with its key.
//
// gRPC has no way to end a stream from the server's side other than to return from its handler (grpc-go issues 465
// and 3909), and a handler that is blocked in RecvMsg or SendMsg does not return. Cancelling a context that is
// derived from the stream's does not unblock it, and cancelling the transport's own, which a tap handle can, tells
// the client Canceled. What does both, unblock and tell the truth, is to write the stream's status, as gRPC itself
// does at the end of a handler, and from whatever goroutine meets an error in RecvMsg or SendMsg: the transport
// refuses everything after it. The transport's stream has a method for that, WriteStatus, which is exported though
// its type is internal. It costs nothing until the key is revoked, leaves the handler on its own goroutine, where its
// panics belong, and reaches the caller even if the handler never comes back.
//
// Where a transport has no such method (another one than grpc-go's, or a later version of that), or where it does not
// come through a write that is held up by flow control (grpc.Server.ServeHTTP), each RecvMsg and SendMsg runs in a
// goroutine that the handler can walk away from. That takes four allocations a message and, in a ping-pong on loopback, 5
// to 15 µs (BenchmarkStreamMessage). The handler then ends the stream by returning, and the abandoned call with it. Under
// ServeHTTP the status is written from outside as well, for the client of a handler that does not return; nothing waits
// for that, since a client that does not read may hold it up for as long as the connection lasts.
//
// The invariants:
//
//  1. bound is done before Revoke returns. RecvMsg and SendMsg look at it before they begin, and again when they are
//     through: no call that begins after Revoke returned gets a message through, and none that was blocked then
//     reports success. SendHeader does the same. SetHeader and SetTrailer look before they begin. So do grpc.SetHeader,
//     grpc.SendHeader and grpc.SetTrailer with the handler's context. A grpc.ServerTransportStream that the handler
//     has taken from its context before does not look.
//  2. The client is told one status, made from the cause, whoever asks for it first. A SendMsg that looked before bound
//     was done may still get its message out before the status; behind it the transport takes none.
//
// The mode of a stream says which of these ways the stream goes:
//
//	mode           RecvMsg, SendMsg, SendHeader         a cut                     the end of the handler
//	interruptible  on the handler's goroutine; a cut    the watch writes the      finish waits for the watch, or
//	               unblocks it                          status                    writes the status itself
//	serveHTTP      in a goroutine, which the handler    the watch writes the      gRPC writes the status; finish
//	               leaves behind at a cut; RecvMsg      status; nobody waits      stops the watch, and does not
//	               fills a message of its own           for that                  wait
//	foreign        as in serveHTTP                      nobody writes a status    gRPC writes the status
type stream struct {
	grpc.ServerStream
	ctx          *callContext
	bound        context.Context
	notifier     endNotifier           // bound; nil if it is not such a one
	clientStatus func() *status.Status // what the client is told of a cut; the same each time

	logEnd func() // logs a cut, once; nil: cuts are not logged

	onLimit     func(error) *status.Status    // what the client is told of too many messages; nil: they are not counted
	limitStatus atomic.Pointer[status.Status] // set when there were

	mode          mode
	transport     statusWriter  // nil in mode foreign
	stopWatch     func() bool   // stops the watch for a cut; nil in mode foreign
	statusWritten chan struct{} // closed when the watch has run; nil in mode foreign
}

// A mode is a way to end a stream, which depends on the transport.
type mode int

const (
	foreign       mode = iota // the transport has no WriteStatus
	serveHTTP                 // WriteStatus does not unblock a write that waits for flow control
	interruptible             // WriteStatus unblocks RecvMsg and SendMsg
)

// A statusWriter is the transport's part of a stream, if that can end the stream from outside.
type statusWriter interface{ WriteStatus(*status.Status) error }

// modeOf returns the mode of a stream with the context.
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

// newStream returns the stream that a handler gets for ss. The context call, for an ErrorMapper,
// does not end with the key.
func (a *Authenticator) newStream(
	ss grpc.ServerStream, bound context.Context, call *callContext, key *keystore.Key, fullMethod string,
) *stream {
	s := &stream{ServerStream: ss, bound: bound}
	s.ctx = &callContext{Context: bound, auth: a, key: key, stream: s}
	s.notifier, _ = bound.(endNotifier)
	refusal := func() *Refusal {
		return a.newRefusal(call, fullMethod, &Refusal{KeyID: key.ID, err: s.cause()})
	}
	s.clientStatus = sync.OnceValue(func() *status.Status {
		return a.mapStatus(call, refusal(), endStatus(s.cause()))
	})
	if a.log.logger != nil {
		s.logEnd = sync.OnceFunc(func() {
			a.log.logRefusal(call, callEnded, refusal(), endStatus(s.cause()).Code())
		})
	}
	if a.limitMessages {
		s.onLimit = func(err error) *status.Status {
			return a.report(call, callEnded, fullMethod, &Refusal{KeyID: key.ID, err: err})
		}
	}
	s.mode, s.transport = modeOf(ss.Context())
	if s.mode == foreign {
		return s
	}
	s.statusWritten = make(chan struct{})
	s.stopWatch = s.onEnd(func() {
		defer close(s.statusWritten)
		if endedByStore(s.cause()) {
			// An error means that the connection is gone, and the handler is unblocked by that.
			_ = s.transport.WriteStatus(s.clientStatus())
			s.logIfEnded()
		}
	})
	return s
}

// An endNotifier is a context of a keystore.Store's, which keeps many under one key. It spares the Revoke that ends them all what
// the functions of package context cost: a wait behind the goroutines that those would start.
type endNotifier interface {
	// Cause returns why the store has ended the context, or nil.
	Cause() error
	// OnEnd has f called when it has. Stop reports whether it kept f from being called.
	OnEnd(f func()) (stop func() bool)
}

func (s *stream) onEnd(f func()) (stop func() bool) {
	if s.notifier != nil {
		return s.notifier.OnEnd(f)
	}
	return context.AfterFunc(s.bound, f)
}

// cause returns why bound has ended, or nil.
func (s *stream) cause() error {
	if s.notifier != nil {
		return s.notifier.Cause()
	}
	if s.bound.Err() == nil {
		return nil
	}
	return context.Cause(s.bound)
}

// finish waits until nothing of s runs any more, but for what is written under ServeHTTP. The handler has returned, or
// panicked: then nobody but finish sees to it that the client is told of a cut, if the handler was faster than the watch.
func (s *stream) finish() {
	defer s.logIfEnded()
	switch s.mode {
	case foreign:
	case serveHTTP:
		s.stopWatch()
	case interruptible:
		if !s.stopWatch() {
			<-s.statusWritten
		} else if endedByStore(s.cause()) {
			_ = s.transport.WriteStatus(s.clientStatus())
		}
	}
}

// logIfEnded logs the cut, if there was one, once. Call logIfEnded after the client got the status, because a
// logger may block.
func (s *stream) logIfEnded() {
	if s.logEnd != nil && s.limitStatus.Load() == nil && endedByStore(s.cause()) {
		s.logEnd()
	}
}

// ended returns nil, or, if the key has ended the stream, what the client is told. The end of the caller's own context,
// which is bound's parent, is left to gRPC.
func (s *stream) ended() error {
	if st := s.limitStatus.Load(); st != nil {
		return st.Err()
	}
	if cause := s.cause(); cause == nil || !endedByStore(cause) {
		return nil
	}
	return s.clientStatus().Err()
}

func (s *stream) Context() context.Context { return s.ctx }

// hasEnded reports whether ended returns an error, now and from now on.
func (s *stream) hasEnded() bool { return s.limitStatus.Load() != nil || endedByStore(s.cause()) }

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

// An endedTransport replaces the stream of the transport in the context of a handler after the cut,
// so that grpc.SetHeader, grpc.SendHeader and grpc.SetTrailer fail. Before the cut, the context has
// the stream of the transport itself, because grpc.SetSendCompressor accepts no other type.
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

// recvAbandonable is RecvMsg on a transport where the handler can walk away from a blocked call. An
// abandoned call may still receive a message, and must not write to m, because the handler may use
// m again. So receive gives the call a new message, and moves the content to m only if the call was
// not abandoned.
func (s *stream) recvAbandonable(m any) error {
	target, ok := m.(proto.Message)
	if !ok || reflect.TypeOf(target.ProtoReflect().Interface()) != reflect.TypeOf(m) {
		// Only the user's own codec knows how to fill m.
		return s.countMessage(s.callAbandonable(func() error { return s.ServerStream.RecvMsg(m) }))
	}
	message := target.ProtoReflect().New()
	if err := s.countMessage(s.callAbandonable(func() error { return s.ServerStream.RecvMsg(message.Interface()) })); err != nil {
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

// countMessage takes a received message from the key's rate limit. One too many ends the stream.
func (s *stream) countMessage(err error) error {
	if err != nil || s.onLimit == nil {
		return err
	}
	limited := s.ctx.key.Allow()
	if limited == nil {
		return nil
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

// callAbandonable runs f in a goroutine, and returns what it returns, or sooner if the stream is cut. A panic of f's is the
// caller's.
func (s *stream) callAbandonable(f func() error) error {
	if err := s.ended(); err != nil {
		return err
	}
	type result struct {
		err      error
		panicked any
	}
	done := make(chan result, 1)
	go func() {
		var r result
		defer func() {
			r.panicked = recover()
			done <- r
		}()
		r.err = f()
	}()
	cut := s.bound.Done()
	for {
		select {
		case r := <-done:
			if r.panicked != nil {
				panic(r.panicked)
			}
			if err := s.ended(); err != nil {
				return err
			}
			return r.err
		case <-cut:
			if err := s.ended(); err != nil {
				return err
			}
			cut = nil // the caller went away; f sees that too
		}
	}
}
