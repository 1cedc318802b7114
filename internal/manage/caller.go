// Package manage has what all ways to manage a store share: who may change which key, the answers
// to repeated requests, and the number of keys in each state. Package manage knows nothing of gRPC
// or HTTP.
package manage

import (
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The scopes of keys that manage keys. Admin includes the other two. Write does not include Read.
const (
	Read  = "keys:read"  // see keys and events
	Write = "keys:write" // create, update, rotate, disable, enable and revoke keys
	Admin = "keys:admin" // everything, without a ceiling
)

// A Caller is who manages keys: a user of this machine, or the holder of a key. The zero Caller may
// do nothing.
type Caller struct {
	actor string
	local bool
	key   *keystore.Key
}

// LocalUser returns a Caller who may do everything. The actor is the text for keystore.WithActor.
func LocalUser(actor string) Caller { return Caller{actor: actor, local: true} }

// KeyHolder returns a Caller who may do what the scopes of the key allow.
func KeyHolder(actor string, key *keystore.Key) Caller { return Caller{actor: actor, key: key} }

// Actor returns the text that names the caller in events.
func (c Caller) Actor() string { return c.actor }

// Key returns the caller's own key, or nil.
func (c Caller) Key() *keystore.Key { return c.key }

// Has reports whether the caller may do what needs the scope Read, Write or Admin.
func (c Caller) Has(scope string) bool {
	return c.unlimited() || c.key != nil && c.key.HasScope(scope)
}

// unlimited reports whether no ceiling holds for the caller.
func (c Caller) unlimited() bool {
	return c.local || c.key != nil && c.key.HasScope(Admin)
}

// MayChange returns nil if the caller may change a key with the scopes in any way. Only a caller
// with Admin may change a key with Admin. The error is a *CeilingError.
func (c Caller) MayChange(scopes []string) error {
	if c.unlimited() || !keystore.NewKey(keystore.Spec{Scopes: scopes}).HasScope(Admin) {
		return nil
	}
	return &CeilingError{Scopes: []string{Admin}}
}

// MayGrant returns nil if the caller may put a key with the scopes into force: create, update,
// rotate or enable the key. The caller's own key must have every scope. The error is a
// *CeilingError.
func (c Caller) MayGrant(scopes []string) error {
	if c.unlimited() {
		return nil
	}
	var lacks []string
	for _, scope := range scopes {
		if c.key == nil || !c.key.HasScope(scope) {
			lacks = append(lacks, scope)
		}
	}
	if len(lacks) > 0 {
		return &CeilingError{Scopes: lacks}
	}
	return nil
}

// MayLast returns nil if the caller may give out a secret, or an expiry, that lasts until expiry.
// Zero means forever. The caller's own key must last as long. The error is a *CeilingError.
func (c Caller) MayLast(expiry time.Time) error {
	switch {
	case c.unlimited():
		return nil
	case c.key == nil:
		return &CeilingError{}
	case c.key.ExpiresAt.IsZero():
		return nil
	case expiry.IsZero() || expiry.After(c.key.ExpiresAt):
		return &CeilingError{ExpiresAt: c.key.ExpiresAt}
	default:
		return nil
	}
}

// A CeilingError means that the change would give a key more than the caller's own key has.
type CeilingError struct {
	Scopes    []string  // the scopes that the caller's key lacks; empty: the expiry is too late
	ExpiresAt time.Time // the expiry of the caller's key, if Scopes is empty
}

func (e *CeilingError) Error() string {
	if len(e.Scopes) > 0 {
		return "your own key lacks scopes that the changed key has: " + strings.Join(e.Scopes, " ")
	}
	return "the key would last longer than your own key, which expires at " +
		e.ExpiresAt.UTC().Format(time.RFC3339)
}
