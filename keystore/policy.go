package keystore

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
)

// The functions of this file decide who is admitted. They read the terms of a cachedKey, and never
// cachedKey.key: callers have a pointer to the Key, and can write to it.

// overwritten reports whether a caller has assigned another Key to the cachedKey's key, by *k =
// other or by decoding JSON into the key. HasScope would then answer with the scopes of the other
// Key. So Verify and Bind must not return the key again.
func (e *cachedKey) overwritten() bool { return e.key.grants != &e.grants }

// unlimited reports whether no time, network, rate limit or credits restrict the key.
func (t *terms) unlimited() bool {
	return t.notBefore == 0 && t.expiresAt == 0 && len(t.networks) == 0 &&
		t.limits == nil
}

// stopped returns ErrRevoked or ErrDisabled if the key is revoked or disabled.
func (t *terms) stopped() error {
	switch {
	case t.revoked:
		return ErrRevoked
	case t.disabled:
		return ErrDisabled
	default:
		return nil
	}
}

// permits returns nil if the key now admits the bearer of the secret with this rotation number,
// from the client address of ctx. Otherwise permits returns the reason.
func (t *terms) permits(ctx context.Context, rotation uint32) error {
	if err := t.admits(rotation); err != nil {
		return err
	}
	if len(t.networks) > 0 && !t.allowsFrom(clientaddr.FromContext(ctx)) {
		return ErrNetworkNotAllowed
	}
	return nil
}

// allowsFrom reports whether any of the networks contains the address. No network contains the zero
// Addr.
func (g *grants) allowsFrom(addr netip.Addr) bool {
	return slices.ContainsFunc(g.networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// admits returns nil if the key now admits the bearer of the secret with this rotation number.
// Otherwise admits returns the reason. admits reads the clock only if the key has a beginning, or
// the secret has an end.
func (t *terms) admits(rotation uint32) error {
	if err := t.stopped(); err != nil {
		return err
	}
	switch {
	case rotation != t.rotations && (rotation != t.rotations-1 || t.previous == nil):
		return ErrRevoked // the secret of a context from Bind, replaced after the Bind
	case t.notBefore != 0 && time.Now().UnixNano() < t.notBefore:
		return ErrNotYetValid
	}
	if until := t.untilNanos(rotation); until != 0 && time.Now().UnixNano() >= until {
		return ErrExpired
	}
	return nil
}

// until returns the first moment at which the secret no longer admits its bearer; zero is never.
func (t *terms) until(rotation uint32) time.Time { return fromNanos(t.untilNanos(rotation)) }

func (t *terms) untilNanos(rotation uint32) int64 {
	if p := t.previous; rotation != t.rotations && p != nil &&
		(t.expiresAt == 0 || p.until < t.expiresAt) {
		return p.until
	}
	return t.expiresAt
}

// narrows reports whether a change of a key takes something from its bearer.
func narrows(before, after *terms) bool {
	for _, scope := range before.scopes {
		if !after.hasScope(scope) {
			return true
		}
	}
	had, has := before.networks, after.networks
	if len(has) > 0 && (len(had) == 0 || !within(had, has)) {
		return true
	}
	if has, had := after.limits, before.limits; has != nil && has.narrows(had) {
		return true
	}
	return after.expiresAt != 0 && (before.expiresAt == 0 || after.expiresAt < before.expiresAt)
}

// narrows reports whether the limits take something from the bearer of a key that had other limits,
// or none. Other credits for a key that has credits already do not narrow the key.
func (l *useLimits) narrows(had *useLimits) bool {
	if had == nil {
		return true
	}
	limit, limited := l.rate, had.rate
	return l.since != 0 && had.since == 0 || limit != (RateLimit{}) &&
		(limited == RateLimit{} || limit.PerSecond < limited.PerSecond || limit.Burst < limited.Burst)
}

// within reports whether each network of networks is part of a network of others.
func within(networks, others []netip.Prefix) bool {
	return !slices.ContainsFunc(networks, func(n netip.Prefix) bool {
		return !slices.ContainsFunc(others, func(o netip.Prefix) bool {
			return o.Bits() <= n.Bits() && o.Contains(n.Addr())
		})
	})
}

// covers reports whether granted, a scope of a key, covers scope: see Key.HasScope.
func covers(granted, scope string) bool {
	stem, wild := strings.CutSuffix(granted, "*")
	return granted == scope || wild && strings.HasPrefix(scope, stem)
}
