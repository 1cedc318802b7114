package keystore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/backupfile"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Backup writes a backup of all keys to w. The backup contains the digests of the secrets, the
// times of last use, the remaining credits, and the check values of the Hasher (see
// Options.Hasher). The backup contains no events and no secrets. Credits that the processes have
// leased at the time do not remain: see Credits.
//
// All keys are as of one moment between the call and the first write to w. The store keeps serving
// during the backup, and w may be slow.
//
// Backup returns an error of w unchanged. The output is then useless: Restore refuses an
// incomplete backup.
func (s *Store) Backup(ctx context.Context, w io.Writer) error {
	if w == nil {
		return invalid("the writer of the backup is nil")
	}
	if err := s.ready(ctx); err != nil {
		return err
	}
	err := s.flushUsage(ctx)
	if errors.Is(err, backend.ErrFull) || errors.Is(err, backend.ErrConflict) {
		s.log.Warn("API key store could not write when keys were last used, "+
			"and backs up what it has", "error", err)
	} else if err != nil {
		return err
	}
	var out *backupfile.Writer
	checked := new(record.Record) // the memory of each record, so that the collector has less work
	snapshot := s.backend.Snapshot(ctx, []byte{graveSpace}, []byte{usageSpace + 1})
	for e, err := range readAhead(snapshot) {
		if err != nil {
			return s.scanError(ctx, "backup", err)
		}
		switch e.Key[0] {
		case graveSpace:
			var grave *keyRecord
			if grave, err = parseGrave(e); err == nil && grave.record == nil {
				continue
			}
		case checkSpace:
			_, err = parseCheck(e)
		case keySpace:
			_, err = parseKeyRecordTo(checked, e)
		case creditSpace:
			_, err = parseBalance(e)
		case usageSpace:
		default:
			continue
		}
		if err != nil {
			return fmt.Errorf("keystore: backup: %w", err)
		}
		if out == nil {
			form, err := s.formOf(ctx, e.Key[0])
			if err != nil {
				return err
			}
			out = backupfile.NewWriter(w, form)
		}
		if err := out.Write(e); err != nil {
			return err
		}
	}
	if out == nil {
		out = backupfile.NewWriter(w, backupfile.FormKeys)
	}
	return out.Close()
}

// formOf returns the form of a backup whose first entry is of a key space. Graves are before check
// values, and check values are before balances and keys. A balance may come later in the backup. Only
// Purge deletes balances, so the store still has the balance.
func (s *Store) formOf(ctx context.Context, space byte) (backupfile.Form, error) {
	from, to := spaceOf(creditSpace)
	for _, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return 0, s.scanError(ctx, "backup", err)
		}
		return backupfile.FormCredits, nil
	}
	switch space {
	case graveSpace:
		return backupfile.FormGraves, nil
	case checkSpace:
		return backupfile.FormChecks, nil
	default:
		return backupfile.FormKeys, nil
	}
}

// Restore adds the keys of a backup to the keys of the store. If both have a key, the higher
// revision wins, except that a key revoked or purged in either is revoked or purged afterwards. The
// changes are in force when Restore returns, on live contexts too. Restore writes an event for each
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

// maxKeysSize is the largest size of the changes of keys in one Apply, beside a guard.
const maxKeysSize = backend.MaxApplySize - 64

func (s *Store) restoreKeys(
	ctx context.Context, batch []backend.Entry, attempt int,
) (changed int, err error) {
	actor, err := actorOf(ctx)
	if err != nil {
		return 0, err
	}
	var all []*prepared
	size := 0
	flush := func() error {
		if len(all) == 0 {
			return nil
		}
		err := s.commit(ctx, ErrNarrowed, all...)
		if err == nil {
			changed += len(all)
		}
		all, size = nil, 0
		return err
	}
	for _, e := range batch {
		p, err := s.restoreKey(ctx, e, actor)
		if err != nil {
			return changed, err
		}
		if p == nil {
			continue
		}
		if attempt > 0 {
			if _, err := s.mendOwners(ctx, p); err != nil {
				return changed, err
			}
		}
		// The merged record may be the record of the store. The record of the store may be larger
		// than the saved record, and the batch was sized by the saved records.
		own := p.size()
		if size+own > maxKeysSize {
			if err := flush(); err != nil {
				return changed, err
			}
		}
		all, size = append(all, p), size+own
	}
	return changed, flush()
}

// restoreKey prepares the change of one key. The result is nil if the key does not change.
func (s *Store) restoreKey(ctx context.Context, e backend.Entry, actor string) (*prepared, error) {
	saved, err := parseSavedRecord(e)
	if err != nil {
		return nil, errOtherBackup
	}
	have := &keyRecord{} // revision 0 if the store does not have the key
	local, err := s.backend.Get(ctx, storageKey(saved.id))
	if err == nil {
		have, err = parseKeyRecord(local)
		if err != nil {
			return nil, err
		}
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, s.scanError(ctx, "restore", err)
	}
	before := priorOf(have)
	if have.record == nil || saved.purged() {
		grave, err := s.readGrave(ctx, saved.id)
		if err != nil {
			return nil, err
		}
		if grave.record != nil {
			return nil, nil // a purged key stays purged
		}
		// An empty grave without a record means that another Restore has added the key in between,
		// or that the record is lost. In the first case, the write conflicts.
		before.grave = grave.revision
	}
	merged := merge(have, saved)
	if merged == nil {
		return nil, nil
	}
	if merged.purged() && (have.record == nil || before.grave > 0) {
		merged.record.CreatedAt = 0 // of another store: no event of this store is meant
	}
	event := &record.Event{Action: record.Action_ACTION_RESTORE, Actor: actor}
	return s.prepare(before, merged, event)
}

// merge returns the new version of a key when a backup is restored. have is the version of the
// store, with revision 0 if the store does not have the key. saved is the version of the backup.
// The result is nil if the key of the store does not change. Purged wins over revoked, and revoked
// wins over any other state. Otherwise the higher revision wins.
func merge(have, saved *keyRecord) *keyRecord {
	rank := func(kr *keyRecord) int {
		switch {
		case kr.record == nil:
			return -1
		case kr.purged():
			return 2
		case kr.record.RevokedAt != 0:
			return 1
		default:
			return 0
		}
	}
	switch hold, take := rank(have), rank(saved); {
	case hold > take, hold == take && (hold > 0 || have.revision >= saved.revision):
		return nil
	case hold == 0 && take == 1 && have.revision > saved.revision:
		// The store has a newer version of the key than the revoked version of the backup. Keep the
		// version of the store, and copy only the revocation.
		r := proto.CloneOf(have.record)
		r.Status = record.Status_STATUS_REVOKED
		r.RevokedAt, r.RevokeReason = saved.record.RevokedAt, saved.record.RevokeReason
		return &keyRecord{id: have.id, record: r, revision: have.revision + 1}
	default:
		if hold == 0 && take == 0 {
			saved.record.Rotations = renumber(have.record, saved.record)
		}
		if have.record != nil {
			// A key is created once: the time leads to the event of the store. See index.go.
			if saved.purged() {
				saved.record.CreatedAt = firstStamp(have.record)
			} else {
				saved.record.CreatedAt = have.record.CreatedAt
				saved.record.ImportedAt = have.record.ImportedAt
			}
		}
		revision := max(saved.revision, have.revision+1)
		return &keyRecord{id: saved.id, record: saved.record, revision: revision}
	}
}

// renumber returns the number of rotations for a saved record that replaces the record of the
// store. By this number, a live context knows the secret that opened the context. Two stores that
// have diverged may have given the same number to different secrets. So the secrets that both
// records have keep their numbers where possible. Otherwise all saved secrets get numbers that no
// context has.
func renumber(have, saved *record.Record) uint32 {
	type secret interface {
		GetDigestScheme() string
		GetDigest() []byte
	}
	same := func(a, b secret) bool {
		return a.GetDigestScheme() == b.GetDigestScheme() &&
			bytes.Equal(a.GetDigest(), b.GetDigest())
	}
	switch {
	case same(have, saved) && (saved.Previous == nil || same(have.Previous, saved.Previous)):
		return have.Rotations
	case saved.Previous != nil && same(have, saved.Previous):
		return have.Rotations + 1
	default:
		return max(have.Rotations, saved.Rotations) + 2
	}
}

// restoreChecks adds the check values of a backup to the store. A check value that the Hasher of
// the store does not match is skipped: no key of the backup needs the check value. A check value
// that the store already has stays, unless no key of the store needs the check value.
func (s *Store) restoreChecks(
	ctx context.Context, batch []backend.Entry, _ int,
) (changed int, err error) {
	var changes []backend.Change
	for _, e := range batch {
		d, err := parseCheck(e)
		if err != nil {
			return 0, err
		}
		have, err := s.readCheck(d.Scheme)
		if err != nil {
			return 0, err
		}
		takes, err := s.takesCheck(ctx, d, have)
		if err != nil {
			return 0, err
		}
		if takes {
			c := backend.Change{Key: have.Key, Value: e.Value, Expect: have.Revision}
			changes = append(changes, c)
		}
	}
	if len(changes) == 0 {
		return 0, nil
	}
	return 0, s.applyCheck(ctx, changes...)
}

// takesCheck reports whether check value d of a backup replaces have. have is the entry of the
// store for the scheme, with revision 0 if the store has no check value.
func (s *Store) takesCheck(
	ctx context.Context, d hashing.Digest, have backend.Entry,
) (bool, error) {
	if bytes.Equal(have.Value, d.Sum) {
		return false, nil
	}
	known := s.knows(d.Scheme)
	if known {
		if ok, err := s.matchesCheck(d); !ok || err != nil {
			return false, err
		}
	}
	switch {
	case have.Revision == 0:
		return true, nil
	case known:
		ok, err := s.matchesCheck(hashing.Digest{Scheme: d.Scheme, Sum: have.Value})
		return !ok, err
	default:
		needed, err := s.needs(ctx, d.Scheme)
		return !needed, err
	}
}

// restoreBalances merges the balances of a backup into the store, before the keys. For a key whose
// balance the store has, the later grant wins: the later SetCredits or AddCredits, by the revision
// of the record, and then the later refill. Of two balances of the same grant, the lower one wins,
// because the higher one does not know of credits that were spent. So no Restore raises what remains
// of a grant.
func (s *Store) restoreBalances(
	ctx context.Context, batch []backend.Entry, _ int,
) (changed int, err error) {
	var changes []backend.Change
	for _, e := range batch {
		saved, err := parseBalance(e)
		if err != nil {
			return 0, err
		}
		have, err := s.readBalance(ctx, saved.id)
		if errors.Is(err, ErrCorrupt) && !errors.Is(err, record.ErrNewer) {
			err = nil // missing or damaged
		}
		if err != nil {
			return 0, err
		}
		if have.CreditsRevision == 0 || saved.isAfter(have) {
			changes = append(changes, backend.Change{Key: e.Key, Value: e.Value,
				Expect: have.revision})
		}
	}
	if len(changes) == 0 {
		return 0, nil
	}
	err = s.backend.Apply(ctx, changes...)
	if err != nil && !errors.Is(err, backend.ErrConflict) {
		return 0, s.scanError(ctx, "restore", err)
	}
	return 0, err
}

// isAfter reports whether the balance b wins over the balance have in a Restore.
func (b *balance) isAfter(have *balance) bool {
	order := cmp.Or(
		cmp.Compare(b.GrantedRevision, have.GrantedRevision),
		cmp.Compare(b.RefilledAt, have.RefilledAt),
		cmp.Compare(have.Remaining, b.Remaining),
	)
	return order > 0
}

// restoreUsage writes each last use of the backup that is later than the last use in the store.
func (s *Store) restoreUsage(
	ctx context.Context, batch []backend.Entry, _ int,
) (changed int, err error) {
	var changes []backend.Change
	for _, e := range batch {
		minute, err := parseUsage(e)
		if err != nil {
			return 0, err
		}
		have, revision, err := s.readUsage(ctx, token.ID(e.Key[1:]))
		if err != nil {
			return 0, err
		}
		if minute > have {
			changes = append(changes, backend.Change{Key: e.Key, Value: e.Value, Expect: revision})
		}
	}
	if len(changes) == 0 {
		return 0, nil
	}
	err = s.backend.Apply(ctx, changes...)
	if err != nil && !errors.Is(err, backend.ErrConflict) {
		return 0, s.scanError(ctx, "restore", err)
	}
	return 0, err
}
