package keystore

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Key is what is known of an API key, short of its secret. It is read-only and shared between callers: do not
// change what its Metadata holds. Appending to Scopes is harmless.
type Key struct {
	// ID names the key in logs, lists and Revoke: a UUIDv7 in 26 characters of Crockford's base32. It sorts by creation
	// and is no secret.
	ID string
	// Name, Owner, Scopes and Metadata are what Spec said.
	Name, Owner string
	Scopes      []string
	Metadata    map[string]string
	// Hint is the text of the key without its secret, for showing which key it is.
	Hint string
	// CreatedAt is when the key was made. ExpiresAt is the first moment at which it is no longer admitted; zero is
	// never.
	CreatedAt, ExpiresAt time.Time
	// RevokedAt is when it was revoked, and DisabledAt when it was disabled; zero is not.
	RevokedAt, DisabledAt time.Time
	// RevokeReason and DisableReason are what the calls that took effect gave.
	RevokeReason, DisableReason string
	// PreviousUntil is the end of the grace of the secret before the present one; zero if there was none. It may be
	// past.
	PreviousUntil time.Time
	// Revision is 1 for a new key, and one more after each change.
	Revision uint64
}

// HasScope reports whether the key was given the scope, to the letter.
func (k *Key) HasScope(scope string) bool { return slices.Contains(k.Scopes, scope) }

// Status returns what the key is at this moment.
func (k *Key) Status() Status {
	switch {
	case !k.RevokedAt.IsZero():
		return StatusRevoked
	case !k.DisabledAt.IsZero():
		return StatusDisabled
	case !k.ExpiresAt.IsZero() && !time.Now().Before(k.ExpiresAt):
		return StatusExpired
	default:
		return StatusActive
	}
}

// Status says whether a key is admitted, and if not, why. The zero Status is none: in a Query it stands for all.
type Status uint8

// A key that is several of these at once is the last of them.
const (
	StatusActive Status = iota + 1
	StatusExpired
	StatusDisabled
	StatusRevoked
)

// String returns the status as a lower-case word.
func (s Status) String() string {
	if names := [...]string{"", "active", "expired", "disabled", "revoked"}; int(s) < len(names) {
		return names[s]
	}
	return fmt.Sprintf("status %d", uint8(s))
}

// A Spec says what a key is to be.
type Spec struct {
	// Name is what people will know the key by. It must not be empty; it need not be unique. At most 256 bytes.
	Name string
	// Owner is whom the key belongs to, in the application's own terms; List can select by it. At most 256 bytes.
	Owner string
	// Scopes are what the key may be used for, in the application's own terms. At most 256, of 1 to 128 printable
	// ASCII characters each, without space and '*'.
	Scopes []string
	// Metadata is whatever else the application wants to know when the key is used. It is held in memory with the key.
	// The whole key is stored in at most 16 KiB.
	Metadata map[string]string
	// ExpiresAt is the first moment at which the key is no longer admitted. Zero means that it does not expire.
	ExpiresAt time.Time
}

const (
	maxText       = 256 // bytes of a name or an owner
	maxReason     = 1024
	maxScopes     = 256
	maxScope      = 128
	maxRecordSize = 16 << 10
)

// check says what is wrong with the spec, but for an expiry in the past.
func (s *Spec) check() error {
	if strings.TrimSpace(s.Name) == "" {
		return invalid("Spec.Name is empty: give the key a name that tells it from others in a list")
	}
	if err := checkText("Spec.Name", s.Name, maxText); err != nil {
		return err
	}
	if err := checkText("Spec.Owner", s.Owner, maxText); err != nil {
		return err
	}
	if len(s.Scopes) > maxScopes {
		return invalid("Spec.Scopes has %d scopes: at most %d are allowed", len(s.Scopes), maxScopes)
	}
	for i, scope := range s.Scopes {
		if err := checkScope(scope); err != nil {
			return invalid("Spec.Scopes[%d] %v", i, err)
		}
	}
	for k, v := range s.Metadata {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return invalid("Spec.Metadata holds text that is not UTF-8: encode binary values, with base64 for example")
		}
	}
	if s.ExpiresAt.Year() > 2261 { // int64 nanoseconds end in 2262
		return invalid("Spec.ExpiresAt is after the year 2261: leave it zero for a key that does not expire")
	}
	return nil
}

// checkFuture is apart from check, because the key that is updated may have expired.
func (s *Spec) checkFuture(now time.Time) error {
	if !s.ExpiresAt.IsZero() && !s.ExpiresAt.After(now) {
		return invalid("Spec.ExpiresAt %s is not in the future", s.ExpiresAt.Format(time.RFC3339))
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
	if strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return invalid("%s holds a control character, such as a line break", what)
	}
	return nil
}

func checkScope(scope string) error {
	if scope == "" {
		return fmt.Errorf("is empty")
	}
	if len(scope) > maxScope {
		return fmt.Errorf("has %d bytes: at most %d are allowed", len(scope), maxScope)
	}
	for _, c := range []byte(scope) {
		if c <= ' ' || c >= 0x7f || c == '*' {
			return fmt.Errorf("holds the character %q: use printable ASCII without space and '*'", rune(c))
		}
	}
	return nil
}

// An entry is what the fence caches: a key as users see it, and the digest to decide by. It is immutable.
type entry struct {
	key       Key
	digest    hashing.Digest // of the secret
	previous  hashing.Digest // of the one before; without a Sum if it has ended
	rotations uint32         // how many secrets there were before
}

// A stored is a record with what the backend knows about it.
type stored struct {
	id       token.ID
	record   *record.Record
	revision uint64
}

// The layout of the backend: one entry a key.
//
//	'k' id[16]   a record.Record
//
// Big-endian UUIDv7s sort by creation, and so do the entries.
const keySpace = 'k'

func storageKey(id token.ID) []byte { return append([]byte{keySpace}, id[:]...) }

func parseStored(e backend.Entry) (*stored, error) {
	if len(e.Key) != 1+len(token.ID{}) || e.Key[0] != keySpace {
		return nil, fmt.Errorf("%w: the storage key %x is not a key's", ErrCorrupt, e.Key)
	}
	id := token.ID(e.Key[1:])
	r, err := record.Decode(e.Value)
	if err != nil {
		return nil, fmt.Errorf("%w: key %s: %w", ErrCorrupt, id, err)
	}
	return &stored{id: id, record: r, revision: e.Revision}, nil
}

func (s *stored) entry() *entry {
	r := s.record
	e := &entry{
		key: Key{
			ID:            s.id.String(),
			Name:          r.Name,
			Owner:         r.Owner,
			Scopes:        slices.Clip(r.Scopes),
			Metadata:      r.Metadata,
			Hint:          token.HintOf(r.Prefix, s.id),
			CreatedAt:     fromNanos(r.CreatedAt),
			ExpiresAt:     fromNanos(r.ExpiresAt),
			RevokedAt:     fromNanos(r.RevokedAt),
			RevokeReason:  r.RevokeReason,
			Revision:      s.revision,
			DisabledAt:    fromNanos(r.DisabledAt),
			DisableReason: r.DisableReason,
		},
		digest:    hashing.Digest{Scheme: r.DigestScheme, Sum: r.Digest},
		rotations: r.Rotations,
	}
	if p := r.Previous; p != nil {
		e.previous = hashing.Digest{Scheme: p.DigestScheme, Sum: p.Digest}
		e.key.PreviousUntil = fromNanos(p.Until)
	}
	return e
}

func newRecord(spec Spec, prefix string, d hashing.Digest, now time.Time) *record.Record {
	r := &record.Record{
		Status:       record.Status_STATUS_ACTIVE,
		DigestScheme: d.Scheme,
		Digest:       d.Sum,
		Prefix:       prefix,
		CreatedAt:    toNanos(now),
	}
	spec.writeTo(r)
	return r
}

// writeTo puts copies of what the spec says into the record.
func (s *Spec) writeTo(r *record.Record) {
	r.Name = s.Name
	r.Owner = s.Owner
	r.Scopes = slices.Clone(s.Scopes)
	r.Metadata = maps.Clone(s.Metadata)
	r.ExpiresAt = toNanos(s.ExpiresAt)
}

// specOf returns what a spec would have to say for the record, with a map that can be written to. It shares the
// record's memory.
func specOf(r *record.Record) Spec {
	if r.Metadata == nil {
		r.Metadata = make(map[string]string)
	}
	return Spec{Name: r.Name, Owner: r.Owner, Scopes: r.Scopes, Metadata: r.Metadata, ExpiresAt: fromNanos(r.ExpiresAt)}
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
