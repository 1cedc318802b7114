package pgstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

const (
	// pageBatches is the largest number of Batches that one request reads.
	pageBatches = 128
	// feedPoll is the time after which a feed looks for changes that no notification has announced.
	feedPoll = 50 * time.Millisecond
)

// Feed implements backend.Feeder. A position is the number of an Apply. The positions have no
// holes.
//
// Each Feed has one connection, and reads the log. A change with Restricts wakes Feed by LISTEN and
// NOTIFY; Feed looks for other changes every 50 ms. If the connection breaks, Feed ends with the
// error. A Feed that is more than 10 minutes behind may end with backend.ErrGap.
func (b *Backend) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	if from == nil {
		from = []byte{}
	}
	return func(yield func(backend.Batch, error) bool) {
		f := feed{Backend: b, caller: ctx, from: from, to: to, at: after, yield: yield}
		if err := f.run(); !errors.Is(err, errStopped) {
			yield(backend.Batch{}, err)
		}
	}
}

var (
	// errStopped ends a feed because the caller has ended the loop.
	errStopped = errors.New("the caller has ended the loop")
	// errMoved ends a feed because a read has reached another server.
	errMoved = errors.New("the connection of the feed may lead to a server that was replaced")
)

// A feed is one loop over a Feed.
type feed struct {
	*Backend
	caller     context.Context
	from, to   []byte
	at         backend.Position // the feed has passed everything up to here; 0: not begun
	tag        tag              // of at
	generation uint64           // of at
	moves      uint64           // of the Backend, when the feed began
	yield      func(backend.Batch, error) bool
	conn       *pgx.Conn
}

// run runs the feed, and returns why the feed ended.
func (f *feed) run() error {
	ctx, stop, err := f.calls.Join(f.caller)
	if err != nil {
		return err
	}
	defer stop()
	resumes := f.at != 0
	f.moves = f.Backend.moves.Load()
	if f.generation, _, _ = f.history.now(); resumes {
		var ok bool
		if f.tag, f.generation, ok = f.history.recall(f.at); !ok {
			return gap(fmt.Errorf("position %d is not one of the last %d positions that the "+
				"feeds have yielded", f.at, maxTags))
		}
	}
	if f.conn, err = f.connect(ctx); err != nil {
		return f.wrap(f.caller, "feed", err)
	}
	defer closeConn(f.conn)
	if !resumes {
		if err := f.begin(ctx); err != nil {
			return err
		}
	}
	for {
		state := stateOf(f.conn.PgConn())
		state.notified = false
		n, err := f.page(ctx)
		if err != nil {
			return err
		}
		if f.Backend.moves.Load() != f.moves {
			return f.wrap(f.caller, "feed", errMoved)
		}
		if n == 0 && !state.notified {
			if err := f.wait(ctx); err != nil {
				return err
			}
		}
	}
}

// connect returns a connection that listens. The connection belongs to the feed, because a
// connection of the pool would continue to listen.
func (f *feed) connect(ctx context.Context) (*pgx.Conn, error) {
	for attempt := 1; ; attempt++ {
		pooled, err := f.own.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		conn := pooled.Hijack()
		_, err = conn.Exec(ctx, f.sql.listen)
		if err == nil {
			return conn, nil
		}
		broken := conn.IsClosed() // the server has restarted since the connection was used last
		closeConn(conn)
		if !broken || ctx.Err() != nil || attempt == maxAttempts {
			return nil, err
		}
	}
}

// begin starts the feed at the present.
func (f *feed) begin(ctx context.Context) error {
	var at int64
	err := f.conn.QueryRow(ctx, f.sql.feedStart).Scan(&at, &f.tag)
	if err != nil {
		return f.wrap(f.caller, "feed", err)
	}
	f.at = backend.Position(at)
	return f.pass(backend.Batch{Position: f.at}, f.tag)
}

// wait waits for a notification, or for a short time.
func (f *feed) wait(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, feedPoll)
	defer cancel()
	err := f.conn.PgConn().WaitForNotification(limited)
	if ended := f.calls.Ended(f.caller); ended != nil {
		return ended
	}
	if err != nil && !pgconn.Timeout(err) {
		return f.wrap(f.caller, "feed", err)
	}
	return nil
}

// pass yields a Batch. The body of the loop may end the context, or close the Backend.
func (f *feed) pass(batch backend.Batch, t tag) error {
	if !f.history.yields(f.generation, batch.Position, t) {
		return gap(errRestored)
	}
	if !f.yield(batch, nil) {
		return errStopped
	}
	return f.calls.Ended(f.caller)
}

// A logged is one row of the log.
type logged struct {
	position int64
	tag      tag
	row      []byte // see logrow.go; nil: the feed has passed the row
}

// page yields the next Batches, and returns the number of positions that the feed has passed.
func (f *feed) page(ctx context.Context) (int, error) {
	page, err := f.read(ctx)
	if err != nil {
		return 0, err
	}
	// The page begins with the row at the position of the feed, unless the server has another
	// history, or no longer has the row.
	if len(page) == 0 || backend.Position(page[0].position) != f.at {
		return 0, f.lost(ctx)
	}
	if page[0].tag != f.tag {
		return 0, f.history.changed(f.Backend, f.generation, f.at)
	}
	for _, l := range page[1:] {
		if backend.Position(l.position) != f.at+1 {
			return 0, gap(fmt.Errorf("the log has no position %d", f.at+1))
		}
		changes, err := parseRow(l.row, f.from, f.to)
		if err != nil {
			return 0, gap(fmt.Errorf("position %d: %w", l.position, err))
		}
		f.at, f.tag = f.at+1, l.tag
		if len(changes) == 0 {
			continue
		}
		if err := f.pass(backend.Batch{Position: f.at, Changes: changes}, l.tag); err != nil {
			return 0, err
		}
	}
	return len(page) - 1, nil
}

// read reads the row at the position of the feed, and the rows that follow.
func (f *feed) read(ctx context.Context) (page []logged, err error) {
	rows, err := f.conn.Query(ctx, f.sql.feedPage, int64(f.at))
	if err == nil {
		var r logged
		_, err = pgx.ForEachRow(rows, []any{&r.position, &r.tag, &r.row}, func() error {
			page = append(page, r)
			r.row = nil // the next row gets another buffer
			return nil
		})
	}
	if err != nil {
		return nil, f.wrap(f.caller, "feed", err)
	}
	return page, nil
}

// lost returns why the log has no row at the position of the feed.
func (f *feed) lost(ctx context.Context) error {
	var first, last *int64
	if err := f.conn.QueryRow(ctx, f.sql.feedPositions).Scan(&first, &last); err != nil {
		return f.wrap(f.caller, "feed", err)
	}
	if first == nil || last == nil || backend.Position(*last) < f.at {
		return f.history.changed(f.Backend, f.generation, f.at)
	}
	return gap(fmt.Errorf("the log begins at position %d, and the feed has read up to %d: the log "+
		"keeps changes for %s", *first, f.at, logSpan))
}
