// Package record is the stored form of a key: a protobuf message, and the checks that stand between bytes from a disk
// and a decision about who gets in.
package record

import (
	"errors"
	"fmt"
	"math"
	"net/netip"

	"google.golang.org/protobuf/proto"
)

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate

// Format is the newest format of a record that this program reads, and the one that it writes.
const Format = 1

// ErrInvalid means that bytes are not a record that this program can decide by.
var ErrInvalid = errors.New("not a usable record")

// ErrNewer is the ErrInvalid of a record that a later version has written.
var ErrNewer = fmt.Errorf("%w: it is of a later version", ErrInvalid)

// Decode reads a record. It refuses, with ErrInvalid, whatever could not be decided by: bytes that are no message, a
// newer format, an unknown status, a missing digest, a revocation without its time.
func Decode(b []byte) (*Record, error) {
	r := new(Record)
	if err := proto.Unmarshal(b, r); err != nil {
		// protobuf's own text may quote what it read.
		return nil, fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	if err := check(r); err != nil {
		return nil, err
	}
	return r, nil
}

// Encode writes a record, and refuses one that Decode would refuse.
func Encode(r *Record) ([]byte, error) {
	r.Format = Format
	if err := check(r); err != nil {
		return nil, err
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(r)
}

// DecodeEvent is Decode for an event.
func DecodeEvent(b []byte) (*Event, error) {
	e := new(Event)
	if err := proto.Unmarshal(b, e); err != nil {
		return nil, fmt.Errorf("%w: not a protobuf message", ErrInvalid)
	}
	if e.Format == 0 || e.Format > Format || e.Action == Action_ACTION_UNSPECIFIED || len(e.KeyId) != 16 || e.Revision == 0 {
		return nil, fmt.Errorf("%w: not an event of format %d", ErrInvalid, Format)
	}
	return e, nil
}

// EncodeEvent writes an event.
func EncodeEvent(e *Event) ([]byte, error) {
	e.Format = Format
	return proto.MarshalOptions{Deterministic: true}.Marshal(e)
}

func check(r *Record) error {
	switch {
	case r.Format == 0:
		return fmt.Errorf("%w: it has no format", ErrInvalid)
	case r.Format > Format:
		return fmt.Errorf("%w: format %d is newer than this program's %d: upgrade the program", ErrNewer, r.Format, Format)
	case r.Status == Status_STATUS_PURGED:
		if r.PurgedAt <= 0 || len(r.Digest) != 0 || r.Previous != nil || len(r.AllowedNetworks) != 0 {
			return fmt.Errorf("%w: it was removed, and is not empty", ErrInvalid)
		}
		return nil
	case r.DigestScheme == "" || len(r.Digest) == 0:
		return fmt.Errorf("%w: it has no digest", ErrInvalid)
	case r.CreatedAt <= 0:
		return fmt.Errorf("%w: it has no creation time", ErrInvalid)
	case r.Previous != nil && (r.Previous.DigestScheme == "" || len(r.Previous.Digest) == 0 || r.Previous.Until <= 0):
		return fmt.Errorf("%w: its previous secret has no digest or no end", ErrInvalid)
	case r.Previous != nil && r.Rotations == 0:
		return fmt.Errorf("%w: it has a previous secret and was never rotated", ErrInvalid)
	case (r.Status == Status_STATUS_DISABLED) && r.DisabledAt <= 0:
		return fmt.Errorf("%w: it is disabled and has no time of that", ErrInvalid)
	}
	if r.NotBefore < 0 {
		return fmt.Errorf("%w: it begins before 1970", ErrInvalid)
	}
	if l := r.RateLimit; l != nil && (!(l.PerSecond > 0) || math.IsInf(l.PerSecond, 0) || l.Burst == 0) {
		return fmt.Errorf("%w: its rate limit is not one", ErrInvalid)
	}
	for _, network := range r.AllowedNetworks {
		if p, err := netip.ParsePrefix(network); err != nil || p.Masked() != p {
			return fmt.Errorf("%w: an allowed network is not one", ErrInvalid)
		}
	}
	switch r.Status {
	case Status_STATUS_ACTIVE, Status_STATUS_DISABLED:
		if r.RevokedAt != 0 {
			return fmt.Errorf("%w: it has a revocation time and is not revoked", ErrInvalid)
		}
	case Status_STATUS_REVOKED:
		if r.RevokedAt <= 0 {
			return fmt.Errorf("%w: it is revoked and has no revocation time", ErrInvalid)
		}
	default:
		return fmt.Errorf("%w: unknown status %d", ErrInvalid, r.Status)
	}
	return nil
}
