package admin

import (
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// namePrefix begins the name of each key. The rest of the name is the ID.
const namePrefix = "keys/"

// idOf returns the ID in the name of a key. The store checks the ID. The error does not repeat the
// name, because the name may be a secret in the wrong place. field is the name of the field.
func idOf(field, name string) (string, error) {
	id, ok := strings.CutPrefix(name, namePrefix)
	if !ok || id == "" {
		return "", invalid("%s is not the name of a key: write keys/ and the ID of the key", field)
	}
	return id, nil
}

// etagOf returns the etag of a key.
func etagOf(k *keystore.Key) string { return strconv.FormatUint(k.Revision, 10) }

// revisionOf returns the revision in an etag, or 0 if the etag is empty.
func revisionOf(etag string) (uint64, error) {
	if etag == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(etag, 10, 64)
	if err != nil || n == 0 {
		return 0, invalid("etag is not the etag of a key: take the etag from a response")
	}
	return n, nil
}

// keyProto returns the message for a key.
func keyProto(k *keystore.Key) *adminpb.Key {
	m := &adminpb.Key{
		DisplayName:              k.Name,
		Owner:                    k.Owner,
		Scopes:                   k.Scopes(),
		Metadata:                 k.Metadata(),
		ExpireTime:               timeProto(k.ExpiresAt),
		StartTime:                timeProto(k.NotBefore),
		State:                    adminpb.State(k.Status()), // the numbers are the same
		Hint:                     k.Hint,
		CreateTime:               timeProto(k.CreatedAt),
		RevokeTime:               timeProto(k.RevokedAt),
		RevokeReason:             k.RevokeReason,
		DisableTime:              timeProto(k.DisabledAt),
		DisableReason:            k.DisableReason,
		LastUseTime:              timeProto(k.LastUsedAt),
		PreviousSecretExpireTime: timeProto(k.PreviousUntil),
		LiveStreams:              count32(k.Live),
		Etag:                     etagOf(k),
	}
	for _, network := range k.AllowedNetworks() {
		m.AllowedNetworks = append(m.AllowedNetworks, network.String())
	}
	if l := k.RateLimit; l != (keystore.RateLimit{}) {
		m.RateLimit = &adminpb.RateLimit{PerSecond: l.PerSecond, Burst: count32(l.Burst)}
	}
	if k.ID != "" {
		m.Name = namePrefix + k.ID
	} else {
		m.Etag = "" // of a key that does not exist yet
	}
	return m
}

func count32(n int) int32 { return int32(min(n, math.MaxInt32)) }

// eventProto returns the message for an event.
func eventProto(e keystore.Event) *adminpb.Event {
	return &adminpb.Event{
		Cursor:   cursorText(e.At),
		Time:     timeProto(e.At),
		Key:      namePrefix + e.KeyID,
		Revision: int64(e.Revision),
		Action:   string(e.Action),
		Actor:    e.Actor,
		Reason:   e.Reason,

		CreditsBefore: creditsProto(e.CreditsBefore),
		Credits:       creditsProto(e.Credits),
	}
}

// A cursor is the time of an event in nanoseconds since 1970. The zero time has the cursor 0.
func cursorText(at time.Time) string {
	if at.IsZero() {
		return "0"
	}
	return strconv.FormatInt(at.UnixNano(), 10)
}

// cursorTime returns the time of a cursor. The error is for a text that is no cursor.
func cursorTime(text string) (time.Time, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	switch {
	case err != nil || n < 0:
		return time.Time{}, invalid("after is not a cursor: take the cursor from an event")
	case n == 0:
		return time.Time{}, nil
	default:
		return time.Unix(0, n), nil
	}
}

// timeProto returns the message for a time, and nil for the zero time.
func timeProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// timeOf returns the time of a message, and the zero time for nil. The zero time means that there
// is no time, so a message with the zero time is an error.
func timeOf(field string, m *timestamppb.Timestamp) (time.Time, error) {
	if m == nil {
		return time.Time{}, nil
	}
	t := m.AsTime()
	if m.CheckValid() != nil || t.IsZero() {
		return time.Time{}, invalid("%s is not a time after the year 1: "+
			"leave the field unset for no time", field)
	}
	return t, nil
}

// queryOf returns the query for a filter. A nil filter selects all keys.
func queryOf(f *adminpb.Filter) (q keystore.Query, err error) {
	q = keystore.Query{Owner: f.GetOwner(), Scope: f.GetScope(), Text: f.GetText()}
	if _, ok := adminpb.State_name[int32(f.GetState())]; !ok {
		return q, invalid("filter.state %d is no state that this server knows", f.GetState())
	}
	q.Status = keystore.Status(f.GetState())
	if q.CreatedBefore, err = timeOf("filter.create_time_before",
		f.GetCreateTimeBefore()); err != nil {
		return q, err
	}
	if q.ExpiresBefore, err = timeOf("filter.expire_time_before",
		f.GetExpireTimeBefore()); err != nil {
		return q, err
	}
	q.UnusedSince, err = timeOf("filter.unused_since", f.GetUnusedSince())
	return q, err
}

// An inputField is a field of a key that a caller can set.
type inputField struct {
	isSet func(*adminpb.Key) bool
	// copy writes the field into the Spec.
	copy func(*keystore.Spec, *adminpb.Key) error
}

// inputFields has the fields that a caller can set, by the name in a mask.
var inputFields = map[string]inputField{
	"display_name": {
		func(k *adminpb.Key) bool { return k.DisplayName != "" },
		func(s *keystore.Spec, k *adminpb.Key) error { s.Name = k.DisplayName; return nil },
	},
	"owner": {
		func(k *adminpb.Key) bool { return k.Owner != "" },
		func(s *keystore.Spec, k *adminpb.Key) error { s.Owner = k.Owner; return nil },
	},
	"scopes": {
		func(k *adminpb.Key) bool { return len(k.Scopes) > 0 },
		func(s *keystore.Spec, k *adminpb.Key) error { s.Scopes = k.Scopes; return nil },
	},
	"metadata": {
		func(k *adminpb.Key) bool { return len(k.Metadata) > 0 },
		func(s *keystore.Spec, k *adminpb.Key) error { s.Metadata = k.Metadata; return nil },
	},
	"expire_time": {
		func(k *adminpb.Key) bool { return k.ExpireTime != nil },
		func(s *keystore.Spec, k *adminpb.Key) (err error) {
			s.ExpiresAt, err = timeOf("expire_time", k.ExpireTime)
			return err
		},
	},
	"start_time": {
		func(k *adminpb.Key) bool { return k.StartTime != nil },
		func(s *keystore.Spec, k *adminpb.Key) (err error) {
			s.NotBefore, err = timeOf("start_time", k.StartTime)
			return err
		},
	},
	"allowed_networks": {
		func(k *adminpb.Key) bool { return len(k.AllowedNetworks) > 0 },
		func(s *keystore.Spec, k *adminpb.Key) error {
			s.AllowedNetworks = nil
			for i, text := range k.AllowedNetworks {
				network, err := netip.ParsePrefix(text)
				if err != nil {
					return invalid("allowed_networks[%d] is not a network: "+
						"write 192.0.2.0/24, or 192.0.2.1/32 for one address", i)
				}
				s.AllowedNetworks = append(s.AllowedNetworks, network)
			}
			return nil
		},
	},
	"rate_limit": {
		func(k *adminpb.Key) bool { return k.RateLimit != nil },
		func(s *keystore.Spec, k *adminpb.Key) error {
			s.RateLimit = keystore.RateLimit{
				PerSecond: k.RateLimit.GetPerSecond(), Burst: int(k.RateLimit.GetBurst())}
			if k.RateLimit != nil && s.RateLimit == (keystore.RateLimit{}) {
				return invalid("rate_limit has neither per_second nor burst: set both, " +
					"or leave rate_limit unset for no limit")
			}
			return nil
		},
	},
}

// masked returns the fields that an update changes, in the order of the message. See
// UpdateKeyRequest.update_mask.
func masked(k *adminpb.Key, paths []string) ([]inputField, error) {
	all := len(paths) == 1 && paths[0] == "*"
	fields := k.ProtoReflect().Descriptor().Fields()
	for _, path := range paths {
		_, ok := inputFields[path]
		switch {
		case ok || all:
		case path == "*":
			return nil, invalid("update_mask has * and other paths: " +
				"give * alone to replace all fields")
		case fields.ByName(protoreflect.Name(path)) != nil:
			return nil, invalid("update_mask has the path %q: callers cannot set this field", path)
		default:
			return nil, invalid("update_mask has the path %.100q: a key has no such field", path)
		}
	}
	var masked []inputField
	for i := range fields.Len() {
		name := string(fields.Get(i).Name())
		field, ok := inputFields[name]
		if ok && (all || slices.Contains(paths, name) || len(paths) == 0 && field.isSet(k)) {
			masked = append(masked, field)
		}
	}
	return masked, nil
}
