package interceptor

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Verifier decides about tokens, as *keystore.Store does. Its methods are safe for concurrent
// use. With a nil error, no other result may be nil: otherwise the call is refused as Unavailable,
// and logged. The text of an error must not hold the token.
type Verifier interface {
	// Verify returns the key that a token is the text of, or an error; one that wraps keystore.ErrDenied denies it.
	Verify(ctx context.Context, token string) (*keystore.Key, error)
	// Bind is Verify for a stream. When the key no longer admits it, the returned context is cancelled with a cause
	// that wraps keystore.ErrDenied or ErrChanged, or keystore.ErrClosed or ErrUnavailable when nobody can tell any
	// more.
	Bind(ctx context.Context, token string) (context.Context, *keystore.Key, context.CancelFunc, error)
}

// An Authenticator admits calls by API key. New makes one; it does not change afterwards, and is safe for concurrent
// use.
type Authenticator struct {
	verifier    Verifier
	credentials credentialReader
	rules       ruleSet
	proxies     proxies
	failures    *failures   // nil: not limited
	mapper      ErrorMapper // nil: none
	log         refusalLog
	syntax      syntaxStatuses

	limitMessages, cancelUnary bool

	unaryInUse, streamInUse atomic.Bool // somebody asked for the interceptor
}

// New returns an Authenticator that asks v. An error says which option is wrong, and why. New also
// refuses a v that is nil, or that holds a nil pointer such as (*keystore.Store)(nil).
func New(v Verifier, opts ...Option) (*Authenticator, error) {
	if isNil(v) {
		return nil, fmt.Errorf("interceptor: the verifier is nil: its type is %T", v)
	}
	c, err := newConfig(opts)
	if err != nil {
		return nil, fmt.Errorf("interceptor: %w", err)
	}
	return &Authenticator{
		verifier:      v,
		credentials:   c.credentials,
		rules:         c.rules,
		proxies:       c.proxies,
		failures:      c.failures,
		mapper:        c.mapper,
		log:           refusalLog{logger: c.logger},
		syntax:        newSyntaxStatuses(c.credentials.headers[0]),
		limitMessages: c.limitMessages,
		cancelUnary:   c.cancelUnary,
	}, nil
}

// isNil reports whether an interface is nil, or holds a nil pointer, map, function or the like.
func isNil(v any) bool {
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Invalid:
		return true
	case reflect.Pointer, reflect.Map, reflect.Func, reflect.Chan, reflect.Slice, reflect.UnsafePointer:
		return r.IsNil()
	default:
		return false
	}
}

// method returns the full name under which a unary method was called, as that of a stream is. That of info is what
// generated code says, also of a service that is registered under another name.
func (a *Authenticator) method(ctx context.Context, info *grpc.UnaryServerInfo) string {
	if len(a.rules.methods)+len(a.rules.services) > 0 {
		if m, ok := grpc.Method(ctx); ok && m != "" {
			return m
		}
	}
	return info.FullMethod
}

// Unary returns the interceptor for unary calls. On a server that has no other interceptor of this
// Authenticator, streams need no key: use Stream too, or ServerOptions, which is both. A key that
// is revoked while the handler runs interrupts the handler only with CancelUnary.
func (a *Authenticator) Unary() grpc.UnaryServerInterceptor {
	a.unaryInUse.Store(true)
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		method := a.method(ctx, info)
		r := a.rules.forMethod(method)
		call := &callContext{Context: ctx, auth: a}
		if a.needsNoKey(ctx, r) {
			return handler(call, req)
		}
		if a.cancelUnary {
			return a.callBound(call, r, method, req, handler)
		}
		key, err := a.verify(call, r)
		if err != nil {
			return nil, a.refusalStatus(call, method, err).Err()
		}
		call.key = key
		return handler(call, req)
	}
}

func (a *Authenticator) verify(call *callContext, r rule) (*keystore.Key, error) {
	text, err := a.credentialFor(call, r)
	if err != nil {
		return nil, err
	}
	key, err := a.verifier.Verify(call, text)
	if err == nil && key == nil {
		err = errNoKey
	}
	if err != nil {
		return nil, a.countFailure(call, withKeyID(text, err))
	}
	return key, r.allows(key)
}

// credentialFor returns the credential of a call, unless the method has no rule, or too many of its address
// have failed.
func (a *Authenticator) credentialFor(call *callContext, r rule) (string, error) {
	if r.missing {
		return "", errNoRule
	}
	if a.failures != nil {
		if err := a.failures.check(a.proxies.clientAddr(call.Context)); err != nil {
			return "", err
		}
	}
	text, err := a.credentials.credential(call.Context)
	if errors.Is(err, errMissing) && call.Context.Value(callKey{}) != nil {
		err = errTwice
	}
	if err != nil {
		return "", a.countFailure(call, err)
	}
	return text, nil
}

// countFailure counts a failure that is the caller's, and returns it.
func (a *Authenticator) countFailure(call *callContext, err error) error {
	if a.failures != nil && a.defaultStatus(call.Context, err).Code() == codes.Unauthenticated {
		a.failures.add(a.proxies.clientAddr(call.Context))
	}
	return err
}

// Stream returns the interceptor for streams. One whose key is revoked or expires ends. On a server
// that has no other interceptor of this Authenticator, unary calls need no key: use Unary too, or
// ServerOptions, which is both.
func (a *Authenticator) Stream() grpc.StreamServerInterceptor {
	a.streamInUse.Store(true)
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		r := a.rules.forMethod(info.FullMethod)
		call := &callContext{Context: ss.Context(), auth: a}
		if a.needsNoKey(call.Context, r) {
			return handler(srv, &publicStream{ss, call})
		}
		bound, key, release, err := a.bind(call, r)
		if err != nil {
			return a.refusalStatus(call, info.FullMethod, err).Err()
		}
		defer release()
		s := a.newStream(ss, bound, call, key, info.FullMethod)
		defer s.finish()
		err = handler(srv, s)
		if ended := s.ended(); ended != nil {
			return ended
		}
		return err
	}
}

func (a *Authenticator) bind(call *callContext, r rule) (context.Context, *keystore.Key, context.CancelFunc, error) {
	text, err := a.credentialFor(call, r)
	if err != nil {
		return nil, nil, nil, err
	}
	bound, key, release, err := a.verifier.Bind(call, text)
	if err == nil && (bound == nil || key == nil || release == nil) {
		err = errNoKey
		if release != nil {
			release()
		}
	}
	if err != nil {
		return nil, nil, nil, a.countFailure(call, withKeyID(text, err))
	}
	if err := r.allows(key); err != nil {
		release()
		return nil, nil, nil, err
	}
	return bound, key, release, nil
}

// ServerOptions returns both interceptors as options for grpc.NewServer, behind any that
// grpc.UnaryInterceptor and grpc.StreamInterceptor set, and in their place among the chained ones.
// Give them to a server once: a second Authenticator does not find the credential, and refuses the
// calls with Internal, AUTHENTICATED_TWICE.
func (a *Authenticator) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ChainUnaryInterceptor(a.Unary()), grpc.ChainStreamInterceptor(a.Stream())}
}

// secure reports whether nobody on the way can read or change what a call carries. What does not say that it is
// secure is not; credentials.CheckSecurityLevel lets that pass.
func secure(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	info, ok := p.AuthInfo.(interface {
		GetCommonAuthInfo() credentials.CommonAuthInfo
	})
	return ok && info.GetCommonAuthInfo().SecurityLevel == credentials.PrivacyAndIntegrity
}
