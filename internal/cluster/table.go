package cluster

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The layout of the membership table, in the order of the storage keys:
//
//	'm'          the header: a record.MemberTable
//	'm' id[16]   the member record: a record.Member
//	'n' id[16]   the guard entry: nothing; always at revision 1
//
// The ID is new for each membership, and is never used again. The feed has the keys with
// feedFrom <= key < feedTo: the records of API keys ('k'), and the membership table.
const (
	memberSpace = 'm'
	guardSpace  = 'n'

	feedFrom = 'k'
	feedTo   = guardSpace

	memberKeyLen  = 1 + 16
	guardRevision = 1
)

func (m *membership) memberKey() []byte { return append([]byte{memberSpace}, m.id[:]...) }
func (m *membership) guardKey() []byte  { return guardKeyOf(m.memberKey()) }

// guardKeyOf returns the key of the guard entry of the member with this key.
func guardKeyOf(memberKey []byte) []byte {
	key := bytes.Clone(memberKey)
	key[0] = guardSpace
	return key
}

func memberID(memberKey []byte) string { return string(memberKey[1:]) }

// A member is what this process knows of a member of the table.
type member struct {
	revision  uint64
	heartbeat uint64
	applied   backend.Position
	request   uint64
	floor     int64
	watermark int64
	last      int64
	time      int64 // the wall clock of the member when the record was written
	name      string
	lastSeen  int64 // when this process saw the revision, on its monotonic clock
	damaged   error // why the record cannot be used, or nil
}

// parseMember parses a member record that the feed has delivered at a position. A damaged record
// counts as a member that has acked nothing. The damage ends with the next heartbeat of the member.
// Without a next heartbeat, the member is evicted.
//
// A member writes its record after it has applied what the record acks. So an ack of the position
// of the record itself, or of a later position, is damage. A record that was read from the table
// has the position 0, and acks nothing: all requests of this membership are made later.
func parseMember(e backend.Entry, at backend.Position, now int64) *member {
	r, err := record.DecodeMember(e.Value)
	if err == nil && at != 0 && r.Applied >= uint64(at) {
		err = fmt.Errorf("%w: the record acks a position after its own", record.ErrInvalid)
	}
	if err != nil {
		return &member{revision: e.Revision, lastSeen: now, damaged: err}
	}
	if at == 0 {
		r.Applied = 0
	}
	return &member{
		revision: e.Revision, heartbeat: r.Heartbeat, applied: backend.Position(r.Applied),
		request: r.Request, floor: r.Floor, watermark: r.Watermark, last: r.Last, time: r.Time,
		name: r.Name, lastSeen: now,
	}
}

// memberChangedLocked notes a change of a member record at a position. own means that the record is
// the record of this process. requested means that the member waits for an ack of a new request.
func (m *membership) memberChangedLocked(
	e backend.Entry, at backend.Position,
) (own, requested bool) {
	id := memberID(e.Key)
	own = id == string(m.id[:])
	if e.Revision == 0 {
		delete(m.members, id)
		m.goneLocked(id)
		return own, false
	}
	known := m.members[id]
	if known != nil && known.revision >= e.Revision {
		// The Scan of begin has read this state, or a later state. The feed has now reached the
		// request of this state, if there is one.
		return own, known.revision == e.Revision && known.request > 0
	}
	now := m.cfg.Clock()
	other := parseMember(e, at, now.Mono)
	m.members[id] = other
	if other.damaged != nil && (known == nil || known.damaged == nil) {
		m.damaged = append(m.damaged, damagedMember{e.Key, other.damaged})
	}
	m.raiseFloorLocked(other.floor)
	m.latest = max(m.latest, other.last)
	m.ackedLocked(id, other)
	m.checkClockLocked(other, now.Wall)
	return own, other.request > 0 && (known == nil || other.request > known.request)
}

// A damagedMember is a member record that cannot be used.
type damagedMember struct {
	key []byte
	err error
}

// reportDamage logs damaged member records. The caller does not hold the lock.
func (m *membership) reportDamage(all ...damagedMember) {
	for _, d := range all {
		m.log.Warn("API key store found a damaged member record: the record acks nothing, and is "+
			"removed if its process does not write it again", "entry", hex.EncodeToString(d.key),
			"error", d.err)
	}
}

// raiseFloorLocked notes a floor of any process. The heartbeat writer passes the floor to Stamps.
func (m *membership) raiseFloorLocked(floor int64) { m.floor = max(m.floor, floor) }

// stamps calls Config.Stamps.
func (m *membership) stamps(floor int64) (watermark, last int64) {
	if m.cfg.Stamps == nil {
		return floor, 0
	}
	return m.cfg.Stamps(floor)
}

// A header is the entry that all members agree on.
type header struct {
	revision  uint64 // 0: the store has no header
	freshness time.Duration
	floor     int64 // the highest floor of the members that are gone
}

// readHeader reads the header. A new store has the zero header.
func (m *membership) readHeader(ctx context.Context) (header, error) {
	e, err := m.cfg.Backend.Get(ctx, []byte{memberSpace})
	if errors.Is(err, backend.ErrNotFound) {
		return header{}, nil
	}
	if err == nil {
		return parseHeader(e)
	}
	if errors.Is(err, backend.ErrCorrupt) {
		err = damagedHeader(err)
	}
	return header{}, fmt.Errorf("cluster: read the header of the membership table: %w", err)
}

func parseHeader(e backend.Entry) (header, error) {
	t, err := record.DecodeMemberTable(e.Value)
	if err != nil && !errors.Is(err, record.ErrNewer) {
		err = damagedHeader(err)
	}
	if err != nil {
		return header{}, fmt.Errorf("cluster: header of the membership table: %w", err)
	}
	return header{e.Revision, time.Duration(t.Freshness), t.Floor}, nil
}

// errHeader means that the header is damaged. No process can join until a person deletes the
// header, because a process that joins must know the D of the members.
var errHeader = fmt.Errorf("%w: stop all processes of the store, delete the entry %q, and start "+
	"the processes again: the first process writes the entry anew", backend.ErrCorrupt,
	string(memberSpace))

func damagedHeader(err error) error { return fmt.Errorf("%w: %w", errHeader, err) }

// change returns the Change that writes the header, if the header is still at its revision.
func (h header) change() (backend.Change, error) {
	value, err := record.EncodeMemberTable(
		&record.MemberTable{Freshness: int64(h.freshness), Floor: h.floor})
	return backend.Change{
		Key: []byte{memberSpace}, Value: value, Expect: h.revision, Restricts: true,
	}, err
}

// headerChangedLocked notes a change of the header. A header that is damaged or deleted stops no
// member: the next process that joins reports the damage, or writes a new header. The next removal
// of a member that raises the floor replaces a damaged header.
func (m *membership) headerChangedLocked(e backend.Entry) {
	switch {
	case e.Revision == 0:
		m.header = header{}
		return
	case e.Revision <= m.header.revision:
		return
	}
	h, err := parseHeader(e)
	if err != nil {
		m.header.revision = e.Revision
		return
	}
	m.header = h
	m.raiseFloorLocked(h.floor)
}
