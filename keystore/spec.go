package keystore

import (
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/scope"
	"google.golang.org/protobuf/proto"
)

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
	// ExpiresAt is the first moment at which the key is no longer admitted, at most in the year
	// 2261. Zero means that the key does not expire. Options.MaxLifetime may forbid keys that do
	// not expire.
	ExpiresAt time.Time `json:",omitzero"`
	// NotBefore is the first moment at which the key is admitted, from the year 1971 to 2261. Zero
	// means immediately.
	NotBefore time.Time `json:",omitzero"`
	// AllowedNetworks are the networks from which the key may be used: at most 64. Empty means
	// anywhere. If the key has networks, the store refuses every caller whose address the store
	// does not know (see WithClientAddr). A caller over a unix socket or bufconn has no address,
	// so the store refuses the caller too.
	AllowedNetworks []netip.Prefix
	// RateLimit limits how often the key may be used. Zero means no limit.
	RateLimit RateLimit `json:",omitzero"`
	// Credits are the credits of a new key. Nil means that the use of the key is not limited. Only
	// Create and Import read Credits, and an Update that sets Credits gets ErrInvalid: the credits
	// change with each use of the key. Call SetCredits or AddCredits.
	Credits *Credits `json:",omitzero"`
}

// A RateLimit is a token bucket. A key may be used Burst times immediately, and PerSecond more
// times in each second. Each process has a separate bucket. The bucket is full when the process
// starts. A call with a valid key counts, even if the call is then refused because the key lacks
// a scope.
type RateLimit struct {
	PerSecond float64 // more than 0
	Burst     int     // from 1 to 1<<30
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
		return invalid("Spec.Name is empty: give the key a name that people recognize")
	}
	if err := checkText("Spec.Name", s.Name, maxText); err != nil && s.Name != before.Name {
		return err
	}
	if err := checkText("Spec.Owner", s.Owner, maxText); err != nil && s.Owner != before.Owner {
		return err
	}
	if len(s.Scopes) > maxScopes {
		return invalid("Spec.Scopes has %d scopes: at most %d are allowed", len(s.Scopes),
			maxScopes)
	}
	for i, text := range s.Scopes {
		if err := scope.Check(text); err != nil {
			return invalid("Spec.Scopes[%d] %v", i, err)
		}
	}
	if err := s.checkMetadata(before.Metadata); err != nil {
		return err
	}
	if s.ExpiresAt.Year() > 2261 { // int64 nanoseconds end in 2262
		return invalid("Spec.ExpiresAt is after the year 2261: leave it zero for a key that does " +
			"not expire")
	}
	if !s.NotBefore.IsZero() && (s.NotBefore.Year() < 1971 || s.NotBefore.Year() > 2261) {
		return invalid("Spec.NotBefore is not between the years 1971 and 2261: leave it zero for " +
			"a key that begins immediately")
	}
	if !s.ExpiresAt.IsZero() && !s.NotBefore.Before(s.ExpiresAt) {
		return invalid("Spec.NotBefore is not before Spec.ExpiresAt: the key would never be " +
			"admitted")
	}
	if err := checkNetworks(s.AllowedNetworks); err != nil {
		return err
	}
	if l := s.RateLimit; l != (RateLimit{}) && (!(l.PerSecond > 0) || math.IsInf(l.PerSecond, 0) ||
		l.Burst < 1 || l.Burst > maxBurst) {
		return invalid("Spec.RateLimit %+v: PerSecond must be a number above 0, and Burst from "+
			"1 to %d", l, maxBurst)
	}
	return s.Credits.check("Spec.Credits")
}

const maxBurst = 1 << 30

// checkMetadata checks the entries that differ from those before.
func (s *Spec) checkMetadata(before map[string]string) error {
	for k, v := range s.Metadata {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return invalid("Spec.Metadata holds text that is not UTF-8: encode binary values, " +
				"with base64 for example")
		}
		if old, ok := before[k]; ok && old == v {
			continue
		}
		if err := checkHidden("a key of Spec.Metadata", k, hides); err != nil {
			return err
		}
		if err := checkHidden(fmt.Sprintf("Spec.Metadata[%q]", k), v, hidesInText); err != nil {
			return err
		}
	}
	return nil
}

func checkNetworks(networks []netip.Prefix) error {
	if len(networks) > maxNetworks {
		return invalid("Spec.AllowedNetworks has %d networks: at most %d are allowed", len(networks),
			maxNetworks)
	}
	for i, network := range networks {
		switch {
		case !network.IsValid():
			return invalid("Spec.AllowedNetworks[%d] is not a network: use netip.ParsePrefix", i)
		case network.Addr().Is4In6():
			return invalid("Spec.AllowedNetworks[%d] %v is an IPv4-mapped IPv6 network: write "+
				"the network as IPv4", i, network)
		case network.Masked() != network:
			return invalid("Spec.AllowedNetworks[%d] %v has bits after its mask: write %v, or "+
				"%v/%d for one address",
				i, network, network.Masked(), network.Addr(), network.Addr().BitLen())
		}
	}
	return nil
}

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
		return invalid("Spec.ExpiresAt is zero: Options.MaxLifetime wants every key to expire "+
			"within %v", maxLifetime)
	}
	if latest := now.Add(maxLifetime); s.ExpiresAt.After(latest) {
		return invalid("Spec.ExpiresAt %s is too far off: Options.MaxLifetime wants every key to "+
			"expire within %v",
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

// checkSize refuses a record that a Spec has made too large. before is the size of the record
// before the change, in bytes. A record that did not grow is accepted. Other changes of a key
// make the record a little larger, and are never refused because of the size: a key that could
// not be revoked would be the worst outcome.
func checkSize(r *record.Record, before int) error {
	if n := proto.Size(r); n > maxRecordSize && n > before {
		return invalid("the key needs %d bytes of storage: at most %d are allowed; shorten its "+
			"Metadata or Scopes", n, maxRecordSize)
	}
	return nil
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
