// Package record defines the stored form of a key, a protobuf message. [Decode] checks the bytes
// from a disk before a store uses them to admit or refuse a caller.
package record

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate

// Format is the format of what this program writes, except for the record of a key with credits,
// which has FormatCredits. A program that does not know credits would admit the key without end,
// and refuses the format.
const (
	Format        = 1
	FormatCredits = 2
)

// ErrInvalid means that the bytes are not a valid record, so no key can be verified with the bytes.
var ErrInvalid = errors.New("invalid record")

// ErrNewer wraps ErrInvalid, and means that a later version of the program wrote the record.
var ErrNewer = fmt.Errorf("%w: written by a later version", ErrInvalid)

// Decode parses and checks a record. Decode returns ErrInvalid if the record is not usable: the
// bytes are not a protobuf message, the format is newer, the status is unknown, the digest is
// missing, or a revocation has no time.
func Decode(b []byte) (*Record, error) {
	r := new(Record)
	if err := DecodeTo(r, b); err != nil {
		return nil, err
	}
	return r, nil
}

// DecodeTo is Decode for a caller that has a record which it no longer needs. DecodeTo overwrites
// the whole record. After an error, do not use the record.
func DecodeTo(r *Record, b []byte) error {
	if err := proto.Unmarshal(b, r); err != nil {
		// The error of the protobuf package may quote the bytes, so the returned error omits it.
		return fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	return check(r)
}

// Encode returns the bytes of a record. Encode returns an error if Decode would refuse the record.
func Encode(r *Record) ([]byte, error) {
	r.Format = Format
	if r.CreditsRevision != 0 {
		r.Format = FormatCredits
	}
	if err := check(r); err != nil {
		return nil, err
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(r)
}

// AppendLastStamp sets LastStamp in the bytes of a record that has no LastStamp.
func AppendLastStamp(b []byte, stamp int64) []byte {
	b = protowire.AppendTag(b, lastStampNumber, protowire.Fixed64Type)
	return protowire.AppendFixed64(b, uint64(stamp))
}

// IsRevoked reports whether the bytes of a record say that the key is revoked. IsRevoked takes a
// fraction of the time of Decode, and does not check the record. If the bytes are not a protobuf
// message, IsRevoked returns false.
func IsRevoked(b []byte) (revoked bool) {
	for len(b) > 0 {
		number, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return false
		}
		b = b[size:]
		if size = protowire.ConsumeFieldValue(number, kind, b); size < 0 {
			return false
		}
		if number == revokedAtNumber && kind == protowire.VarintType {
			at, _ := protowire.ConsumeVarint(b)
			revoked = at != 0
		}
		b = b[size:]
	}
	return revoked
}

// The numbers of fields of Record. LastStampSize is how many bytes AppendLastStamp appends.
const (
	revokedAtNumber = 12
	lastStampNumber = 22
	LastStampSize   = 2 + 8
)

// DecodeEvent parses and checks an event, as Decode does for a record.
func DecodeEvent(b []byte) (*Event, error) {
	e := new(Event)
	if err := proto.Unmarshal(b, e); err != nil {
		return nil, fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	if err := checkFormat(e.Format, Format); err != nil {
		return nil, err
	}
	if e.Action == Action_ACTION_UNSPECIFIED || len(e.KeyId) != 16 || e.Revision == 0 {
		return nil, fmt.Errorf("%w: not a complete event of format %d", ErrInvalid, Format)
	}
	return e, nil
}

// EncodeEvent returns the bytes of an event.
func EncodeEvent(e *Event) ([]byte, error) {
	e.Format = Format
	return proto.MarshalOptions{Deterministic: true}.Marshal(e)
}

func check(r *Record) error {
	if err := checkFormat(r.Format, FormatCredits); err != nil {
		return err
	}
	switch {
	case r.Status == Status_STATUS_PURGED:
		if r.PurgedAt <= 0 || len(r.Digest) != 0 || r.Previous != nil ||
			len(r.AllowedNetworks) != 0 {
			return fmt.Errorf("%w: a purged key must have a purge time and no other data",
				ErrInvalid)
		}
		return nil
	case r.DigestScheme == "" || len(r.Digest) == 0:
		return fmt.Errorf("%w: the digest is missing", ErrInvalid)
	case r.CreatedAt <= 0:
		return fmt.Errorf("%w: the creation time is missing", ErrInvalid)
	case r.Previous != nil && (r.Previous.DigestScheme == "" || len(r.Previous.Digest) == 0 ||
		r.Previous.Until <= 0):
		return fmt.Errorf("%w: the previous secret has no digest or no end", ErrInvalid)
	case r.Previous != nil && r.Rotations == 0:
		return fmt.Errorf("%w: there is a previous secret, but no rotation", ErrInvalid)
	case (r.Status == Status_STATUS_DISABLED) && r.DisabledAt <= 0:
		return fmt.Errorf("%w: disabled key has no disabled_at", ErrInvalid)
	}
	if r.NotBefore < 0 {
		return fmt.Errorf("%w: not_before is before 1970", ErrInvalid)
	}
	if l := r.RateLimit; l != nil &&
		(!(l.PerSecond > 0) || math.IsInf(l.PerSecond, 0) || l.Burst == 0) {
		return fmt.Errorf("%w: invalid rate limit", ErrInvalid)
	}
	for _, network := range r.AllowedNetworks {
		if p, err := netip.ParsePrefix(network); err != nil || p.Masked() != p {
			return fmt.Errorf("%w: invalid allowed network", ErrInvalid)
		}
	}
	switch r.Status {
	case Status_STATUS_ACTIVE, Status_STATUS_DISABLED:
		if r.RevokedAt != 0 {
			return fmt.Errorf("%w: key has revoked_at but is not revoked", ErrInvalid)
		}
	case Status_STATUS_REVOKED:
		if r.RevokedAt <= 0 {
			return fmt.Errorf("%w: revoked key has no revoked_at", ErrInvalid)
		}
	default:
		return fmt.Errorf("%w: unknown status %d", ErrInvalid, r.Status)
	}
	return nil
}

// DecodeBalance parses and checks a balance, as Decode does for a record.
func DecodeBalance(b []byte) (*Balance, error) {
	balance := new(Balance)
	if err := proto.Unmarshal(b, balance); err != nil {
		return nil, fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	if err := checkFormat(balance.Format, Format); err != nil {
		return nil, err
	}
	refill := balance.Refill
	if balance.CreditsRevision == 0 || balance.Remaining < 0 || balance.RefilledAt < 0 ||
		refill != nil && (refill.Amount <= 0 || refill.Every < 0 || refill.MonthDay > 31 ||
			refill.Every == 0 && !refill.Daily && refill.MonthDay == 0) {
		return nil, fmt.Errorf("%w: not a complete balance of format %d", ErrInvalid, Format)
	}
	return balance, nil
}

// EncodeBalance returns the bytes of a balance.
func EncodeBalance(b *Balance) ([]byte, error) {
	b.Format = Format
	return proto.MarshalOptions{Deterministic: true}.Marshal(b)
}

// DecodeMember parses and checks a member record, as Decode does for a record.
func DecodeMember(b []byte) (*Member, error) {
	m := new(Member)
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	return m, cmp.Or(checkFormat(m.Format, Format), checkStamps(m.Floor, m.Watermark, m.Last))
}

// MaxStamp is the largest stamp in the membership table, in nanoseconds since the Unix epoch: a
// moment of the year 2116. Only damage, or a wrong clock, makes a larger stamp. A process that took
// over such a floor would make the other processes wait for the floor for good.
const MaxStamp = math.MaxInt64 / 2

func checkStamps(stamps ...int64) error {
	if stamp := slices.Max(stamps); stamp > MaxStamp {
		return fmt.Errorf("%w: the stamp %d is after the year 2116", ErrInvalid, stamp)
	}
	return nil
}

// EncodeMember returns the bytes of a member record.
func EncodeMember(m *Member) ([]byte, error) {
	m.Format = Format
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

// DecodeMemberTable parses and checks the header of the membership table, as Decode does for a
// record.
func DecodeMemberTable(b []byte) (*MemberTable, error) {
	t := new(MemberTable)
	if err := proto.Unmarshal(b, t); err != nil {
		return nil, fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	if err := checkFormat(t.Format, Format); err != nil {
		return nil, err
	}
	if t.Freshness <= 0 {
		return nil, fmt.Errorf("%w: the freshness is missing", ErrInvalid)
	}
	return t, checkStamps(t.Floor)
}

// EncodeMemberTable returns the bytes of the header of the membership table. A floor above MaxStamp
// is an error.
func EncodeMemberTable(t *MemberTable) ([]byte, error) {
	if err := checkStamps(t.Floor); err != nil {
		return nil, err
	}
	t.Format = Format
	return proto.MarshalOptions{Deterministic: true}.Marshal(t)
}

func checkFormat(format, newest uint32) error {
	switch {
	case format == 0:
		return fmt.Errorf("%w: the format is missing", ErrInvalid)
	case format > newest:
		return fmt.Errorf(
			"%w: format %d is newer than format %d of this program: upgrade the program",
			ErrNewer, format, newest)
	}
	return nil
}
