// Package interceptor admits callers of a gRPC server by API key: it reads the key from the metadata of each call,
// asks a key store, and gives the handler the key's record. When a key is revoked, the streams that were opened with
// it end.
//
//	auth, err := interceptor.New(store)
//	server := grpc.NewServer(auth.ServerOptions()...)
//
// Every method needs a key, also those of health checks and reflection, and those that a grpc.UnknownServiceHandler
// serves, unless [Public] names it. Whatever else the server does not know, gRPC itself answers with Unimplemented, to
// everybody. It runs no interceptor for a grpc.StreamDesc, written by hand, that sets neither ClientStreams nor
// ServerStreams.
//
// # What a caller is told
//
// A refusal carries one [google.golang.org/genproto/googleapis/rpc/errdetails.ErrorInfo] with the domain
// github.com/grpc-api-key/grpc-api-key and a reason:
//
//	case                                                  code              reason
//	no credential                                         Unauthenticated   CREDENTIALS_MISSING
//	a key without a scheme, where one is needed           Unauthenticated   CREDENTIALS_SCHEME_MISSING
//	another scheme than the header accepts                Unauthenticated   CREDENTIALS_SCHEME_INVALID
//	several credentials                                   Unauthenticated   CREDENTIALS_SEVERAL
//	a malformed, unknown or wrong key,
//	a key that is revoked, expired, disabled, not yet
//	valid, or used from a network that is not allowed     Unauthenticated   API_KEY_INVALID
//	plaintext, and the server has RequireTLS              Unauthenticated   INSECURE_TRANSPORT
//	a stream whose key was revoked while it was open,
//	or got another secret without a grace                 Unauthenticated   API_KEY_REVOKED
//	a stream whose key expired while it was open, or the
//	secret that it was opened with, with its grace        Unauthenticated   API_KEY_EXPIRED
//	a stream whose key was disabled while it was open     Unauthenticated   API_KEY_INVALID
//	a stream whose key was changed to admit less          Unavailable       API_KEY_CHANGED, with RetryInfo
//	the key lacks a scope                                 PermissionDenied  INSUFFICIENT_SCOPE, with scopes
//	the method has no rule, and the server RequireRules   PermissionDenied  METHOD_HAS_NO_RULE
//	the key is used more often than its RateLimit         ResourceExhausted RATE_LIMIT_EXCEEDED, with RetryInfo
//	too many failures from the address: LimitFailures     ResourceExhausted AUTH_THROTTLED, with RetryInfo
//	the store is closed, failed, or did not answer        Unavailable       AUTH_BACKEND_UNAVAILABLE, with RetryInfo
//	the server has two Authenticators one after another   Internal          AUTHENTICATED_TWICE
//	the caller's own cancellation or deadline             Canceled, DeadlineExceeded
//
// The ErrorInfo of INSUFFICIENT_SCOPE has the scopes that the method requires (all of them, or one, as its rule says) in
// its metadata, under "scopes" and separated by spaces.
//
// One text stands for every way in which a key can be bad, so that nobody learns from it which keys
// exist. Each mistake in the syntax of a credential has its own reason and text, because such a
// mistake says nothing about any key. Trouble of the server's never reads as a bad key.
//
// # Rules
//
// Each method has at most one rule, and the most exact one counts: that of Public, [Optional],
// [AnyKey], [Require] or [RequireAny] for the method, or else that of [RulesFrom], or else that of
// Public, Optional or AnyKey for its service, or else that any valid key will do, also one without
// scopes. With [RequireRules], nobody may call a method without a rule. Names are those that
// callers call, and match to the letter; [Authenticator.Check] finds those that are misspelt. Which
// scopes a key has, wildcards included, is said at [keystore.Key.HasScope].
//
// # The credential
//
// A call carries exactly one, in one of the accepted headers; a second one is refused, even an equal one. (In gRPC,
// the credentials of a connection and those of a call add up.) Handlers, and interceptors further in, do not see it
// in the incoming metadata.
//
// # Streams
//
// Once Revoke has returned, RecvMsg gives the handler of a stream no further message, SendMsg takes
// none, and its context is cancelled. A handler that is blocked in either comes back with the
// error, and the caller is told Unauthenticated, even if the handler goes on with something else.
// Messages that SendMsg took before are on their way and may still arrive. SetHeader, SendHeader
// and SetTrailer have no effect after Revoke has returned, and neither have the functions of
// package grpc with the context of the stream.
//
// Under [grpc.Server.ServeHTTP], and on a transport that is not grpc-go's, RecvMsg and SendMsg may
// return before the call to the transport returns. SendMsg may then still read its message, as gRPC
// allows. RecvMsg does not write to a protobuf message after RecvMsg has returned. RecvMsg may
// still write to a message of another kind: do not use such a message again after an error.
//
// # Why a call was refused
//
// [LogRefusals] logs each refusal with its reason, the ID of the key, the method and the address of
// the caller. An [ErrorMapper] gets the same as a [Refusal].
//
// A unary call that was admitted runs to its end. With [CancelUnary] it ends with its key, as a
// stream does, and its caller is told what the table says of streams.
//
// # The end of a server
//
// [Shutdown] stops a server and its store in the order in which no good call fails and every stream
// ends. A store that is closed first refuses every call until the server has stopped. [WatchHealth]
// tells probes that a store has stopped.
//
// # Order
//
// Put the Authenticator behind panic recovery and before whatever logs metadata. Stats handlers, of OpenTelemetry for
// example, and binary logging see a call's metadata before any interceptor does; gRPC's binary log leaves out
// authorization and no other header, which is why it is the default.
//
// gRPC reads and decompresses the request of a unary call before any interceptor runs.
// [Authenticator.Tap] refuses calls without a plausible key before that.
//
// A handler that panics after its stream was cut changes nothing for the caller, who was told before; a recovery
// outside the Authenticator counts its panic as an error all the same.
package interceptor
