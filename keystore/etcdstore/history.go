package etcdstore

import (
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A history is what a Backend knows of the sequence of etcd's revisions. If etcd is restored from a
// snapshot, etcd has another history: the same revisions mean other changes.
//
// A restored etcd has another cluster ID only if the operator chose another initial-cluster-token,
// or other peer URLs. So a history recognises a restore by three signs:
//
//  1. the cluster ID of a response is another one
//  2. the revision of a linearizable response is lower than the revision of a response that came
//     before the request was sent
//  3. a feed that continues after a position finds another change at the position
//
// Invariants:
//
//  1. A generation is one history, as far as this Backend has noticed. What the Backend remembers
//     of an earlier generation is dropped.
//  2. fed is the generation of the positions that the feeds have yielded. A feed after a position
//     of another generation returns ErrGap.
type history struct {
	mu         sync.Mutex // guards all below
	cluster    uint64     // the cluster ID of the last response
	revision   int64      // the highest revision of a linearizable response of this generation
	generation uint64
	fed        uint64

	// The last values of keys, in two halves. If the newer half is full, the newer half replaces
	// the older half. So the memory is bounded.
	newer, older map[string]version

	seed      maphash.Seed
	positions [64]position // the last positions that the feeds have yielded, a ring
	next      int          // of the ring
}

// errRestored is the reason for a call or a feed that two histories have touched.
var errRestored = errors.New("etcd was restored from a snapshot, or replaced")

// gap returns an error of a feed that wraps ErrGap.
func gap(reason error) error {
	return fmt.Errorf("etcdstore: feed: %w: %w", backend.ErrGap, reason)
}

// maxVersions is the number of values in each half of the memory.
const maxVersions = 4096

// A version is a value of a key: the revision of the entry, and etcd's ModRevision of the value.
type version struct {
	revision uint64
	mod      int64
}

// A position is a position that a feed has yielded, with one of its changes. The hash identifies
// the change.
type position struct {
	at   backend.Position // 0: the place in the ring is free
	key  string           // in etcd
	hash uint64
}

// A moment is what a Backend knew before it sent a request.
type moment struct {
	generation uint64
	revision   int64
}

// now returns the present moment. A caller calls now before it sends a request.
func (h *history) now() moment {
	h.mu.Lock()
	defer h.mu.Unlock()
	return moment{h.generation, h.revision}
}

// observe notes the header of a linearizable response. observe returns errRestored if the response
// belongs to another history than the request.
func (h *history) observe(b *Backend, before moment, header *pb.ResponseHeader) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.generation != before.generation:
		// Another call has noticed. Which of both histories this response belongs to is unknown.
	case header.ClusterId != h.cluster:
		h.restoredLocked(b, header, fmt.Sprintf("the cluster ID was %x and is %x", h.cluster,
			header.ClusterId))
	case header.Revision < before.revision:
		h.restoredLocked(b, header, fmt.Sprintf("the revision was %d and is %d", before.revision,
			header.Revision))
	default:
		h.revision = max(h.revision, header.Revision)
		return nil
	}
	return errRestored
}

// restoredLocked begins another generation.
func (h *history) restoredLocked(b *Backend, header *pb.ResponseHeader, sign string) {
	h.generation++
	h.cluster, h.revision = header.ClusterId, header.Revision
	h.newer, h.older = nil, nil
	b.log.Log(slog.LevelError, "etcd was restored from a snapshot, or replaced: changes since the "+
		"snapshot are lost, and revoked keys may be active again: restore the store's own backup "+
		"on top, or revoke the keys again", "prefix", b.prefix, "sign", sign)
}

// start notes that a feed starts at a position of a generation.
func (h *history) start(generation uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fed = generation
}

// resume returns the generation of a feed that continues after a position, or false if the position
// belongs to another generation.
func (h *history) resume() (generation uint64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.generation, h.fed == h.generation
}

// watched checks the header of a response to a watch. Its revision may be lower than that of
// another response, because each member of etcd serves watches from its own state.
func (h *history) watched(b *Backend, generation uint64, header *pb.ResponseHeader) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.generation == generation && header.GetClusterId() != h.cluster {
		h.restoredLocked(b, header, fmt.Sprintf("the cluster ID was %x and is %x", h.cluster,
			header.ClusterId))
	}
	if h.generation != generation {
		return gap(errRestored)
	}
	return nil
}

// changed begins another generation, because a feed has found the third sign.
func (h *history) changed(b *Backend, generation uint64, after backend.Position) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.generation == generation {
		h.restoredLocked(b, &pb.ResponseHeader{ClusterId: h.cluster},
			fmt.Sprintf("revision %d is another change", after))
	}
	return gap(errRestored)
}

// yielded notes a position, and one of the changes at the position.
func (h *history) yielded(generation uint64, e *mvccpb.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	at := backend.Position(e.Kv.ModRevision)
	if h.generation != generation || h.positions[(h.next+len(h.positions)-1)%len(h.positions)].at ==
		at { // two feeds of one store, in step
		return
	}
	h.positions[h.next] = position{at, string(e.Kv.Key), h.hash(e)}
	h.next = (h.next + 1) % len(h.positions)
}

// known returns the last remembered change at a position.
func (h *history) known(at backend.Position) (p position, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range h.positions {
		p := h.positions[(h.next+len(h.positions)-1-i)%len(h.positions)]
		if p.at == at && at != 0 {
			return p, true
		}
	}
	return position{}, false
}

// hash returns a number that identifies a change.
func (h *history) hash(e *mvccpb.Event) uint64 {
	var m maphash.Hash
	m.SetSeed(h.seed)
	maphash.WriteComparable(&m, struct {
		kind                 int32
		create, mod, version int64
		key                  int
	}{int32(e.Type), e.Kv.CreateRevision, e.Kv.ModRevision, e.Kv.Version, len(e.Kv.Key)})
	_, _ = m.Write(e.Kv.Key)
	_, _ = m.Write(e.Kv.Value)
	return m.Sum64()
}

// recall sets the ModRevision of each entry that the changes expect to exist, if the entry was last
// seen at the expected revision.
func (h *history) recall(changes []backend.Change, mods []int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range changes {
		v, ok := h.newer[string(changes[i].Key)]
		if !ok {
			v, ok = h.older[string(changes[i].Key)]
		}
		if ok && v.revision == changes[i].Expect {
			mods[i] = v.mod
		}
	}
}

// remember notes the values that a transaction wrote at a revision of etcd.
func (h *history) remember(generation uint64, changes []backend.Change, mod int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range changes {
		if c := &changes[i]; !c.Check && !c.Delete && h.generation == generation {
			h.noteLocked(string(c.Key), version{c.NewRevision(), mod})
		}
	}
}

// note notes the value of an entry that was read.
func (h *history) note(generation uint64, e backend.Entry, mod int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.generation == generation {
		h.noteLocked(string(e.Key), version{e.Revision, mod})
	}
}

func (h *history) noteLocked(key string, v version) {
	if known, ok := h.newer[key]; ok && known.mod > v.mod {
		return
	}
	if h.newer == nil || len(h.newer) >= maxVersions {
		h.newer, h.older = make(map[string]version), h.newer
	}
	h.newer[key] = v
}
