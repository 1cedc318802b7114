package pgstore

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// pageEntries is the largest number of entries that one request of a scan reads.
const pageEntries = 256

// Get implements backend.Backend.
func (b *Backend) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	joined, end, err := b.begin(ctx)
	if err != nil {
		return backend.Entry{}, err
	}
	defer end()
	if key == nil {
		key = []byte{}
	}
	s := b.newState()
	var value []byte
	var revision *int64
	err = b.pool.QueryRow(joined, b.sql.get, key).Scan(&s.standby, &s.position, &value, &revision)
	if err == nil {
		err = s.check()
	}
	switch {
	case err != nil:
		return backend.Entry{}, b.wrap(ctx, "read", err)
	case revision == nil:
		return backend.Entry{}, backend.ErrNotFound
	}
	return b.entry(append([]byte(nil), key...), value, *revision)
}

// A state says from which server, and from which time, a read comes.
type state struct {
	least    backend.Position // before the read began
	standby  bool
	position int64
}

func (b *Backend) newState() *state { return &state{least: b.history.atLeast()} }

// check returns an error if the read may lack changes that are confirmed. A pool may reach another
// server than before.
func (s *state) check() error {
	switch {
	case s.standby:
		return errStandby
	case backend.Position(s.position) < s.least:
		return fmt.Errorf("the server has the changes up to position %d, and the feed has "+
			"delivered %d: the server was restored, or the connection leads to another server",
			s.position, s.least)
	}
	return nil
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
			page, err := b.page(ctx, b.sql.scan, b.sql.scanTo, from, to)
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
			page, err := b.page(ctx, b.sql.scanDown, b.sql.scanDownTo, from, to)
			if n := len(page); n > 0 {
				to = append([]byte{}, page[n-1].Key...)
			}
			return page, err
		})
	}
}

// page reads one page of the entries with from <= key < to. If to is nil, there is no upper end.
// open is the statement without an upper end.
func (b *Backend) page(
	ctx context.Context, open, closed string, from, to []byte,
) ([]backend.Entry, error) {
	joined, end, err := b.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer end()
	sql, args := open, []any{from}
	if to != nil {
		sql, args = closed, append(args, to)
	}
	s := b.newState()
	rows, err := b.pool.Query(joined, sql, args...)
	if err != nil {
		return nil, b.wrap(ctx, "read", err)
	}
	defer rows.Close()
	var page []backend.Entry
	for rows.Next() {
		var key, value []byte
		var revision *int64
		if err := rows.Scan(&s.standby, &s.position, &key, &value, &revision); err != nil {
			return nil, b.wrap(ctx, "read", err)
		}
		if err := s.check(); err != nil {
			return nil, b.wrap(ctx, "read", err)
		}
		if revision == nil {
			break // the only row: the page is empty
		}
		e, err := b.entry(key, value, *revision)
		if err != nil {
			return page, err
		}
		page = append(page, e)
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return nil, b.wrap(ctx, "read", err)
	}
	if s.position == 0 {
		return nil, b.wrap(ctx, "read", errors.New("the log of the store is empty: another program "+
			"has removed the changes"))
	}
	return page, nil
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
			if err := b.ended(ctx); err != nil {
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
