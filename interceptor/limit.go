package interceptor

import "github.com/grpc-api-key/grpc-api-key/internal/admission"

// LimitMessages applies the RateLimit and the credits of a key to each message that a stream
// receives, not only to the opening of the stream. A stream that exceeds the limit, or has no
// credits left, ends with ResourceExhausted. Without LimitMessages, a stream counts as one use of
// the key.
func LimitMessages() Option {
	return Option{func(c *config) error {
		c.limitMessages = true
		return nil
	}}
}

// LimitFailures limits the failed calls from one address. A call fails if the call is refused as
// Unauthenticated, also if the call has no credential. An address may fail burst times in a row,
// and perSecond times per second in the long run. After that, the server refuses every call from
// the address with ResourceExhausted, even a call with a valid key, and does not ask the store. New
// returns an error unless perSecond is a finite number above 0 and burst is 1 or more.
//
// The limit counts addresses (for IPv6, networks of 64 bits), never keys. So an attacker cannot
// lock out the owner of a key from another address. With a proxy in front of the server, give
// TrustProxy or TrustProxyTransport too, or all callers of the proxy share one limit. LimitFailures
// is off by default: a key cannot be guessed with or without it. LimitFailures saves the work of
// the refusals.
//
// All callers without a known address share one limit: callers over a unix socket or bufconn, and
// callers whose trusted proxy sent no address. So one of these callers can use up the limit for the
// others.
//
// LimitFailures remembers the last 65,536 addresses that failed.
func LimitFailures(perSecond float64, burst int) Option {
	return Option{func(c *config) error {
		var err error
		c.failures, err = admission.NewFailures(perSecond, burst)
		return err
	}}
}
