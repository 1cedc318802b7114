package keystore

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/scope"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Key describes an API key. A Key holds no secret.
//
// Verify and Bind give the same *Key to many callers, so do not write to its fields. Other
// callers would see the change, and may read the field at the same time. The store does not
// decide by the fields, so a write cannot change who is admitted. Scopes, Metadata and
// AllowedNetworks return copies. The caller may change the copies.
//
// The JSON of a Key has the names of the fields and of the three methods. The JSON leaves out
// times that are zero, and adds the Status as a word. UnmarshalJSON reads this form.
type Key struct {
	// grants is the first field, so that Store.Verify finds grants in memory that Verify reads
	// anyway.
	grants *grants // nil: nothing is granted

	// ID names the key in logs, lists and Revoke. An ID is a UUIDv7 in 26 characters of
	// Crockford's base32. IDs sort by creation. An ID is no secret.
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
	// PreviousUntil is the end of the grace period of the previous secret. Zero means that there
	// was no previous secret. PreviousUntil may be in the past.
	PreviousUntil time.Time
	// LastUsedAt is the minute in which the key was last used. Zero means never. Get and List
	// fill in LastUsedAt.
	//
	// Verify and Bind use a key when they admit a caller. Allow uses a key when Allow returns nil
	// for a key with a RateLimit. A context from Bind uses its key until the context ends. The
	// store writes a use within a minute or two, so a crash may lose the last minutes.
	// Query.UnusedSince takes this loss into account.
	LastUsedAt time.Time
	// Revision is 1 for a new key. Each change adds one.
	Revision uint64
}

// A grants holds the part of a key that a caller could change through a slice or a map. Callers
// never get the grants of a Key, only copies of the parts.
type grants struct {
	scopes   []string
	metadata map[string]string
	networks []netip.Prefix
	limit    *limiter // nil: no limit, or the key is not from Verify or Bind
}

// nothing is the grants of a Key without grants.
var nothing grants

// granted returns the key's grants, and never nil.
func (k *Key) granted() *grants {
	if k.grants == nil {
		return &nothing
	}
	return k.grants
}

// NewKey returns a key that no store has, with a copy of the contents of spec. Use NewKey in
// tests of handlers, and in Verifiers other than a Store. NewKey does not check the spec. The
// caller may set the other fields.
func NewKey(spec Spec) *Key {
	return &Key{
		grants: &grants{
			scopes:   cloned(spec.Scopes),
			metadata: clonedMap(spec.Metadata),
			networks: cloned(spec.AllowedNetworks),
		},
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
		grants:        &grants{scopes: d.Scopes, metadata: d.Metadata, networks: d.AllowedNetworks},
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
		return invalid("%.40q is no status: use active, pending, expired, disabled or revoked", text)
	}
	*s = Status(i)
	return nil
}

// A Spec holds the properties of a key that Create sets and Update can change.
type Spec struct {
	// Name is the name by which people recognize the key. Name must not be empty. Name need not
	// be unique. At most 256 bytes. A name has no characters that do not show: control characters
	// such as line breaks, characters that turn the direction of writing, and characters without
	// width.
	Name string
	// Owner is the owner of the key, in the application's own terms. List can select keys by
	// owner. At most 256 bytes. Owner must not have the characters that Name must not have.
	Owner string
	// Scopes are the permitted uses of the key, in the application's own terms. At most 256
	// scopes, of 1 to 128 printable ASCII characters each, without a space. A '*' matches every
	// possible rest of a scope. The '*' must be the last character, and must be alone or follow
	// one of ':', '.' and '/', as in "orders:*". See HasScope.
	Scopes []string
	// Metadata is any other data that the application needs when the key is used. The store keeps
	// Metadata in memory with the key. The whole key takes at most 16 KiB of storage. Values may
	// contain line breaks and tabs, but no other characters that a name must not have.
	Metadata map[string]string
	// ExpiresAt is the first moment at which the key is no longer admitted. Zero means that the
	// key does not expire. Options.MaxLifetime may forbid keys that do not expire.
	ExpiresAt time.Time `json:",omitzero"`
	// NotBefore is the first moment at which the key is admitted. Zero means immediately.
	NotBefore time.Time `json:",omitzero"`
	// AllowedNetworks are the networks from which the key may be used: at most 64. Empty means
	// anywhere. If the key has networks, the store refuses every caller whose address the store
	// does not know (see WithClientAddr). A caller over a unix socket or bufconn has no address,
	// so the store refuses the caller too.
	AllowedNetworks []netip.Prefix
	// RateLimit limits how often the key may be used. Zero means no limit.
	RateLimit RateLimit `json:",omitzero"`
}

// A RateLimit is a token bucket. A key may be used Burst times immediately, and PerSecond more
// times in each second. Each process has a separate bucket. The bucket is full when the process
// starts. A call with a valid key counts, even if the call is then refused because the key lacks
// a scope.
type RateLimit struct {
	PerSecond float64 // more than 0
	Burst     int     // 1 or more
}

const (
	maxText     = 256 // bytes of a name or an owner
	maxReason   = 1024
	maxScopes   = 256
	maxNetworks = 64
	// The limit for a record that Create or Update makes: half of what a backend accepts.
	maxRecordSize = 16 << 10
)

// check returns an error if the spec is invalid. check accepts an expiry in the past. A text that
// the key had before is not checked again, because an earlier version may have accepted the text.
func (s *Spec) check(before *Spec) error {
	if strings.TrimSpace(s.Name) == "" {
		return invalid("Spec.Name is empty: give the key a name that tells it from others in a list")
	}
	if err := checkText("Spec.Name", s.Name, maxText); err != nil && s.Name != before.Name {
		return err
	}
	if err := checkText("Spec.Owner", s.Owner, maxText); err != nil && s.Owner != before.Owner {
		return err
	}
	if len(s.Scopes) > maxScopes {
		return invalid("Spec.Scopes has %d scopes: at most %d are allowed", len(s.Scopes), maxScopes)
	}
	for i, text := range s.Scopes {
		if err := scope.Check(text); err != nil {
			return invalid("Spec.Scopes[%d] %v", i, err)
		}
	}
	for k, v := range s.Metadata {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return invalid("Spec.Metadata holds text that is not UTF-8: encode binary values, with base64 for example")
		}
		if old, ok := before.Metadata[k]; ok && old == v {
			continue
		}
		if err := checkHidden("a key of Spec.Metadata", k, hides); err != nil {
			return err
		}
		if err := checkHidden(fmt.Sprintf("Spec.Metadata[%q]", k), v, hidesInText); err != nil {
			return err
		}
	}
	if s.ExpiresAt.Year() > 2261 { // int64 nanoseconds end in 2262
		return invalid("Spec.ExpiresAt is after the year 2261: leave it zero for a key that does not expire")
	}
	if !s.NotBefore.IsZero() && (s.NotBefore.Year() < 1971 || s.NotBefore.Year() > 2261) {
		return invalid("Spec.NotBefore is not between the years 1971 and 2261: leave it zero for a key that begins at once")
	}
	if !s.ExpiresAt.IsZero() && !s.NotBefore.Before(s.ExpiresAt) {
		return invalid("Spec.NotBefore is not before Spec.ExpiresAt: the key would never be admitted")
	}
	if len(s.AllowedNetworks) > maxNetworks {
		return invalid("Spec.AllowedNetworks has %d networks: at most %d are allowed", len(s.AllowedNetworks), maxNetworks)
	}
	for i, network := range s.AllowedNetworks {
		switch {
		case !network.IsValid():
			return invalid("Spec.AllowedNetworks[%d] is not a network: use netip.ParsePrefix", i)
		case network.Addr().Is4In6():
			return invalid("Spec.AllowedNetworks[%d] %v is IPv4 in IPv6's clothes: write it as IPv4", i, network)
		case network.Masked() != network:
			return invalid("Spec.AllowedNetworks[%d] %v has bits behind its mask: write %v, or %v/%d for one address",
				i, network, network.Masked(), network.Addr(), network.Addr().BitLen())
		}
	}
	if l := s.RateLimit; l != (RateLimit{}) && (!(l.PerSecond > 0) || math.IsInf(l.PerSecond, 0) || l.Burst < 1 || l.Burst > maxBurst) {
		return invalid("Spec.RateLimit %+v: PerSecond must be a number above 0, and Burst from 1 to %d", l, maxBurst)
	}
	return nil
}

const maxBurst = 1 << 30

// checkTimes checks ExpiresAt against the clock. The check is not part of check, because an
// Update may change a key that has expired.
func (s *Spec) checkTimes(now time.Time, maxLifetime time.Duration) error {
	if !s.ExpiresAt.IsZero() && !s.ExpiresAt.After(now) {
		return invalid("Spec.ExpiresAt %s is not in the future", s.ExpiresAt.Format(time.RFC3339))
	}
	if maxLifetime <= 0 {
		return nil
	}
	if s.ExpiresAt.IsZero() {
		return invalid("Spec.ExpiresAt is zero: Options.MaxLifetime wants every key to expire within %v", maxLifetime)
	}
	if latest := now.Add(maxLifetime); s.ExpiresAt.After(latest) {
		return invalid("Spec.ExpiresAt %s is too far off: Options.MaxLifetime wants every key to expire within %v",
			s.ExpiresAt.Format(time.RFC3339), maxLifetime)
	}
	return nil
}

func checkText(what, text string, most int) error {
	if len(text) > most {
		return invalid("%s has %d bytes: at most %d are allowed", what, len(text), most)
	}
	if !utf8.ValidString(text) {
		return invalid("%s is not UTF-8 text", what)
	}
	return checkHidden(what, text, hides)
}

// An entry is the value that the fence caches: a key as callers see the key, and the fields by
// which the store decides. An entry is immutable, except for the atomic fields, and for key.
// Callers must not write to key, but nothing prevents a write.
//
// If many keys are used at random, a hit spends most of its time waiting for the memory of the
// entry. So the fields that a hit reads come first, in two cache lines. A hit reads both lines
// before hashing the token. The first line also holds the sum, and the memory is fetched during
// the hashing.
type entry struct {
	fence.Node // the ID

	rotations uint32       // the number of earlier secrets
	used      atomic.Int64 // the minute of the last use that usage has recorded
	sum       [32]byte     // the memory of digest.Sum, if the sum fits

	digest    hashing.Digest // of the secret
	plain     bool           // the current secret is admitted always, from everywhere, at any rate
	rehashing atomic.Bool    // a new digest is queued or being written

	// The store decides by the fields below, by plain and by the digests: see policy.go. Callers
	// get key, and can write to key. Callers cannot reach the fields below, so the store decides
	// by these fields and not by key.
	revoked, disabled bool
	grants            *grants // the initial value of key.grants

	key Key

	previous             hashing.Digest // of the previous secret; no Sum if the secret has ended
	notBefore, expiresAt int64          // nanoseconds since the Unix epoch; 0: no limit
	previousUntil        int64          // nanoseconds since the Unix epoch
	rateLimit            RateLimit
	revision             uint64
}

func (e *entry) node() *fence.Node { return &e.Node }

// A stored is a record with the backend's ID and revision of the record.
type stored struct {
	id       token.ID
	record   *record.Record
	revision uint64
}

// The layout of the backend:
//
//	'e' stamp[8]   a record.Event; the stamp is the time of the event in nanoseconds since the
//	               Unix epoch, or a little later
//	'h' scheme     a check value of the Hasher: the digest of a fixed text
//	'k' id[16]     a record.Record
//	'u' id[16]     the minute of the key's last use since the Unix epoch, as a varint
//	'w'            the time since when all uses are known, in nanoseconds since the Unix epoch,
//	               in 8 bytes; and a byte: 1 if every later use is written and no store is open,
//	               or else 0
//
// All numbers are big-endian. UUIDv7s sort by creation, and so do the keys.
const keySpace = 'k'

func storageKey(id token.ID) []byte {
	return append(append(make([]byte, 0, 1+len(id)), keySpace), id[:]...)
}

// parseStored decodes the backend's entry of a key. If the record is damaged, parseStored returns
// the error and a stored that has only the ID.
func parseStored(e backend.Entry) (*stored, error) {
	if len(e.Key) != 1+len(token.ID{}) || e.Key[0] != keySpace {
		return nil, fmt.Errorf("%w: the storage key %x is not a key's", ErrCorrupt, e.Key)
	}
	id := token.ID(e.Key[1:])
	r, err := record.Decode(e.Value)
	if err != nil {
		return &stored{id: id}, fmt.Errorf("%w: key %s: %w", ErrCorrupt, id, err)
	}
	return &stored{id: id, record: r, revision: e.Revision}, nil
}

// purged reports whether the key was purged, so that only the revision of the key remains.
func (s *stored) purged() bool { return s.record.Status == record.Status_STATUS_PURGED }

func (s *stored) entry() *entry {
	r := s.record
	hint := token.HintOf(r.Prefix, s.id)
	g := &grants{scopes: slices.Clip(r.Scopes), metadata: r.Metadata}
	e := &entry{
		Node:   fence.Node{ID: s.id},
		grants: g,
		key: Key{
			grants:        g,
			ID:            token.IDInHint(hint),
			Name:          r.Name,
			Owner:         r.Owner,
			Hint:          hint,
			CreatedAt:     fromNanos(r.CreatedAt),
			ExpiresAt:     fromNanos(r.ExpiresAt),
			RevokedAt:     fromNanos(r.RevokedAt),
			RevokeReason:  r.RevokeReason,
			Revision:      s.revision,
			DisabledAt:    fromNanos(r.DisabledAt),
			DisableReason: r.DisableReason,
			NotBefore:     fromNanos(r.NotBefore),
		},
		digest:    hashing.Digest{Scheme: r.DigestScheme, Sum: r.Digest},
		rotations: r.Rotations,
		revoked:   r.RevokedAt != 0 || s.purged(),
		disabled:  r.DisabledAt != 0,
		notBefore: r.NotBefore,
		expiresAt: r.ExpiresAt,
		revision:  s.revision,
	}
	if len(r.Digest) == len(e.sum) {
		e.digest.Sum = append(e.sum[:0], r.Digest...)
	}
	for _, network := range r.AllowedNetworks {
		// record.Decode has already parsed the network.
		g.networks = append(g.networks, netip.MustParsePrefix(network))
	}
	g.networks = slices.Clip(g.networks)
	if l := r.RateLimit; l != nil {
		e.rateLimit = RateLimit{PerSecond: l.PerSecond, Burst: int(l.Burst)}
		e.key.RateLimit = e.rateLimit
	}
	if s.purged() {
		e.key.RevokedAt = fromNanos(r.PurgedAt) // in case a caller asks
	}
	if p := r.Previous; p != nil {
		e.previous = hashing.Digest{Scheme: p.DigestScheme, Sum: p.Digest}
		e.previousUntil = p.Until
		e.key.PreviousUntil = fromNanos(p.Until)
	}
	e.plain = e.admits(e.rotations) == nil && e.unrestricted()
	return e
}

// checkSize refuses a record that a Spec has made too large. before is the size of the record
// before the change, in bytes. A record that did not grow is accepted. Other changes of a key
// make the record a little larger, and are never refused because of the size: a key that could
// not be revoked would be the worst outcome.
func checkSize(r *record.Record, before int) error {
	if n := proto.Size(r); n > maxRecordSize && n > before {
		return invalid("the key needs %d bytes of storage: at most %d are allowed; shorten its Metadata or Scopes", n, maxRecordSize)
	}
	return nil
}

// These limits apply to a key that Restore takes from a backup. The limits leave space for every
// later change of the key: a key that cannot be revoked must not get into a store. No store
// writes a backup that is beyond the limits.
const (
	maxSavedRevision  = 1 << 62
	maxSavedRotations = 1 << 31
	// A record of maxRecordSize is smaller, even with a previous digest and two reasons.
	maxSavedSize = 24 << 10
)

// parseSaved is parseStored for an entry of a backup. parseSaved refuses entries beyond the
// limits.
func parseSaved(e backend.Entry) (*stored, error) {
	st, err := parseStored(e)
	if err != nil {
		return nil, err
	}
	r := st.record
	if e.Revision > maxSavedRevision || r.Rotations > maxSavedRotations ||
		len(e.Value) > maxSavedSize ||
		len(r.RevokeReason) > maxReason || len(r.DisableReason) > maxReason {
		return nil, damaged(fmt.Sprintf(
			"the revision, the number of rotations or a length of key %s is impossible", st.id))
	}
	return st, nil
}

func newRecord(spec Spec, prefix string, d hashing.Digest, now time.Time) *record.Record {
	r := &record.Record{
		Format:       record.Format,
		Status:       record.Status_STATUS_ACTIVE,
		DigestScheme: d.Scheme,
		Digest:       d.Sum,
		Prefix:       prefix,
		CreatedAt:    toNanos(now),
	}
	spec.writeTo(r)
	return r
}

// writeTo copies the fields of the spec into the record.
func (s *Spec) writeTo(r *record.Record) {
	r.Name = s.Name
	r.Owner = s.Owner
	r.Scopes = slices.Clone(s.Scopes)
	r.Metadata = maps.Clone(s.Metadata)
	r.ExpiresAt = toNanos(s.ExpiresAt)
	r.NotBefore = toNanos(s.NotBefore)
	r.AllowedNetworks = nil
	for _, network := range s.AllowedNetworks {
		r.AllowedNetworks = append(r.AllowedNetworks, network.String())
	}
	r.RateLimit = nil
	if l := s.RateLimit; l != (RateLimit{}) {
		r.RateLimit = &record.RateLimit{PerSecond: l.PerSecond, Burst: uint32(l.Burst)}
	}
}

// spec returns a Spec with the contents of the key. The caller may write to the map of the Spec.
func (k *Key) spec() Spec {
	metadata := k.Metadata()
	if metadata == nil {
		metadata = make(map[string]string)
	}
	return Spec{
		Name:            k.Name,
		Owner:           k.Owner,
		Scopes:          k.Scopes(),
		Metadata:        metadata,
		ExpiresAt:       k.ExpiresAt,
		NotBefore:       k.NotBefore,
		AllowedNetworks: k.AllowedNetworks(),
		RateLimit:       k.RateLimit,
	}
}

func toNanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}
