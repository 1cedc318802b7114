package keystore

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A migration builds the indexes of a store that a program without indexes has made or changed, and
// moves the purged keys to the graveyard. With Options.RebuildIndexes, a migration builds the
// indexes of any store again. Open waits for the end of the migration.
//
// The migration reads one key space after the other, and writes in batches. Each Apply also writes
// how far the migration has come: the phase, and the last storage key that the phase has read. So a
// migration that was killed continues exactly after its last batch.
//
// A record, a grave or an event that is damaged has no index entry, and the migration continues. If
// a later version has written a record, a grave or an event, the migration ends with an error, and
// a later version of the program continues the migration.
type migration struct {
	store    *Store
	state    storeState
	revision uint64 // of the state in the backend; 0: the backend has no state

	rebuild bool // a rebuild has to begin: see Options.RebuildIndexes
	batch   []backend.Change
	alone   []backend.Change // the Check that no other process has the store open, or nothing
	cursor  []byte           // the last storage key that the batch covers
	read    int              // the entries that this process has read
	damaged int              // the records and events that cannot be read, and so have no index entry
	logged  time.Time
}

// errMoved means that another store has continued the migration.
var errMoved = errors.New("another store has continued the migration")

// migrate makes sure that the store has complete indexes. A recovery that may have lost index
// entries has also removed the state, so that migrate builds the indexes again.
func (s *Store) migrate(ctx context.Context) error {
	began := time.Now()
	rebuild := s.rebuildIndexes
	for attempt := 0; ; attempt++ {
		m := &migration{store: s, logged: time.Now(), rebuild: rebuild}
		needed, err := m.resume(ctx)
		if err == nil && needed {
			err = m.run(ctx)
		}
		// If another store has continued the rebuild, the rebuild does not begin again.
		rebuild = m.rebuild
		if !errors.Is(err, errMoved) {
			s.indexedSince = m.state.index.since
			return err
		}
		switch {
		case s.processes == nil && attempt+1 == changeAttempts:
			return wrapErr(buildingIndex, errors.New("too much contention on the indexes"))
		case s.processes != nil && s.timeout > 0 && time.Since(began) > s.timeout:
			return wrapErr(buildingIndex, errOtherBuilds)
		}
	}
}

var errOtherBuilds = errors.New("another process builds the indexes of the store: " +
	"open the store again when that process has finished")

// awaitOther returns errMoved if another process works on the migration, and otherwise nil: the
// process that has begun the migration has died. A live process writes more often than
// migrationPause.
func (m *migration) awaitOther(ctx context.Context) error {
	if m.store.processes == nil {
		return nil // only one Store has the backend open
	}
	time.Sleep(migrationPause)
	ctx, cancel := m.store.limited(ctx)
	defer cancel()
	e, _, err := m.store.readState(ctx)
	if err == nil && e.Revision != m.revision {
		err = errMoved
	}
	return err
}

const migrationPause = 2 * time.Second

// buildingIndex is the operation that errors name.
const buildingIndex = "build the indexes"

// resume reads how far the migration has come, and reports whether anything is left to do.
func (m *migration) resume(ctx context.Context) (needed bool, err error) {
	s := m.store
	e, err := s.backend.Get(ctx, stateKey)
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return false, s.scanError(ctx, buildingIndex, err)
	}
	m.revision = e.Revision
	if m.state, err = parseState(e); err != nil {
		m.state = storeState{since: time.Now()} // there is no state, or the state is damaged
	}
	index := &m.state.index
	switch {
	case index.version > indexVersion:
		return false, invalid("the store has indexes of version %d, and this program knows "+
			"version %d: upgrade the program", index.version, indexVersion)
	case index.version == indexVersion && index.phase != phaseDone:
		return true, m.awaitOther(ctx)
	case index.version == indexVersion && !m.rebuild:
		return false, nil
	case index.version == indexVersion:
		return true, m.beginRebuild(ctx)
	}
	*index = indexState{version: indexVersion, phase: phaseKeys, since: time.Now().UnixNano()}
	remains, err := m.has(ctx, eventIndexSpace, ownerIndexSpace)
	if err != nil {
		return false, err
	}
	if remains {
		index.phase = phaseClear
		return true, m.write(ctx)
	}
	needed, err = m.has(ctx, keySpace, eventSpace)
	if !needed {
		// A store without keys and events has complete indexes. resumeUsage writes the state.
		*index = completeIndexes(0)
	}
	return needed, err
}

// beginRebuild writes that the indexes are to be built again. During the rebuild, another process
// would miss keys. So no other process may have the store open. A process that opens the store
// afterwards waits for the end of the rebuild.
func (m *migration) beginRebuild(ctx context.Context) error {
	if p := m.store.processes; p != nil {
		alone, err := p.cluster.Alone(ctx)
		if errors.Is(err, cluster.ErrNotAlone) {
			return invalid("Options.RebuildIndexes is set, but another process has the store " +
				"open: close the store in the other processes first")
		}
		if err != nil {
			return m.store.scanError(ctx, buildingIndex, err)
		}
		m.alone = []backend.Change{alone}
	}
	m.state.index = indexState{version: indexVersion, phase: phaseClear,
		since: time.Now().UnixNano()}
	err := m.write(ctx)
	m.rebuild, m.alone = m.rebuild && err != nil, nil
	return err
}

// has reports whether one of the key spaces has an entry.
func (m *migration) has(ctx context.Context, spaces ...byte) (bool, error) {
	for _, space := range spaces {
		from, to := spaceOf(space)
		for _, err := range m.store.backend.Scan(ctx, from, to) {
			if err != nil {
				return false, m.store.scanError(ctx, buildingIndex, err)
			}
			return true, nil
		}
	}
	return false, nil
}

func (m *migration) run(ctx context.Context) error {
	began := time.Now()
	m.store.log.Info("API key store builds its indexes, once; Open waits until the indexes are " +
		"complete")
	for m.state.index.phase != phaseDone {
		var err error
		switch m.state.index.phase {
		case phaseClear:
			if err = m.each(ctx, eventIndexSpace, m.clear); err == nil {
				err = m.each(ctx, ownerIndexSpace, m.clear)
			}
		case phaseKeys:
			err = m.each(ctx, keySpace, m.indexKey)
		case phaseEvents:
			err = m.each(ctx, eventSpace, m.indexEvent)
		}
		if err == nil {
			err = m.finishPhase(ctx)
		}
		if err != nil {
			return err
		}
	}
	if m.damaged > 0 {
		m.store.log.Error("API key store has damaged entries that its indexes do not lead to: "+
			"call CheckIntegrity", "entries", m.damaged)
	}
	m.store.log.Info("API key store has built its indexes", "entries read", m.read, "took",
		time.Since(began))
	return nil
}

// each calls change for each entry of a key space after the cursor, and writes the changes that
// change returns.
func (m *migration) each(
	ctx context.Context, space byte,
	change func(context.Context, backend.Entry) ([]backend.Change, error),
) error {
	s := m.store
	from, to := spaceOf(space)
	if cursor := m.state.index.cursor; cursor != nil {
		// The cursor may be in the key space before, if two spaces share a phase.
		next := append(slices.Clone(cursor), 0) // the smallest storage key after the cursor
		if bytes.Compare(next, from) > 0 {
			from = next
		}
	}
	for e, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return s.scanError(ctx, buildingIndex, err)
		}
		changes, err := change(ctx, e)
		if errors.Is(err, record.ErrNewer) {
			// The indexes would lack the entry, so that RevokeAll would miss the key.
			return invalid("the store was written by a later version of the library: " +
				"upgrade the program")
		}
		if errors.Is(err, ErrCorrupt) {
			m.damaged++
			changes, err = nil, nil
		}
		if err != nil {
			return err
		}
		if len(m.batch)+len(changes) >= backend.MaxChanges { // one more change is of the state
			if err := m.write(ctx); err != nil {
				return err
			}
		}
		m.batch = append(m.batch, changes...)
		m.cursor = e.Key
		if m.read++; m.read%1024 == 0 && time.Since(m.logged) > 5*time.Second {
			m.logged = time.Now()
			s.log.Info("API key store builds its indexes", "entries read", m.read)
		}
	}
	return nil
}

// finishPhase writes the rest of a phase, and begins the next phase.
func (m *migration) finishPhase(ctx context.Context) error {
	m.state.index.phase++
	m.cursor = nil
	return m.write(ctx)
}

// write writes the batch and the state. If the backend does not have the expected state, write
// returns errMoved.
func (m *migration) write(ctx context.Context) error {
	m.state.index.cursor = m.cursor
	err := m.apply(ctx)
	if errors.Is(err, backend.ErrConflict) {
		// An index entry may exist already, after a write whose outcome was unknown.
		if m.batch, err = m.missing(ctx); err == nil {
			err = m.apply(ctx)
		}
	}
	if errors.Is(err, backend.ErrConflict) {
		return errMoved
	}
	if err != nil {
		return m.store.scanError(ctx, buildingIndex, err)
	}
	m.revision++
	m.batch = m.batch[:0]
	return nil
}

func (m *migration) apply(ctx context.Context) error {
	ctx, cancel := m.store.limited(ctx)
	defer cancel()
	// Restricts is set because RevokeAll depends on the indexes.
	state := backend.Change{Key: stateKey, Value: m.state.encode(), Expect: m.revision,
		Restricts: true}
	return m.store.backend.Apply(ctx, append(append(m.batch, m.alone...), state)...)
}

// missing returns the changes of the batch that are still to be made.
func (m *migration) missing(ctx context.Context) ([]backend.Change, error) {
	var kept []backend.Change
	for _, c := range m.batch {
		e, err := m.store.backend.Get(ctx, c.Key)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return nil, err
		}
		indexes := c.Key[0] == ownerIndexSpace || c.Key[0] == eventIndexSpace
		if !indexes || c.Delete == (e.Revision > 0) {
			kept = append(kept, c)
		}
	}
	return kept, nil
}

// clear removes an index entry.
func (m *migration) clear(_ context.Context, e backend.Entry) ([]backend.Change, error) {
	return []backend.Change{{Key: e.Key, Expect: e.Revision, Delete: true}}, nil
}

// indexKey indexes a key by its owner. A purged key moves to the graveyard.
func (m *migration) indexKey(ctx context.Context, e backend.Entry) ([]backend.Change, error) {
	kr, err := parseKeyRecord(e)
	if err != nil {
		return nil, err
	}
	remove := backend.Change{Key: e.Key, Expect: e.Revision, Delete: true}
	grave, err := m.store.readGrave(ctx, kr.id)
	if errors.Is(err, ErrCorrupt) && !errors.Is(err, record.ErrNewer) && !kr.purged() {
		// Verify admits the key whatever the grave holds, so RevokeAll must find the key.
		m.damaged++
		grave, err = &keyRecord{id: kr.id}, nil
	}
	switch {
	case err != nil:
		return nil, err
	case grave.record != nil:
		// A program without indexes does not read the graveyard, and has restored a purged key.
		return []backend.Change{remove}, nil
	case kr.purged():
		bury := backend.Change{
			Key: graveKey(kr.id), Value: e.Value,
			Expect: grave.revision, Revision: max(e.Revision, grave.revision+1),
		}
		return []backend.Change{remove, bury}, nil
	case kr.record.Owner == "":
		return nil, nil
	}
	return []backend.Change{{Key: ownerKey(kr.record.Owner, kr.id)}}, nil
}

// indexEvent indexes an event by its key. After a migration, all events have index entries.
func (m *migration) indexEvent(_ context.Context, e backend.Entry) ([]backend.Change, error) {
	event, err := parseEvent(e)
	if err != nil {
		return nil, err
	}
	key := eventIndexKey(token.ID(event.KeyId), stampOf(e.Key))
	return []backend.Change{{Key: key}}, nil
}
