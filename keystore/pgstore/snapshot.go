package pgstore

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"github.com/jackc/pgx/v5"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Snapshot implements backend.Backend. Before the first step, Snapshot reads all entries in one
// transaction, as fast as the server sends the entries. Snapshot keeps up to 4 MiB in memory, and
// the rest in a temporary file in the directory of os.TempDir. So the transaction does not last
// while the loop body of the caller runs: a long transaction keeps PostgreSQL from removing old
// rows, in all tables.
func (b *Backend) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		var entries spool
		defer entries.close()
		err := b.spool(ctx, &entries, from, to)
		if err == nil {
			err = entries.each(func(key, value []byte, revision int64) error {
				e, err := b.entry(key, value, revision)
				if err == nil {
					err = b.calls.Ended(ctx)
				}
				if err == nil && !yield(e, nil) {
					err = errStopped
				}
				return err
			})
		}
		if err == nil {
			err = b.calls.Ended(ctx)
		}
		if err != nil && !errors.Is(err, errStopped) {
			yield(backend.Entry{}, err)
		}
	}
}

// spool reads all entries of a range as of one moment.
func (b *Backend) spool(ctx context.Context, s *spool, from, to []byte) error {
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	err = b.confirm(joined, func(q querier, _ *state) error {
		s.close() // of an attempt whose connection has broken
		*s = spool{}
		sql, args := b.sql.snapshot, []any{append([]byte{}, from...)}
		if to != nil {
			sql, args = b.sql.snapshotTo, append(args, to)
		}
		rows, err := q.Query(joined, sql, args...)
		if err != nil {
			return err
		}
		var key, value []byte
		var revision int64
		_, err = pgx.ForEachRow(rows, []any{&key, &value, &revision}, func() error {
			return s.add(key, value, revision)
		})
		return err
	})
	if err != nil {
		return b.wrap(ctx, "read a snapshot", err)
	}
	return nil
}

// spoolMemory is the number of bytes that a spool keeps in memory.
const spoolMemory = 4 << 20

// A spool keeps entries in their order, in memory and then in a temporary file. An entry is the
// revision, the sizes of the key and of the value, the key, and the value.
type spool struct {
	memory bytes.Buffer
	file   *os.File
	out    *bufio.Writer // to file
}

func (s *spool) add(key, value []byte, revision int64) error {
	var out io.Writer = &s.memory
	if s.memory.Len() >= spoolMemory {
		if s.file == nil {
			if err := s.open(); err != nil {
				return err
			}
		}
		out = s.out
	}
	header := binary.BigEndian.AppendUint64(nil, uint64(revision))
	header = binary.BigEndian.AppendUint32(header, uint32(len(key)))
	header = binary.BigEndian.AppendUint32(header, uint32(len(value)))
	for _, part := range [][]byte{header, key, value} {
		if _, err := out.Write(part); err != nil {
			return spoolError(err)
		}
	}
	return nil
}

func (s *spool) open() (err error) {
	if s.file, err = os.CreateTemp("", "pgstore-snapshot-"); err != nil {
		return spoolError(err)
	}
	_ = os.Remove(s.file.Name()) // Windows removes the file in close
	s.out = bufio.NewWriterSize(s.file, 64<<10)
	return nil
}

// each calls f with all entries until f returns an error.
func (s *spool) each(f func(key, value []byte, revision int64) error) error {
	var in io.Reader = &s.memory
	if s.file != nil {
		if err := s.out.Flush(); err != nil {
			return spoolError(err)
		}
		if _, err := s.file.Seek(0, io.SeekStart); err != nil {
			return spoolError(err)
		}
		in = io.MultiReader(in, bufio.NewReaderSize(s.file, 64<<10))
	}
	var header [16]byte
	for {
		if _, err := io.ReadFull(in, header[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return spoolError(err)
		}
		n := binary.BigEndian.Uint32(header[8:])
		both := make([]byte, n+binary.BigEndian.Uint32(header[12:]))
		if _, err := io.ReadFull(in, both); err != nil {
			return spoolError(err)
		}
		err := f(both[:n:n], both[n:], int64(binary.BigEndian.Uint64(header[:])))
		if err != nil {
			return err
		}
	}
}

func (s *spool) close() {
	if s.file != nil {
		_ = s.file.Close()
		_ = os.Remove(s.file.Name())
	}
}

func spoolError(err error) error {
	return fmt.Errorf("keep the snapshot in a temporary file: set TMPDIR to a directory with "+
		"enough space: %w", err)
}
