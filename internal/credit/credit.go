// Package credit carries the cost of a call in a context, from the interceptor to the store.
package credit

// A Key is the context key of the cost of a call in credits, an int64.
type Key struct{}
