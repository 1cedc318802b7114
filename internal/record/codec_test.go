package record

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func valid() *Record {
	return &Record{
		Format: Format, Status: Status_STATUS_ACTIVE, DigestScheme: "sha256",
		Digest: make([]byte, 32),
		Prefix: "oil", Name: "ci", Owner: "team", Scopes: []string{"a", "b"},
		Metadata:  map[string]string{"k": "v", "a": "b"},
		CreatedAt: 1, ExpiresAt: 2,
	}
}

func TestRoundTrip(t *testing.T) {
	b, err := Encode(valid())
	require.NoError(t, err)
	got, err := Decode(b)
	require.NoError(t, err)
	require.True(t, proto.Equal(valid(), got))

	again, err := Encode(got)
	require.NoError(t, err)
	require.Equal(t, b, again, "a record has exactly one encoding")
}

func TestIsRevoked(t *testing.T) {
	r := valid()
	live, err := Encode(r)
	require.NoError(t, err)
	require.False(t, IsRevoked(live))
	require.False(t, IsRevoked(nil), "of a deleted entry")
	r.Status, r.RevokedAt, r.RevokeReason = Status_STATUS_REVOKED, 5, "why"
	revoked, err := Encode(r)
	require.NoError(t, err)
	require.True(t, IsRevoked(revoked))
	require.True(t, IsRevoked(AppendLastStamp(revoked, 7)))
	require.False(t, IsRevoked(append(revoked, live...)[:len(revoked)+1]), "the end is missing")
	again := protowire.AppendTag(revoked, revokedAtNumber, protowire.VarintType)
	require.False(t, IsRevoked(protowire.AppendVarint(again, 0)), "the last value counts")
}

func TestDecodeRefusesUnusableRecords(t *testing.T) {
	for name, spoil := range map[string]func(*Record){
		"no format":            func(r *Record) { r.Format = 0 },
		"newer format":         func(r *Record) { r.Format = FormatCredits + 1 },
		"no status":            func(r *Record) { r.Status = 0 },
		"unknown status":       func(r *Record) { r.Status = 9 },
		"no digest":            func(r *Record) { r.Digest = nil },
		"no scheme":            func(r *Record) { r.DigestScheme = "" },
		"no creation time":     func(r *Record) { r.CreatedAt = 0 },
		"revoked, no time":     func(r *Record) { r.Status = Status_STATUS_REVOKED },
		"active, revoked once": func(r *Record) { r.RevokedAt = 5 },
		"disabled, revoked too": func(r *Record) {
			r.Status, r.DisabledAt, r.RevokedAt = Status_STATUS_DISABLED, 5, 5
		},
		"disabled, no time": func(r *Record) { r.Status = Status_STATUS_DISABLED },
		"previous, no digest": func(r *Record) {
			r.Rotations, r.Previous = 1, &Previous{DigestScheme: "s", Until: 5}
		},
		"previous, no end": func(r *Record) {
			r.Rotations, r.Previous = 1, &Previous{DigestScheme: "s", Digest: r.Digest}
		},
		"previous, no rotation": func(r *Record) {
			r.Previous = &Previous{DigestScheme: "s", Digest: r.Digest, Until: 5}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := valid()
			spoil(r)
			b, err := proto.Marshal(r)
			require.NoError(t, err)
			_, err = Decode(b)
			require.ErrorIs(t, err, ErrInvalid)
		})
	}
	_, err := Decode(nil)
	require.ErrorIs(t, err, ErrInvalid)
	_, err = Decode([]byte{0xff, 0xff})
	require.ErrorIs(t, err, ErrInvalid)
	_, err = Encode(&Record{})
	require.ErrorIs(t, err, ErrInvalid)
}

// A field of a later version must survive when this version rewrites the record.
func TestUnknownFieldsSurvive(t *testing.T) {
	b, err := Encode(valid())
	require.NoError(t, err)
	b = protowire.AppendTag(b, 900, protowire.BytesType)
	b = protowire.AppendString(b, "from the future")

	r, err := Decode(b)
	require.NoError(t, err)
	r.Name = "renamed"
	rewritten, err := Encode(r)
	require.NoError(t, err)
	require.Contains(t, string(rewritten), "from the future")
}

func FuzzDecode(f *testing.F) {
	b, err := Encode(valid())
	require.NoError(f, err)
	f.Add(b)
	f.Add([]byte{})
	f.Add(b[:len(b)/2])
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if err != nil {
			require.ErrorIs(t, err, ErrInvalid)
			require.Nil(t, r)
			return
		}
		require.Equal(t, r.RevokedAt != 0, IsRevoked(b))
		again, err := Encode(r)
		require.NoError(t, err, "Encode accepts every record that Decode returns")
		back, err := Decode(again)
		require.NoError(t, err)
		require.True(t, proto.Equal(r, back))
	})
}

// A program panics at start if two linked packages register a proto file with the same name. The
// server of etcd registers a "record.proto".
func TestDescriptorNameIsUnique(t *testing.T) {
	require.Equal(t, "grpcapikey/record/v1/record.proto",
		File_grpcapikey_record_v1_record_proto.Path())
}

func TestMemberTable(t *testing.T) {
	member := &Member{Heartbeat: 1, Applied: 2, Request: 3, Floor: 4, Watermark: 5, Name: "a", Time: 6}
	b, err := EncodeMember(member)
	require.NoError(t, err)
	gotMember, err := DecodeMember(b)
	require.NoError(t, err)
	require.True(t, proto.Equal(member, gotMember))

	table := &MemberTable{Freshness: 1, Floor: 2}
	b, err = EncodeMemberTable(table)
	require.NoError(t, err)
	gotTable, err := DecodeMemberTable(b)
	require.NoError(t, err)
	require.True(t, proto.Equal(table, gotTable))

	for name, b := range map[string][]byte{
		"empty":     nil,
		"no format": protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 1),
		"no proto":  []byte("record"),
	} {
		_, err = DecodeMember(b)
		require.ErrorIs(t, err, ErrInvalid, name)
		_, err = DecodeMemberTable(b)
		require.ErrorIs(t, err, ErrInvalid, name)
	}
	b, err = EncodeMemberTable(&MemberTable{})
	require.NoError(t, err)
	_, err = DecodeMemberTable(b)
	require.ErrorIs(t, err, ErrInvalid, "a header needs a freshness")

	newer := protowire.AppendVarint(
		protowire.AppendTag(nil, 1, protowire.VarintType), Format+1)
	_, err = DecodeMember(newer)
	require.ErrorIs(t, err, ErrNewer)
	_, err = DecodeMemberTable(newer)
	require.ErrorIs(t, err, ErrNewer)
	_, err = DecodeEvent(newer)
	require.ErrorIs(t, err, ErrNewer)
}
