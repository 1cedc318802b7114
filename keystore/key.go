package keystore

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// A Key describes an API key. A Key holds no secret.
//
// Verify and Bind give the same *Key to many callers, so do not write to its fields. Other
// callers would see the change, and may read the field at the same time. The store does not
// decide by the fields, so a write cannot change who is admitted. Scopes, Metadata and
// AllowedNetworks return copies. The caller may change the copies.
//
// The JSON of a Key has the names of the fields and of the three methods. The JSON leaves out Live
// and times that are zero, and adds the Status as a word. UnmarshalJSON reads this form.
type Key struct {
	// grants is the first field, so that Store.Verify finds grants in memory that Verify reads
	// anyway.
	grants *keyGrants // nil: nothing is granted

	// ID names the key in logs, lists and Revoke. An ID is a UUID in 26 characters of Crockford's
	// base32: a UUIDv7, so that IDs sort by creation. The ID of an imported key is a UUIDv8 that
	// depends on the token, and sorts before all UUIDv7. An ID is no secret.
	ID string
	// Name and Owner are copied from the Spec.
	Name, Owner string
	// Hint is the text of the key without the secret. Show the hint to identify the key to
	// people.
	Hint string
	// CreatedAt is when the key was made. ExpiresAt is the first moment at which the key is no
	// longer admitted. A zero ExpiresAt means never.
	CreatedAt, ExpiresAt time.Time
	// NotBefore is the first moment at which the key is admitted. Zero means immediately.
	NotBefore time.Time
	// RateLimit is copied from the Spec.
	RateLimit RateLimit
	// RevokedAt is when the key was revoked. DisabledAt is when the key was disabled. Zero means
	// that the key is not revoked, or not disabled.
	RevokedAt, DisabledAt time.Time
	// RevokeReason and DisableReason are the reasons given by the calls that took effect.
	RevokeReason, DisableReason string
	// PreviousUntil is the end of the grace period of the previous secret. Zero means that the key
	// has no previous secret. PreviousUntil may be in the past.
	PreviousUntil time.Time
	// LastUsedAt is the minute in which the key was last used. Zero means never. Get, List, Inspect
	// and Preview fill in LastUsedAt.
	//
	// Verify and Bind use a key when they admit a caller. Allow uses a key when Allow returns nil
	// for a key with a RateLimit. A session uses its key until the session ends. The store writes a
	// use within a minute or two, so a crash may lose the last minutes. Query.UnusedSince takes
	// this loss into account.
	LastUsedAt time.Time
	// Live is the number of sessions that are bound to the key now, such as open streams: these
	// sessions end if the key is revoked. Get, List, Inspect and Preview fill in Live. A session
	// counts from Bind until its Close, unless the store ends the session before. If several
	// processes have the store open, Live counts the sessions of this process only.
	Live int
	// Revision is 1 for a new key. Each change adds one.
	Revision uint64
}

// A grants holds the part of a key that a caller could change through a slice or a map. Callers
// never get the grants of a Key, only copies of the parts.
type grants struct {
	scopes   []string
	metadata map[string]string
	networks []netip.Prefix
	quota    *quota // nil: no credits, and no limit, or the key is not from Verify or Bind
}

// A keyGrants leads from a Key to the grants of the Key. Several keys may share grants, but each
// key has its own keyGrants.
type keyGrants struct{ *grants }

// nothing is the grants of a Key without grants.
var nothing grants

// granted returns the key's grants, and never nil.
func (k *Key) granted() *grants {
	if k.grants == nil {
		return &nothing
	}
	return k.grants.grants
}

// NewKey returns a key that no store has, with a copy of the contents of spec. Use NewKey in
// tests of handlers, and in Verifiers other than a Store. NewKey does not check the spec. The
// caller may set the other fields.
func NewKey(spec Spec) *Key {
	return &Key{
		grants: &keyGrants{&grants{
			scopes:   cloned(spec.Scopes),
			metadata: clonedMap(spec.Metadata),
			networks: cloned(spec.AllowedNetworks),
		}},
		Name:      spec.Name,
		Owner:     spec.Owner,
		ExpiresAt: spec.ExpiresAt,
		NotBefore: spec.NotBefore,
		RateLimit: spec.RateLimit,
	}
}

// Scopes returns a copy of the key's scopes, or nil if the key has no scopes. HasScope makes no
// copy.
func (k *Key) Scopes() []string { return cloned(k.granted().scopes) }

// Metadata returns a copy of the key's metadata, or nil if the key has no metadata.
func (k *Key) Metadata() map[string]string { return clonedMap(k.granted().metadata) }

// AllowedNetworks returns a copy of the key's networks, or nil if the key may be used from
// everywhere.
func (k *Key) AllowedNetworks() []netip.Prefix { return cloned(k.granted().networks) }

// cloned returns a copy without spare capacity, and nil for an empty slice.
func cloned[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return append(make([]T, 0, len(s)), s...)
}

// clonedMap returns a copy, and nil for an empty map.
func clonedMap(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	return maps.Clone(m)
}

// A keyJSON is the JSON of a Key.
type keyJSON struct {
	ID                          string
	Name, Owner                 string
	Scopes                      []string
	Metadata                    map[string]string
	Hint                        string
	CreatedAt, ExpiresAt        time.Time `json:",omitzero"`
	NotBefore                   time.Time `json:",omitzero"`
	AllowedNetworks             []netip.Prefix
	RateLimit                   RateLimit `json:",omitzero"`
	RevokedAt, DisabledAt       time.Time `json:",omitzero"`
	RevokeReason, DisableReason string    `json:",omitzero"`
	PreviousUntil               time.Time `json:",omitzero"`
	LastUsedAt                  time.Time `json:",omitzero"`
	Live                        int       `json:",omitzero"`
	Revision                    uint64
}

// json returns the JSON of the key. The result shares no memory with the key.
func (k *Key) json() keyJSON {
	return keyJSON{
		ID:              k.ID,
		Name:            k.Name,
		Owner:           k.Owner,
		Scopes:          k.Scopes(),
		Metadata:        k.Metadata(),
		Hint:            k.Hint,
		CreatedAt:       k.CreatedAt,
		ExpiresAt:       k.ExpiresAt,
		NotBefore:       k.NotBefore,
		AllowedNetworks: k.AllowedNetworks(),
		RateLimit:       k.RateLimit,
		RevokedAt:       k.RevokedAt,
		DisabledAt:      k.DisabledAt,
		RevokeReason:    k.RevokeReason,
		DisableReason:   k.DisableReason,
		PreviousUntil:   k.PreviousUntil,
		LastUsedAt:      k.LastUsedAt,
		Live:            k.Live,
		Revision:        k.Revision,
	}
}

// MarshalJSON encodes the key, and the Status at the time of the call.
func (k Key) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		keyJSON
		Status Status
	}{k.json(), k.Status()})
}

// UnmarshalJSON decodes the output of MarshalJSON. UnmarshalJSON ignores the encoded status,
// because the status follows from the fields.
func (k *Key) UnmarshalJSON(text []byte) error {
	decoded := struct {
		keyJSON
		Status any
	}{keyJSON: k.json()}
	if err := json.Unmarshal(text, &decoded); err != nil {
		return err
	}
	d := &decoded.keyJSON
	*k = Key{
		grants: &keyGrants{
			&grants{scopes: d.Scopes, metadata: d.Metadata, networks: d.AllowedNetworks},
		},
		ID:            d.ID,
		Name:          d.Name,
		Owner:         d.Owner,
		Hint:          d.Hint,
		CreatedAt:     d.CreatedAt,
		ExpiresAt:     d.ExpiresAt,
		NotBefore:     d.NotBefore,
		RateLimit:     d.RateLimit,
		RevokedAt:     d.RevokedAt,
		DisabledAt:    d.DisabledAt,
		RevokeReason:  d.RevokeReason,
		DisableReason: d.DisableReason,
		PreviousUntil: d.PreviousUntil,
		LastUsedAt:    d.LastUsedAt,
		Live:          d.Live,
		Revision:      d.Revision,
	}
	return nil
}

// HasScope reports whether one of the key's scopes covers a scope:
//
//   - a scope covers exactly the same scope; upper and lower case differ;
//   - a scope that ends in '*' covers every scope that begins with the text before the '*', at
//     whatever depth: "orders:*" covers "orders:read" and "orders:read:all", and neither "orders"
//     nor "orderstatus:read";
//   - "*" covers every scope.
//
// A '*' in the argument is an ordinary character. So "orders:*" and "*" cover the argument
// "orders:*", but "orders:read" does not.
func (k *Key) HasScope(scope string) bool {
	return k.granted().hasScope(scope)
}

func (g *grants) hasScope(scope string) bool {
	for _, granted := range g.scopes {
		if covers(granted, scope) {
			return true
		}
	}
	return false
}

// Status returns the status of the key at the time of the call.
func (k *Key) Status() Status {
	switch {
	case !k.RevokedAt.IsZero():
		return StatusRevoked
	case !k.DisabledAt.IsZero():
		return StatusDisabled
	case !k.ExpiresAt.IsZero() && !time.Now().Before(k.ExpiresAt):
		return StatusExpired
	case !k.NotBefore.IsZero() && time.Now().Before(k.NotBefore):
		return StatusPending
	default:
		return StatusActive
	}
}

// Status says whether a key is admitted, and if not, why. The zero Status is no status of a key.
// In a Query, the zero Status selects the keys of every status.
type Status uint8

// If several statuses apply to a key, the key has the last of them in this list.
const (
	StatusActive Status = iota + 1
	StatusPending
	StatusExpired
	StatusDisabled
	StatusRevoked
)

var statusNames = [...]string{"", "active", "pending", "expired", "disabled", "revoked"}

// String returns the status as a lower-case word.
func (s Status) String() string {
	if int(s) < len(statusNames) {
		return statusNames[s]
	}
	return fmt.Sprintf("status %d", uint8(s))
}

// MarshalText returns the status as a lower-case word, for JSON and similar formats.
func (s Status) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText accepts the word of a status, or an empty text for the zero Status. For any other
// text the error is ErrInvalid.
func (s *Status) UnmarshalText(text []byte) error {
	i := slices.Index(statusNames[:], string(text))
	if i < 0 {
		return invalid("%.40q is no status: use active, pending, expired, disabled or revoked",
			text)
	}
	*s = Status(i)
	return nil
}
