package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/backupfile"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Restore adds the keys of a backup to the keys of the store. If both have a key, the higher
// revision wins, except that a key revoked or purged in either is revoked or purged afterwards. The
// changes are in force when Restore returns, on open sessions too. Restore writes an event for each
// changed key, with ActionRestore. ErrNotEverywhere means that all keys were restored, and that the
// changes may not be in force in another process yet.
//
// A key that the store does not have gets the credits that remained when the backup was made:
// credits that were spent since then can be spent again. The credits that remain of a key that the
// store has never rise, unless the backup has a later SetCredits, AddCredits or refill of the key.
//
// Restore reads the stream to the end and checks the whole stream before the first change. If the
// backup is damaged, cut off, or followed by other data, the error is ErrCorrupt. The error is
// ErrInvalid in three cases: the stream is not a backup, a later version made the backup, or the
// keys were made with a pepper other than the pepper of the Hasher. An error of r is returned
// unchanged. After any other error, a part of the keys may have been restored. Calling Restore
// again is safe. Restore logs its progress to Options.Logger, and notifies the Observer of each
// changed key.
//
// Restore writes no temporary file. If r is an io.Seeker that can seek, such as a file, Restore
// reads r twice, starting at the current position of r. The content of r must not change in
// between. Otherwise Restore holds the backup in memory. Restore then refuses a backup of more than
// 64 MiB with ErrInvalid: save the backup in a file first.
func (s *Store) Restore(ctx context.Context, r io.Reader) error {
	if r == nil {
		return invalid("the reader of the backup is nil")
	}
	if err := refuseCondition(ctx, "Restore"); err != nil {
		return err
	}
	return s.restoreHolding(ctx, r, maxHeld)
}

// maxHeld is the largest backup, in bytes, that Restore holds in memory.
const maxHeld = 64 << 20

// restoreHolding implements Restore. most limits the memory that holds the backup, in bytes.
func (s *Store) restoreHolding(ctx context.Context, r io.Reader, most int) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	first, again := twice(r, most)
	frames, sum, err := s.checkBackup(ctx, first)
	if err != nil {
		return err
	}
	second, err := again()
	if err != nil {
		return err
	}
	s.background.uncount()
	defer s.background.uncount()
	// The backup lacks the uses of its keys after the backup was made.
	if err := s.loseUses(ctx); err != nil {
		return err
	}
	err = s.restore(ctx, second, frames, sum)
	if lost := s.loseUses(ctx); err == nil {
		err = lost
	}
	if err != nil {
		return err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	return s.barrier(ctx, "restore")
}

// twice returns a reader of the content of r, and a function that returns a second reader of the
// same content. If r cannot seek, as a pipe cannot, the content is held in memory, with most as
// the limit in bytes.
func twice(r io.Reader, most int) (first io.Reader, again func() (io.Reader, error)) {
	if seeker, ok := r.(io.Seeker); ok {
		if start, err := seeker.Seek(0, io.SeekCurrent); err == nil {
			return r, func() (io.Reader, error) {
				_, err := seeker.Seek(start, io.SeekStart)
				return r, err
			}
		}
	}
	held := &limitedBuffer{most: most}
	return io.TeeReader(r, held), func() (io.Reader, error) { return &held.Buffer, nil }
}

// A limitedBuffer is a buffer that refuses to hold more than most bytes.
type limitedBuffer struct {
	bytes.Buffer
	most int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if b.Len()+len(p) > b.most {
		return 0, invalid("the backup has more than %d MiB, and its reader cannot seek: save the "+
			"backup in a file, and restore the file", b.most>>20)
	}
	return b.Buffer.Write(p)
}

// errOtherBackup is the error of Restore if the second reading of the reader returns other data
// than the first reading.
var errOtherBackup = &messageError{
	"keystore: restore: the reader gave another backup when it was read again; " +
		"a part of the keys may have been restored",
	ErrCorrupt,
}

// secondReadError converts an error of package backupfile into the error of Restore after the
// whole backup was read and checked once. Any other error stays unchanged.
func secondReadError(err error) error {
	switch err.(type) {
	case backupfile.FormError, backupfile.DamagedError:
		return errOtherBackup
	default:
		return err
	}
}

// checkBackup reads and checks a whole backup. If the backup is valid, checkBackup returns the
// number of frames and the checksum.
func (s *Store) checkBackup(ctx context.Context, r io.Reader) (frames int, sum []byte, err error) {
	b, err := backupfile.NewReader(r)
	if err != nil {
		return 0, nil, backupError(err)
	}
	var others []string // schemes with a check value that the Hasher does not match
	for {
		if b.Frames()%1024 == 0 && ctx.Err() != nil {
			return 0, nil, ctx.Err()
		}
		e, err := b.Next()
		if err == io.EOF {
			return b.Frames(), b.Sum(), nil
		}
		if err != nil {
			return 0, nil, backupError(err)
		}
		switch e.Key[0] {
		case checkSpace:
			var d hashing.Digest
			if d, err = parseCheck(e); err == nil && s.knows(d.Scheme) {
				var ok bool
				if ok, err = s.matchesCheck(d); err == nil && !ok {
					others = append(others, d.Scheme)
				}
			}
		case graveSpace, keySpace:
			var kr *keyRecord
			if kr, err = parseSavedRecord(e); err == nil {
				for _, scheme := range others {
					if kr.needs(scheme) {
						return 0, nil, anotherPepper("the backup", scheme)
					}
				}
			}
		case creditSpace:
			_, err = parseBalance(e)
		case usageSpace:
			_, err = parseUsage(e)
		default:
			err = damagedBackup("it has an entry of an unknown kind")
		}
		if errors.Is(err, record.ErrNewer) {
			return 0, nil, invalid("the backup has a key that a later version has written: " +
				"upgrade the program")
		}
		if plain := (*messageError)(nil); errors.As(err, &plain) {
			return 0, nil, err
		}
		if err != nil {
			return 0, nil, fmt.Errorf("keystore: restore: %w", err)
		}
	}
}

// backupError converts an error of package backupfile into the error of Restore before the first
// change. Any other error is an error of the caller's reader, and stays unchanged.
func backupError(err error) error {
	switch err := err.(type) {
	case backupfile.FormError:
		return invalid("%v", err)
	case backupfile.DamagedError:
		return damagedBackup(string(err))
	default:
		return err
	}
}

func damagedBackup(what string) error {
	text := "keystore: restore: " + backupfile.DamagedError(what).Error() + "; nothing was changed"
	return &messageError{text, ErrCorrupt}
}

// restore writes the entries of a checked backup to the store. frames and sum are the results of
// the check: the number of frames and the checksum.
func (s *Store) restore(
	ctx context.Context, r io.Reader, frames int, sum []byte,
) (err error) {
	b, err := backupfile.NewReader(r)
	if err != nil {
		return secondReadError(err)
	}
	var batch []backend.Entry // all entries belong to one key space
	read, size := 0, 0
	w := &restoreWrites{store: s}
	defer func() {
		if failed := w.finish(0); err == nil {
			err = failed
		}
	}()
	for {
		e, err := b.Next()
		end := err == io.EOF
		if end && !bytes.Equal(b.Sum(), sum) {
			return errOtherBackup
		}
		if err != nil && !end {
			return secondReadError(err)
		}
		// The size includes the event. The record of the store may also gain a revocation reason.
		size += len(e.Value) + maxText + maxReason + 384
		full := end || len(batch) == maxKeyChanges/maxChanges || size > backend.MaxApplySize
		if len(batch) > 0 && (full || batch[0].Key[0] != e.Key[0]) {
			// The keys of a backup depend on the check values, and a key may be both among the
			// graves and among the keys. So a key space begins after the end of the one before.
			most := maxRestoreWrites - 1
			if w.space != batch[0].Key[0] {
				most, w.space = 0, batch[0].Key[0]
			}
			if err := w.finish(most); err != nil {
				return err
			}
			w.begin(ctx, batch)
			batch, size = nil, len(e.Value)+maxText+maxReason+384
		}
		if end {
			if err := w.finish(0); err != nil {
				return err
			}
		}
		if end || read%10_000 == 0 {
			s.log.Info("API key store restores a backup",
				"read", read, "of", frames, "keys changed", w.changed)
		}
		if end {
			return nil
		}
		batch = append(batch, e)
		read++
	}
}

// restoreWrites are the batches that a Restore is writing. The backend can commit these batches
// together.
type restoreWrites struct {
	store   *Store
	space   byte // the key space of the running batches
	changed int  // the keys that the finished batches have changed
	running []chan restored
}

// A restored is the outcome of a batch: the number of changed keys, and the error.
type restored struct {
	changed int
	err     error
}

const maxRestoreWrites = 8

// begin starts to merge a batch into the store.
func (w *restoreWrites) begin(ctx context.Context, batch []backend.Entry) {
	outcome := make(chan restored, 1)
	w.running = append(w.running, outcome)
	go func() {
		changed, err := w.store.restoreBatch(ctx, batch)
		outcome <- restored{changed, err}
	}()
}

// finish waits until at most so many batches are running, and returns the first error of the
// finished batches.
func (w *restoreWrites) finish(most int) (err error) {
	for len(w.running) > most {
		outcome := <-w.running[0]
		w.running = w.running[1:]
		w.changed += outcome.changed
		if err == nil {
			err = outcome.err
		}
	}
	return err
}

// restoreBatch merges entries into the store, and returns the number of changed keys.
func (s *Store) restoreBatch(ctx context.Context, batch []backend.Entry) (changed int, err error) {
	if err := s.ready(ctx); err != nil {
		return 0, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	merge := s.restoreKeys
	switch batch[0].Key[0] {
	case checkSpace:
		merge = s.restoreChecks
	case creditSpace:
		merge = s.restoreBalances
	case usageSpace:
		merge = s.restoreUsage
	}
	for attempt := 0; ; attempt++ {
		n, err := merge(ctx, batch, attempt)
		changed += n
		if !mayRetry(err) {
			return changed, err
		}
		if !s.retries(ctx, err, attempt, false) {
			return changed, s.contention(ctx, "restore", err)
		}
	}
}
