// Package httpkeys protects net/http handlers with the API keys of package keystore. The keys, the
// reasons of refusals, and the end of a request with its key are those of package
// [github.com/grpc-api-key/grpc-api-key/interceptor], which protects gRPC. Package httpkeys does
// not need gRPC. For Connect handlers, see package connectkeys.
//
//	auth, err := httpkeys.New(store, httpkeys.Public("GET /healthz"))
//	http.ListenAndServe("localhost:8080", auth.Wrap(mux))
//
// Every request needs a key, in the header Authorization after the scheme Bearer, unless a rule
// says otherwise. The handler finds the key with [FromContext], and gets no credential. For
// clients, see [Transport].
//
// # Responses
//
// A refused caller gets a problem of RFC 9457 with a member reason: see [WriteProblem]. The
// statuses and the reasons are:
//
//	case                                                      status  reason
//	no credential                                             401     CREDENTIALS_MISSING
//	a key without a scheme, where one is needed               401     CREDENTIALS_SCHEME_MISSING
//	a scheme that the header does not accept                  401     CREDENTIALS_SCHEME_INVALID
//	several credentials                                       401     CREDENTIALS_SEVERAL
//	a malformed, unknown or wrong key, a key that is revoked,
//	expired, disabled, not yet valid, or used from a network
//	that is not allowed                                       401     API_KEY_INVALID
//	no TLS, and the server has RequireTLS                     401     INSECURE_TRANSPORT
//	the key was revoked, or has expired, before the handler
//	sent anything                                             401     API_KEY_REVOKED, API_KEY_EXPIRED
//	the key lacks a scope                                     403     INSUFFICIENT_SCOPE
//	RequireRules, and the request has no rule                 403     METHOD_HAS_NO_RULE
//	a path that can be read in two ways                       400     PATH_AMBIGUOUS
//	the key exceeds its RateLimit                             429     RATE_LIMIT_EXCEEDED
//	the key has too few credits                               429     CREDITS_EXHAUSTED
//	LimitFailures: too many failures from the address         429     AUTH_THROTTLED
//	the store is closed, failed, did not answer, or is out of
//	contact with the other processes                          503     AUTH_BACKEND_UNAVAILABLE
//	the key was narrowed before the handler sent anything     503     API_KEY_CHANGED
//	two Authenticators in a row                               500     AUTHENTICATED_TWICE
//	the caller cancelled the request                          499
//	the deadline of the request has passed                    504
//
// The statuses 401 and 403 come with WWW-Authenticate (RFC 6750), 429 and 503 with Retry-After. All
// bad keys get the same response, so that a caller cannot find out which keys exist. [WriteErrors]
// installs a function that writes other responses. [LogRefusals] and [Observe] report why.
//
// # Rules
//
// The patterns of [Public], [Optional], [AnyKey], [Require], [RequireAny] and [Cost] are those of
// [http.ServeMux], as in "GET /orders/{id}" or "/admin/". The most specific pattern counts. As in a
// ServeMux, GET matches HEAD too, and a pattern with a slash at the end matches the path without
// the slash. A request that matches no pattern takes any valid key, or, with [RequireRules], none.
// Nothing else finds a misspelt pattern, whose requests then take any valid key: set RequireRules,
// and give AnyKey to what needs no scope.
//
// For HTTP/2 without TLS, set Protocols of [http.Server]. The handler of package
// golang.org/x/net/http2/h2c has to be outside of Wrap: inside, Wrap would check the first request
// of a connection alone.
//
// A rule sees the request as Wrap gets the request: put http.StripPrefix inside. If the handler is
// not a ServeMux, the router may read a path in another way. So a path with the segment "." or
// "..", encoded or not, is refused if there are rules; and so is a path whose rule depends on
// whether %2F is a slash, or on double slashes, and a CONNECT request whose rule depends on the port
// in the host, which a ServeMux keeps for CONNECT alone. Upper and lower case matter. A pattern
// with a host trusts the header Host.
//
// # When a key ends
//
// A key ends when it is revoked, disabled or narrowed, or when it expires. After Revoke has
// returned, no Read of the body and no Write of the response succeeds, and the context of the
// request is cancelled. A Read that is blocked returns within milliseconds. A Write that is
// blocked, because the caller does not read, returns within half a second. Both return an
// [EndedError]. If the handler has sent nothing, the caller gets 401 when the handler returns,
// without the headers that the handler has set. Otherwise the connection is closed (in HTTP/2, the
// stream is reset) when the handler returns, by a panic with [http.ErrAbortHandler], so that the
// caller does not take a part of a response for the whole. A middleware around Wrap that recovers
// from panics must let this one pass.
//
// This is true of each request, short or long, server-sent events and HTTP/2 included. It needs a
// ResponseWriter with deadlines, which that of net/http has. Around Wrap, http.TimeoutHandler hides
// the deadlines: a blocked Read or Write then lasts until the timeout. Inside Wrap, it does no
// harm.
//
// A handler that ignores its context, the body and the ResponseWriter does not end.
//
// # Websockets
//
// A key also ends a connection that a handler has hijacked, whether the handler has returned or
// not. After Revoke has returned, no Read of the connection returns bytes: a Read waits, and drops
// what arrives. When the context of the request ends, the handler has one second to close the
// connection with another status; then the connection is closed. What a handler writes in this
// second still goes to the caller. net/http ends the context when the handler returns, so a handler
// that closes connections with a status must not return before.
//
// The session of the key lasts until the connection is closed: close each connection. The
// connection that Hijack returns has a method NetConn, as a tls.Conn has, for the connection of
// net/http. What a program reads from that connection is not checked. examples/web has both, a
// websocket and server-sent events.
package httpkeys
