// Package interceptor protects a gRPC server with API keys. The interceptors read the key from the
// metadata of each call, ask a key store, and give the record of the key to the handler. When a key
// is revoked, the streams that the key opened end.
//
//	store, err := keystore.Open("keys", nil)
//	auth, err := interceptor.New(store, interceptor.Require("/orders.v1.Orders/Get", "orders:read"))
//	server := grpc.NewServer(auth.ServerOptions()...)
//
// A handler finds the key with [FromContext], and gets no credential. Clients send the key with
// package [github.com/grpc-api-key/grpc-api-key/interceptor/keycreds].
//
// Every method needs a key, unless [Public] names the method. Health checks and reflection need a
// key too, and so do methods that a grpc.UnknownServiceHandler serves. gRPC itself answers every
// other unknown method with Unimplemented, with or without a key. gRPC runs no interceptor for a
// hand-written grpc.StreamDesc that sets neither ClientStreams nor ServerStreams.
//
// Package [github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys] protects net/http handlers
// with the same keys, and the module interceptor/connectkeys protects Connect handlers.
//
// # Statuses
//
// A refused caller gets a status with one
// [google.golang.org/genproto/googleapis/rpc/errdetails.ErrorInfo]. The domain of the ErrorInfo is
// github.com/grpc-api-key/grpc-api-key. The code and the reason are:
//
//	case                                               code               reason
//	no credential                                      Unauthenticated    CREDENTIALS_MISSING
//	a key without a scheme, where one is needed        Unauthenticated    CREDENTIALS_SCHEME_MISSING
//	a scheme that the header does not accept           Unauthenticated    CREDENTIALS_SCHEME_INVALID
//	several credentials                                Unauthenticated    CREDENTIALS_SEVERAL
//	a malformed, unknown or wrong key,
//	a key that is revoked, expired, disabled, not yet
//	valid, or used from a network that is not allowed  Unauthenticated    API_KEY_INVALID
//	plaintext, and the server has RequireTLS           Unauthenticated    INSECURE_TRANSPORT
//	a stream whose key was revoked while it was open,
//	or got another secret without a grace period       Unauthenticated    API_KEY_REVOKED
//	a stream whose key, or whose old secret with its
//	grace period, expired while the stream was open    Unauthenticated    API_KEY_EXPIRED
//	a stream whose key was disabled, or got a later
//	beginning, while the stream was open               Unauthenticated    API_KEY_INVALID
//	a stream whose key was narrowed while it was open  Unavailable        API_KEY_CHANGED *
//	the key lacks a scope                              PermissionDenied   INSUFFICIENT_SCOPE
//	RequireRules, and the method has no rule           PermissionDenied   METHOD_HAS_NO_RULE
//	the key exceeds its RateLimit                      ResourceExhausted  RATE_LIMIT_EXCEEDED *
//	the key has too few credits                        ResourceExhausted  CREDITS_EXHAUSTED *
//	LimitFailures: too many failures from the address  ResourceExhausted  AUTH_THROTTLED *
//	the store is closed, failed, did not answer, or is
//	out of contact with the other processes            Unavailable        AUTH_BACKEND_UNAVAILABLE *
//	the server has two Authenticators in a row         Internal           AUTHENTICATED_TWICE
//	the caller cancelled the call                      Canceled
//	the deadline of the caller has passed              DeadlineExceeded
//
// The reasons with an asterisk come with a RetryInfo. CREDITS_EXHAUSTED comes with a RetryInfo only
// if a refill will end the refusal. A key is narrowed if the key loses a scope, or
// gets stricter allowed networks, a stricter rate limit or an earlier expiry.
//
// The ErrorInfo of INSUFFICIENT_SCOPE has the scopes of the rule in the metadata entry "scopes",
// separated by spaces, and the text of the status names the scopes too. The key needs all of these
// scopes, or one of them, as the rule requires.
//
// All bad keys get the same text, so that a caller cannot find out which keys exist. Each mistake
// in the syntax of a credential has a reason and a text for itself, because such a mistake says
// nothing about any key. A fault of the server never looks like a bad key.
//
// # Rules
//
// Each method has at most one rule. The most specific rule counts, in this order:
//
//  1. a rule of Public, [Optional], [AnyKey], [Require] or [RequireAny] for the method
//  2. a rule of [RulesFrom]
//  3. a rule of Public, Optional or AnyKey for the service
//
// A method without a rule takes any valid key, even a key without scopes. With [RequireRules], a
// method without a rule refuses every caller. The name in a rule must be exactly the name that
// clients call; [Authenticator.Check] finds misspelt names. [keystore.Key.HasScope] describes the
// scopes of a key and their wildcards.
//
// [Cost] is no rule, and sets how many credits a call costs. The credits are taken after all
// checks.
//
// # The credential
//
// A call carries exactly one credential, in one of the accepted headers. The interceptor refuses a
// call with two credentials, even if the two are equal. (gRPC sends the credentials of a connection
// and the credentials of a call.) The incoming metadata that handlers and inner interceptors see do
// not contain the credential.
//
// # Streams
//
// After Revoke has returned, RecvMsg delivers no message to the handler of a stream, SendMsg
// accepts none, and the context of the stream is cancelled. A RecvMsg or SendMsg that is blocked
// returns the error. The client gets Unauthenticated, even if the handler does not return. The
// transport may still deliver messages that SendMsg accepted before. SetHeader, SendHeader and
// SetTrailer have no effect after Revoke has returned. The same is true of the functions of package
// grpc that take the context of the stream.
//
// Under [grpc.Server.ServeHTTP], and on a transport other than the one of grpc-go, RecvMsg and
// SendMsg may return before the call to the transport returns. SendMsg may then still read the
// message, as gRPC allows. RecvMsg does not write to a protobuf message after RecvMsg has returned.
// RecvMsg may still write to a message of another kind: do not use such a message after an error.
//
// A handler that panics after the end of its stream does not change what the client gets: the
// client already has the status. A panic recovery outside the Authenticator still sees the panic
// and counts an error.
//
// # Unary calls
//
// A unary call that was accepted runs to completion. With [CancelUnary], the call ends when its key
// does, as a stream does, and the client gets the status that the table lists for streams.
//
// # Why a call was refused
//
// [LogRefusals] logs each refusal with the reason, the ID of the key, the method and the address of
// the caller. [MapErrors] installs a function that gets the same facts as a [Refusal]. [Observe]
// installs functions that count or trace the refused calls.
//
// # Shutdown
//
// [Shutdown] stops a server and its store in the right order: no valid call fails, and every stream
// ends. If the store is closed first, the server refuses every call until the server has stopped.
// [WatchHealth] reports to probes that a store has stopped, or is out of contact with the other
// processes of the store.
//
// # Order of interceptors
//
// Put the Authenticator after panic recovery and before every interceptor that logs metadata. Stats
// handlers (of OpenTelemetry, for example) and binary logging see the metadata of a call before any
// interceptor runs. The binary log of gRPC leaves out the header authorization and no other header.
// For this reason, authorization is the default header.
//
// gRPC reads and decompresses the request of a unary call before any interceptor runs.
// [Authenticator.Tap] refuses calls without a plausible key before gRPC reads the request.
package interceptor
