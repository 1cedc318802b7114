// Package credit carries the cost of a call in a context, from the interceptor to the store.
package credit

// A Key is the context key of the cost of a call in credits: an int64, or Paid.
type Key struct{}

// Paid is the cost of a call that has taken its credits, and its use of the rate limit, already.
type Paid struct{}

// Waits is the context key of a func() that the store calls before a call waits for credits.
type Waits struct{}
