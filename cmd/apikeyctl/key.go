package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// A key is a key as apikeyctl prints it. The JSON is part of the interface of apikeyctl: a later
// version adds fields, and changes none.
type key struct {
	ID              string            `json:"id"`
	Name            string            `json:"name"`
	Owner           string            `json:"owner"`
	State           string            `json:"state"`
	Scopes          []string          `json:"scopes"`
	Metadata        map[string]string `json:"metadata"`
	AllowedNetworks []string          `json:"allowed_networks"`
	RateLimit       *rateLimit        `json:"rate_limit"`
	Credits         *credits          `json:"credits"`
	StartTime       *time.Time        `json:"start_time"`
	ExpireTime      *time.Time        `json:"expire_time"`
	CreateTime      *time.Time        `json:"create_time"`
	LastUseTime     *time.Time        `json:"last_use_time"`
	DisableTime     *time.Time        `json:"disable_time"`
	DisableReason   string            `json:"disable_reason"`
	RevokeTime      *time.Time        `json:"revoke_time"`
	RevokeReason    string            `json:"revoke_reason"`
	PreviousUntil   *time.Time        `json:"previous_secret_expire_time"`
	LiveStreams     int32             `json:"live_streams"`
	Hint            string            `json:"hint"`
	Etag            string            `json:"etag"`
}

type rateLimit struct {
	PerSecond float64 `json:"per_second"`
	Burst     int32   `json:"burst"`
}

func (l *rateLimit) String() string {
	if l == nil {
		return ""
	}
	return fmt.Sprintf("%s/s:%d", strconv.FormatFloat(l.PerSecond, 'g', -1, 64), l.Burst)
}

// keyOf returns the key of a message.
func keyOf(m *adminpb.Key) key {
	k := key{
		ID:              strings.TrimPrefix(m.GetName(), namePrefix),
		Name:            m.GetDisplayName(),
		Owner:           m.GetOwner(),
		State:           stateWord(m.GetState()),
		Scopes:          m.GetScopes(),
		Metadata:        m.GetMetadata(),
		AllowedNetworks: m.GetAllowedNetworks(),
		StartTime:       timeOf(m.GetStartTime()),
		ExpireTime:      timeOf(m.GetExpireTime()),
		CreateTime:      timeOf(m.GetCreateTime()),
		LastUseTime:     timeOf(m.GetLastUseTime()),
		DisableTime:     timeOf(m.GetDisableTime()),
		DisableReason:   m.GetDisableReason(),
		RevokeTime:      timeOf(m.GetRevokeTime()),
		RevokeReason:    m.GetRevokeReason(),
		PreviousUntil:   timeOf(m.GetPreviousSecretExpireTime()),
		LiveStreams:     m.GetLiveStreams(),
		Credits:         creditsOf(m.GetCredits()),
		Hint:            m.GetHint(),
		Etag:            m.GetEtag(),
	}
	if l := m.GetRateLimit(); l != nil {
		k.RateLimit = &rateLimit{l.GetPerSecond(), l.GetBurst()}
	}
	// Lists are [] in JSON and maps are {}, never null.
	if k.Scopes == nil {
		k.Scopes = []string{}
	}
	if k.AllowedNetworks == nil {
		k.AllowedNetworks = []string{}
	}
	if k.Metadata == nil {
		k.Metadata = map[string]string{}
	}
	return k
}

func timeOf(m *timestamppb.Timestamp) *time.Time {
	if m == nil {
		return nil
	}
	t := m.AsTime()
	return &t
}

func (k key) ident() string { return k.ID }

func (k key) row() []field {
	return []field{
		{"ID", k.ID},
		{"NAME", k.Name},
		{"OWNER", k.Owner},
		{"STATE", k.State},
		{"EXPIRES", relative(k.ExpireTime)},
		{"USED", lastUse(k.LastUseTime)},
		{"STREAMS", strconv.Itoa(int(k.LiveStreams))},
		{"SCOPES", strings.Join(k.Scopes, ",")},
	}
}

func (k key) whole() []field {
	fields := []field{
		{"ID", k.ID},
		{"Name", k.Name},
		{"Owner", k.Owner},
		{"State", k.State},
		{"Scopes", strings.Join(k.Scopes, ", ")},
		{"Created", exact(k.CreateTime)},
		{"Not before", exact(k.StartTime)},
		{"Expires", exact(k.ExpireTime)},
		{"Last used", exactUse(k.LastUseTime)},
		{"Streams", strconv.Itoa(int(k.LiveStreams))},
		{"Networks", strings.Join(k.AllowedNetworks, ", ")},
		{"Rate", k.RateLimit.String()},
		{"Hint", k.Hint},
		{"Etag", k.Etag},
	}
	if k.Credits != nil {
		fields = append(fields, field{"Credits", k.Credits.String()})
	}
	for _, name := range slices.Sorted(maps.Keys(k.Metadata)) {
		fields = append(fields, field{"Meta " + printable(name), k.Metadata[name]})
	}
	if k.DisableTime != nil {
		fields = append(fields, field{"Disabled", exact(k.DisableTime)},
			field{"Reason", k.DisableReason})
	}
	if k.RevokeTime != nil {
		fields = append(fields, field{"Revoked", exact(k.RevokeTime)},
			field{"Reason", k.RevokeReason})
	}
	if k.PreviousUntil != nil {
		fields = append(fields, field{"Old secret until", exact(k.PreviousUntil)})
	}
	return fields
}

// A batchKey is a key of a batch. The server does not look up the last use and the open streams of
// such a key, so a batchKey has neither: a hyphen would say that the key was never used.
type batchKey struct {
	key
	LastUseTime *time.Time `json:"last_use_time,omitempty"` // nil; hides the field of key
	LiveStreams int32      `json:"live_streams,omitempty"`  // 0; hides the field of key
}

func (k batchKey) row() []field {
	return slices.DeleteFunc(k.key.row(), func(f field) bool {
		return f.name == "USED" || f.name == "STREAMS"
	})
}

// label names a key in a sentence: 01k9… (billing).
func (k key) label() string { return fmt.Sprintf("%s (%s)", k.ID, k.Name) }

// stateWord returns the word for a state: active.
func stateWord(s adminpb.State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), statePrefix))
}

// stateOf returns the state of a word, as stateWord writes it.
func stateOf(word string) (adminpb.State, error) {
	n, ok := adminpb.State_value[statePrefix+strings.ToUpper(word)]
	if !ok || n == 0 {
		return 0, usage("--state cannot be used: write active, pending, expired, disabled or revoked")
	}
	return adminpb.State(n), nil
}

const statePrefix = "STATE_"

// namePrefix begins the name of a key in the service. The rest is the ID.
const namePrefix = "keys/"

// idLength is the length of an ID.
const idLength = 26

// nameOf returns the name of a key in the service for an ID of the command line. The error does not
// repeat the argument: it may be a secret.
func nameOf(id string) (string, error) {
	text := strings.TrimPrefix(id, namePrefix)
	if len(text) == idLength && strings.Trim(text, "0123456789abcdefghjkmnpqrstvwxyz") == "" {
		return namePrefix + text, nil
	}
	return "", usage(`an argument is not the ID of a key: an ID has %d letters and digits, as in `+
		`"apikeyctl list". If it was a secret, "apikeyctl lookup" finds the ID`, idLength)
}

// plural writes a number with its noun: 1 stream, 3 streams.
func plural[N int | int32 | int64](n N, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
