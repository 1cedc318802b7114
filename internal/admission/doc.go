// Package admission has what the Authenticators for gRPC and for net/http share: where the
// credential of a call is, the address of the caller behind proxies, the limit of failures, the
// reasons that callers and operators get, and the log of refusals. Package admission knows neither
// gRPC nor net/http.
package admission

// KeyContext is the context key for the *keystore.Key of a call. A context type of an Authenticator
// returns the key from its method Value, so that interceptor.FromContext finds the key.
type KeyContext struct{}

// SeenContext is the context key that marks the call of an Authenticator. The value is not nil. A
// second Authenticator finds the mark, and no credential.
type SeenContext struct{}
