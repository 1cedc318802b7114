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

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/failures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Verifier accepts or denies tokens. The usual Verifier is a *keystore.Store. The methods must be
// safe for concurrent use. If the error is nil, no other result may be nil; otherwise the
// interceptor refuses the call as Unavailable and logs the fault. The text of an error must not
// contain the token.
type Verifier interface {
	// Verify returns the key for the token. An error that wraps keystore.ErrDenied means that the
	// token is not valid now. A *keystore.RateLimitError or a *keystore.CreditsError means that the
	// key is valid, but was used too often. Any other error means that the Verifier cannot decide.
	Verify(ctx context.Context, token string) (*keystore.Key, error)
	// Bind opens a session for a stream, for a token that Verify would accept. The errors are those
	// of Verify, and keystore.ErrNarrowed if the caller has to try again. The Authenticator closes
	// the session. When the key no longer permits the stream, the session ends with a cause that
	// wraps keystore.ErrDenied or keystore.ErrNarrowed. If the Verifier can no longer decide, the
	// cause wraps keystore.ErrClosed or keystore.ErrUnavailable. keystore.NewSession makes a
	// session without a store.
	Bind(ctx context.Context, token string) (*keystore.Session, error)
}

// An Authenticator checks the API keys of calls. Call New to get an Authenticator, and give its
// ServerOptions to grpc.NewServer. An Authenticator is immutable and safe for concurrent use.
type Authenticator struct {
	verifier    Verifier
	credentials credentialReader
	rules       ruleSet
	proxies     admission.Proxies
	failures    *failures.Limit // nil: failures are not limited
	mapper      ErrorMapper     // nil: callers get the default status
	log         admission.Log
	observers   observers
	syntax      syntaxStatuses

	limitMessages, cancelUnary bool

	unaryInUse, streamInUse atomic.Bool // Unary or Stream was called
}

// New returns an Authenticator that verifies tokens with v. For most servers, v is a
// *keystore.Store and no option is needed. An error names the wrong option and the reason. New
// returns an error if v is nil, or if v contains a nil pointer such as (*keystore.Store)(nil).
func New(v Verifier, opts ...Option) (*Authenticator, error) {
	if isNil(v) {
		return nil, fmt.Errorf("interceptor: New: the verifier is nil (type %T)", v)
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
		log:           admission.Log{Logger: c.logger},
		observers:     c.observers,
		syntax:        newSyntaxStatuses(c.credentials.headers),
		limitMessages: c.limitMessages,
		cancelUnary:   c.cancelUnary,
	}, nil
}

// isNil reports whether v is nil, or contains a nil pointer, map, function, channel or slice.
func isNil(v any) bool {
	switch r := reflect.ValueOf(v); r.Kind() {
	case reflect.Invalid:
		return true
	case reflect.Pointer, reflect.Map, reflect.Func, reflect.Chan, reflect.Slice,
		reflect.UnsafePointer:
		return r.IsNil()
	default:
		return false
	}
}

// method returns the full method name that the client called, for a unary call. (For a stream, info
// has this name.) The name in UnaryServerInfo comes from generated code, and is wrong if the
// service is registered under another name.
func (a *Authenticator) method(ctx context.Context, info *grpc.UnaryServerInfo) string {
	if len(a.rules.methods)+len(a.rules.services)+len(a.rules.costs) > 0 {
		if m, ok := grpc.Method(ctx); ok && m != "" {
			return m
		}
	}
	return info.FullMethod
}

// Unary returns the interceptor for unary calls. This interceptor does not protect streams: use
// ServerOptions, which returns both interceptors, or use Stream too. If the key is revoked while
// the handler runs, the handler runs to completion, unless the option CancelUnary is set.
func (a *Authenticator) Unary() grpc.UnaryServerInterceptor {
	a.unaryInUse.Store(true)
	return func(
		ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
	) (any, error) {
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
			return nil, a.refusalStatus(call, method, true, err).Err()
		}
		call.key = key
		return handler(call, req)
	}
}

// verify returns the key of a unary call, or the reason why the call is refused.
func (a *Authenticator) verify(call *callContext, r rule) (*keystore.Key, error) {
	text, err := a.credentialFor(call, r)
	if err != nil {
		return nil, err
	}
	key, err := a.verifier.Verify(freeContext{call}, text)
	if err == nil && key == nil {
		err = admission.ErrNoKey
	}
	if err != nil {
		return nil, a.countFailure(call, a.withKeyID(text, err))
	}
	if err := r.allows(key); err != nil {
		return nil, err
	}
	if r.cost == 0 || !key.Metered() {
		return key, nil
	}
	if err := key.Spend(payment{call}, r.cost); err != nil {
		return nil, &Refusal{KeyID: key.ID, err: err}
	}
	if !call.waited {
		return key, nil
	}
	// While Spend waited for the storage, the key may have been narrowed, or may have expired.
	if key, err = a.verifier.Verify(payment{call}, text); err == nil && key == nil {
		err = admission.ErrNoKey
	}
	if err != nil {
		return nil, a.countFailure(call, a.withKeyID(text, err))
	}
	return key, r.allows(key)
}

// credentialFor returns the credential of a call. It returns an error if the method requires a rule
// and has none, or if too many calls from the same address have failed.
func (a *Authenticator) credentialFor(call *callContext, r rule) (string, error) {
	if r.missing {
		return "", admission.ErrNoRule
	}
	if a.failures != nil {
		if err := admission.CheckFailures(a.failures, a.clientAddr(call.Context)); err != nil {
			return "", err
		}
	}
	text, err := a.credentials.credential(call)
	if errors.Is(err, admission.ErrMissing) && call.Context.Value(admission.SeenContext{}) != nil {
		err = admission.ErrTwice
	}
	if err != nil {
		return "", a.countFailure(call, err)
	}
	return text, nil
}

// countFailure returns err. If the caller is to blame for err, countFailure first counts a failure
// for the address of the caller.
func (a *Authenticator) countFailure(call *callContext, err error) error {
	if a.failures != nil && a.defaultStatus(call.Context, err).Code() == codes.Unauthenticated {
		a.failures.Add(a.clientAddr(call.Context))
	}
	return err
}

// Stream returns the interceptor for streams. A stream ends when its key is revoked or expires.
// This interceptor does not protect unary calls: use ServerOptions, which returns both
// interceptors, or use Unary too.
func (a *Authenticator) Stream() grpc.StreamServerInterceptor {
	a.streamInUse.Store(true)
	return func(
		srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler,
	) error {
		r := a.rules.forMethod(info.FullMethod)
		call := &callContext{Context: ss.Context(), auth: a}
		if a.needsNoKey(call.Context, r) {
			return handler(srv, &publicStream{ss, call})
		}
		known := srv != nil // gRPC gives an UnknownServiceHandler no service
		session, err := a.bind(call, r)
		if err != nil {
			return a.refusalStatus(call, info.FullMethod, known, err).Err()
		}
		defer session.Close()
		s := a.newStream(ss, session, call, info.FullMethod, known)
		s.cost = r.cost
		defer s.finish()
		err = handler(srv, s)
		if ended := s.ended(); ended != nil {
			return ended
		}
		return err
	}
}

// bind verifies the credential of a call and opens a session. The caller must close the session
// when the handler has returned.
func (a *Authenticator) bind(call *callContext, r rule) (*keystore.Session, error) {
	text, err := a.credentialFor(call, r)
	if err != nil {
		return nil, err
	}
	session, err := a.verifier.Bind(freeContext{call}, text)
	if err == nil && (session == nil || session.Key() == nil || session.Context() == nil) {
		err = admission.ErrNoKey
		if session != nil {
			session.Close()
		}
	}
	if err != nil {
		return nil, a.countFailure(call, a.withKeyID(text, err))
	}
	key := session.Key()
	err = r.allows(key)
	if err == nil {
		if err = session.Spend(call, r.cost); err != nil {
			err = &Refusal{KeyID: key.ID, err: err}
		}
	}
	if err != nil {
		session.Close()
		return nil, err
	}
	return session, nil
}

// ServerOptions returns both interceptors as options for grpc.NewServer. The interceptors run after
// those of grpc.UnaryInterceptor and grpc.StreamInterceptor, and in order among the chained
// interceptors. Give the options of one Authenticator to a server, once. The first Authenticator
// removes the credential, so a second one refuses every call with Internal, AUTHENTICATED_TWICE.
func (a *Authenticator) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(a.Unary()),
		grpc.ChainStreamInterceptor(a.Stream()),
	}
}

// secure reports whether the connection of a call has privacy and integrity. A connection that does
// not state its security level counts as insecure. credentials.CheckSecurityLevel would accept such
// a connection.
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
