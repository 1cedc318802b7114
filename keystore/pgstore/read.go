package pgstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// pageEntries is the largest number of entries that one request of a scan reads.
const pageEntries = 256

// Get implements backend.Backend. Before Get returns ErrNotFound, Get waits for a commit: see
// absence.
func (b *Backend) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return backend.Entry{}, err
	}
	defer end()
	key = append([]byte{}, key...)
	if v, ok := b.history.latest(b.unreplicated); ok {
		row, shown, err := b.getSoon(joined, v, key)
		switch {
		case err != nil:
			return backend.Entry{}, b.wrap(ctx, "read", err)
		case shown:
			return b.found(ctx, joined, key, row.value, row.revision)
		}
	}
	var value []byte
	var revision *int64
	err = b.read(joined, func(q querier, s *state) error {
		return q.QueryRow(joined, b.sql.get, int64(s.replicated.at), key).Scan(&s.standby,
			&s.position, &s.tag, &s.deleted, &value, &revision, &s.written)
	})
	if err != nil {
		return backend.Entry{}, b.wrap(ctx, "read", err)
	}
	return b.found(ctx, joined, key, value, revision)
}

// found is entry for a key that may have no entry. joined is the context of Calls.Begin.
func (b *Backend) found(
	ctx, joined context.Context, key, value []byte, revision *int64,
) (backend.Entry, error) {
	switch {
	case revision != nil:
		return b.entry(key, value, *revision)
	case b.unreplicated:
		return backend.Entry{}, backend.ErrNotFound
	}
	present, err := b.confirmAbsent(joined, key)
	if err != nil {
		return backend.Entry{}, b.wrap(ctx, "read", err)
	}
	return b.presentEntry(present, key)
}

// presentEntry returns the entry of a key in the result of confirmAbsent, or ErrNotFound.
func (b *Backend) presentEntry(
	present map[string]backend.Entry, key []byte,
) (backend.Entry, error) {
	e, ok := present[string(key)]
	if !ok {
		return backend.Entry{}, backend.ErrNotFound
	}
	return b.entry(key, slices.Clone(e.Value), int64(e.Revision))
}

// getSoon reads an entry, and whether the read is enough: the server has the view, as check
// requires, and the entry is replicated, as isReplicated requires. If there is no entry, the log
// may have a deletion that is not replicated.
func (b *Backend) getSoon(
	ctx context.Context, v view, key []byte,
) (row soonRow, ok bool, err error) {
	conn, err := b.pool.Acquire(ctx)
	if err != nil {
		return row, false, err
	}
	defer conn.Release()
	isReplicated := func() bool {
		return b.unreplicated ||
			row.written != nil && backend.Position(*row.written) <= v.replicated.at
	}
	seen := b.seenBy(conn.Conn().PgConn())
	if seen.view == v {
		sql := b.sql.getSeen
		if b.unreplicated { // only then is a row without an entry enough
			sql = b.sql.getSeenOrNone
		}
		err = conn.QueryRow(ctx, sql, key).Scan(&row)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return row, false, nil
		case err != nil:
			return row, false, err
		case row.server == seen.server:
			return row, isReplicated(), nil
		}
		row = soonRow{}
	}
	err = conn.QueryRow(ctx, b.sql.getSoon, int64(v.delivered.at), int64(v.replicated.at), key).
		Scan(&row)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return row, false, nil
	case err != nil || row.standby,
		row.delivered != v.delivered.tag, row.replicated != v.replicated.tag:
		return row, false, err
	}
	if row.server != (server{}) {
		*seen = seenView{v, row.server}
	}
	return row, isReplicated(), nil
}

// A server identifies a process of a server, and so the server since its last start: the time of
// the start, and the number of the process. The zero server is unknown.
type server [12]byte

// A seenView is a view that a read has found in the log of a server, while the server was a
// primary. Each later read from the server shows everything up to the view: a primary forgets no
// change, and becomes a standby only when the server is started again. So a read of one entry looks
// for a view in the log once for each connection.
//
// A connection leads to one process of a server. Each read compares the process too, in case there
// is a pooler that Open has not noticed.
type seenView struct {
	view   view
	server server
}

// seenBy returns what the last read with a connection of the pool has found in the log of this
// schema. The caller has acquired the connection.
func (b *Backend) seenBy(conn *pgconn.PgConn) *seenView {
	data := conn.CustomData()
	s, ok := data[b.seenKey].(*seenView)
	if !ok {
		s = new(seenView)
		data[b.seenKey] = s
	}
	return s
}

// A soonRow is the row of the statements getSeen, getSeenOrNone and getSoon. Only getSoon sets
// standby and the tags of the view. getSoon has no row if the log does not have a position of the
// view.
type soonRow struct {
	server            server // zero if the format is not binary
	value             []byte
	revision, written *int64 // nil: there is no entry
	standby           bool
	delivered         tag
	replicated        tag

	numbers [2]int64 // what revision and written point to
}

// ScanRow implements pgx.RowScanner. ScanRow decodes the binary format itself: for each call, pgx
// would look for a way from each type of PostgreSQL to each Go type. The caller's configuration of
// the pool may make pgx use the text format, and then pgx decodes the row.
func (r *soonRow) ScanRow(rows pgx.Rows) error {
	raw := rows.RawValues()
	for _, f := range rows.FieldDescriptions() {
		if f.Format != pgx.BinaryFormatCode {
			return rows.Scan([]any{nil, nil, &r.value, &r.revision, &r.written, &r.standby,
				&r.delivered, &r.replicated}[:len(raw)]...)
		}
	}
	const seen, soon = 5, 8 // columns
	if len(raw) != seen && len(raw) != soon || len(raw[0]) != 8 || len(raw[1]) != 4 {
		return errRowForm
	}
	copy(r.server[:8], raw[0])
	copy(r.server[8:], raw[1])
	if raw[2] != nil {
		r.value = append([]byte{}, raw[2]...)
	}
	for i, number := range []**int64{&r.revision, &r.written} {
		switch n := raw[3+i]; len(n) {
		case 8:
			r.numbers[i] = int64(binary.BigEndian.Uint64(n))
			*number = &r.numbers[i]
		case 0: // null
		default:
			return errRowForm
		}
	}
	if len(raw) == soon {
		if len(raw[5]) != 1 || len(raw[6]) != len(tag{}) || len(raw[7]) != len(tag{}) {
			return errRowForm
		}
		r.standby = raw[5][0] != 0
		r.delivered, r.replicated = tag(raw[6]), tag(raw[7])
	}
	return nil
}

var errRowForm = errors.New("the server has sent a row of an unknown form")

// GetAll implements backend.AllGetter. GetAll is one round trip. If entries are missing, GetAll
// also waits for one commit, as Get does: see absence.
func (b *Backend) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	if len(keys) > backend.MaxChanges {
		return nil, fmt.Errorf("pgstore: read %d keys at once: at most %d are allowed", len(keys),
			backend.MaxChanges)
	}
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	entries := make([]backend.Entry, len(keys))
	if len(keys) == 0 {
		return entries, nil
	}
	wanted := make([][]byte, len(keys)) // a nil key would be the null of SQL
	for i, key := range keys {
		wanted[i] = append([]byte{}, key...)
	}
	var damage error
	err = b.read(joined, func(q querier, s *state) error {
		rows, err := q.Query(joined, b.sql.getAll, int64(s.replicated.at), wanted)
		if err != nil {
			return err
		}
		damage = nil
		var n int
		var value []byte
		var revision, written *int64
		_, err = pgx.ForEachRow(rows, []any{&s.standby, &s.position, &s.tag, &s.deleted, &n,
			&value, &revision, &written}, func() error {
			entries[n-1] = backend.Entry{}
			if revision == nil || damage != nil {
				return nil
			}
			s.wrote(written)
			entries[n-1], damage = b.entry(wanted[n-1], value, *revision)
			return nil
		})
		return err
	})
	if err == nil && damage == nil {
		damage, err = b.confirmMissing(joined, wanted, entries)
	}
	switch {
	case err != nil:
		return nil, b.wrap(ctx, "read", err)
	case damage != nil:
		return nil, damage
	}
	return entries, nil
}

// confirmMissing confirms that the entries with revision 0 do not exist, or sets these entries.
// damage is the error of a damaged entry.
func (b *Backend) confirmMissing(
	ctx context.Context, keys [][]byte, entries []backend.Entry,
) (damage, err error) {
	var missing [][]byte
	for i := range entries {
		if entries[i].Revision == 0 {
			missing = append(missing, keys[i])
		}
	}
	if len(missing) == 0 || b.unreplicated {
		return nil, nil
	}
	present, err := b.confirmAbsent(ctx, missing...)
	if err != nil {
		return nil, err
	}
	for i := range entries {
		if entries[i].Revision != 0 {
			continue
		}
		entries[i], damage = b.presentEntry(present, keys[i])
		if damage != nil && !errors.Is(damage, backend.ErrNotFound) {
			return damage, nil
		}
	}
	return nil, nil
}

// A querier is a pool or a transaction.
type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// A state says from which server, and from which time, a read comes.
type state struct {
	delivered  backend.Position // before the read began
	replicated mark             // before the read began

	standby  bool
	position int64  // of the last change
	tag      *tag   // at the position of replicated; nil: the log has no such row
	deleted  *int64 // the position of the last deletion, if it is after that of replicated, or nil
	written  *int64 // the position of the last entry; nil: none
}

func (b *Backend) newState() *state {
	s := new(state)
	_, s.delivered, s.replicated = b.history.now()
	return s
}

// check returns an error if the read lacks changes that a feed has delivered. A pool may reach
// another server than before.
func (s *state) check() error {
	switch {
	case s.standby:
		return errStandby
	case backend.Position(s.position) < s.delivered:
		return fmt.Errorf("the server has the changes up to position %d, and the feed has "+
			"delivered %d: the server was restored, or the connection leads to another server",
			s.position, s.delivered)
	}
	return nil
}

// wrote notes the position of an entry that was read.
func (s *state) wrote(at *int64) {
	if s.written == nil || *at > *s.written {
		s.written = at
	}
}

// isReplicated reports whether what was read is known to be replicated: see history.
func (s *state) isReplicated() bool {
	known := func(at *int64) bool {
		return at == nil || backend.Position(*at) <= s.replicated.at
	}
	return s.tag != nil && *s.tag == s.replicated.tag && known(s.deleted) && known(s.written)
}

// read makes a read with the pool. If the read may show a change that could still be lost, read
// makes the read again, with confirm.
func (b *Backend) read(ctx context.Context, do func(querier, *state) error) error {
	s := b.newState()
	if err := do(b.pool, s); err != nil {
		return err
	}
	if err := s.check(); err != nil {
		b.isBehind()
		return err
	}
	if b.unreplicated || s.isReplicated() {
		return nil
	}
	if s.tag != nil && *s.tag != s.replicated.tag {
		// The server was deposed, or the store was restored. Other connections of the pool may lead
		// to the same server.
		b.pool.Reset()
	}
	return b.confirm(ctx, do)
}

// confirm makes a read in a transaction that commits, and so waits for the standby. The commit
// follows all that the read has seen, so the standby has all of it.
func (b *Backend) confirm(ctx context.Context, do func(querier, *state) error) error {
	for attempt := 1; ; attempt++ {
		broken, err := b.tryConfirm(ctx, do)
		if err == nil || !broken || ctx.Err() != nil || attempt == maxAttempts {
			return err
		}
	}
}

// tryConfirm also reports whether the connection has broken.
func (b *Backend) tryConfirm(
	ctx context.Context, do func(querier, *state) error,
) (broken bool, err error) {
	conn, err := b.own.Acquire(ctx)
	if err != nil {
		return false, err
	}
	defer conn.Release()
	received := stateOf(conn.Conn().PgConn())
	received.warning = ""
	generation, _, _ := b.history.now()
	s := b.newState()
	var at int64
	var m mark
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead},
		func(tx pgx.Tx) error {
			var standbys string
			if err := tx.QueryRow(ctx, b.sql.mark).Scan(&s.position, &m.tag, &standbys); err != nil {
				return err
			}
			at = s.position
			if err := do(tx, s); err != nil {
				return err
			}
			if standbys == "" && !b.unreplicated {
				return errors.New("synchronous_standby_names is empty: " + adviceUnreplicated)
			}
			if err := s.check(); err != nil {
				b.isBehind()
				return err
			}
			// Without a write, the commit would wait for nothing.
			_, err := tx.Exec(ctx, "select pg_logical_emit_message(true, 'pgstore', '')")
			return err
		})
	if err == nil && received.warning != "" {
		err = fmt.Errorf("PostgreSQL has warned: %s", received.warning)
	}
	if ctx.Err() != nil {
		b.writes.reset()
	}
	if err != nil {
		return conn.Conn().IsClosed(), err
	}
	m.at = backend.Position(at)
	b.history.confirmed(generation, m)
	return false, nil
}

// entry returns an entry of the table. If the entry is damaged, entry returns an error that wraps
// ErrCorrupt.
func (b *Backend) entry(key, value []byte, revision int64) (backend.Entry, error) {
	if revision == 0 || value == nil || len(key) == 0 {
		return backend.Entry{}, fmt.Errorf("pgstore: %w: entry %x in the schema %q has no revision "+
			"or no value: another program has written the entry", backend.ErrCorrupt, key, b.schema)
	}
	return backend.Entry{Key: key, Value: value, Revision: uint64(revision)}, nil
}

// Scan implements backend.Backend. Scan reads 256 entries with one request.
func (b *Backend) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		from := append([]byte{}, from...)
		b.scan(ctx, yield, func() ([]backend.Entry, error) {
			page, err := b.page(ctx, from, to, false)
			if n := len(page); n > 0 {
				from = append(append([]byte{}, page[n-1].Key...), 0)
			}
			return page, err
		})
	}
}

// ScanDown implements backend.DownScanner. ScanDown reads 256 entries with one request.
func (b *Backend) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		from, to := append([]byte{}, from...), to
		b.scan(ctx, yield, func() ([]backend.Entry, error) {
			page, err := b.page(ctx, from, to, true)
			if n := len(page); n > 0 {
				to = append([]byte{}, page[n-1].Key...)
			}
			return page, err
		})
	}
}

// page reads the first page of the entries with from <= key < to, in ascending or in descending
// order. If to is nil, there is no upper end.
func (b *Backend) page(
	ctx context.Context, from, to []byte, down bool,
) ([]backend.Entry, error) {
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	var page []backend.Entry
	var damage error
	err = b.read(joined, func(q querier, s *state) error {
		rows, err := q.Query(joined, b.sql.scan, int64(s.replicated.at), from, to, down)
		if err != nil {
			return err
		}
		page, damage = nil, nil
		var key, value []byte
		var revision, written *int64
		_, err = pgx.ForEachRow(rows, []any{&s.standby, &s.position, &s.tag, &s.deleted, &key,
			&value, &revision, &written}, func() error {
			if revision == nil || damage != nil {
				return nil // the page is empty, or ends with the damaged entry
			}
			s.wrote(written)
			var e backend.Entry
			if e, damage = b.entry(key, value, *revision); damage == nil {
				page = append(page, e)
			}
			return nil
		})
		if err == nil && s.position == 0 {
			err = errors.New("the log of the store is empty: another program has removed the " +
				"changes")
		}
		return err
	})
	if err != nil {
		return nil, b.wrap(ctx, "read", err)
	}
	return page, damage
}

// scan yields the pages of a range. An error may come with the entries before the error. A page
// that is not full is the last.
func (b *Backend) scan(
	ctx context.Context, yield func(backend.Entry, error) bool,
	next func() ([]backend.Entry, error),
) {
	for {
		page, err := next()
		for _, e := range page {
			if !yield(e, nil) {
				return
			}
			if err := b.calls.Ended(ctx); err != nil {
				yield(backend.Entry{}, err)
				return
			}
		}
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		if len(page) < pageEntries {
			return
		}
	}
}
