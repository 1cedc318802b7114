package keystore

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The form of a backup, which is a stream:
//
//	magic     "grpc-api-key backup\n", and the number of the form: 1, or 2 if there are check values
//	frame...  a length as a varint, and that number of bytes: a record.Saved
//	end       a length of 0
//	trailer   the number of frames, 8 bytes, big-endian; SHA-256 of everything before the sum
//
// The frames contain the check values of the Hasher, then the entries of the key space, and then
// the entries of the usage space, in the order of the storage keys.
const (
	backupMagic      = "grpc-api-key backup\n"
	backupForm       = 1
	backupFormChecks = 2

	maxFrame = backend.MaxKeySize + backend.MaxValueSize + 64
)

// Backup writes a backup of all keys to w. The backup contains the digests of the secrets, the
// times of last use, and the check values of the Hasher (see Options.Hasher). The backup contains
// no events and no secrets.
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
	if err := s.flushUsage(ctx); errors.Is(err, backend.ErrFull) || errors.Is(err, backend.ErrConflict) {
		s.log.Warn("API key store could not write when keys were last used, and backs up what it has", "error", err)
	} else if err != nil {
		return err
	}
	sum := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), 64<<10)
	frames := uint64(0)
	begin := func(form byte) {
		out.WriteString(backupMagic) // a bufio.Writer keeps its first error for Flush
		out.WriteByte(form)
	}
	for e, err := range s.backend.Snapshot(ctx, []byte{checkSpace}, []byte{usageSpace + 1}) {
		if err != nil {
			return s.scanError(ctx, "backup", err)
		}
		switch e.Key[0] {
		case checkSpace:
			_, err = parseCheck(e)
		case keySpace:
			_, err = parseKeyRecord(e)
		case usageSpace:
		default:
			continue
		}
		if err != nil {
			return fmt.Errorf("keystore: backup: %w", err)
		}
		if frames == 0 && e.Key[0] == checkSpace {
			begin(backupFormChecks)
		} else if frames == 0 {
			begin(backupForm)
		}
		frame, err := proto.Marshal(&record.Saved{Key: e.Key, Value: e.Value, Revision: e.Revision})
		if err != nil {
			return wrapErr("backup", err)
		}
		out.Write(binary.AppendUvarint(nil, uint64(len(frame))))
		if _, err := out.Write(frame); err != nil {
			return err
		}
		frames++
	}
	if frames == 0 {
		begin(backupForm)
	}
	out.WriteByte(0)
	out.Write(binary.BigEndian.AppendUint64(nil, frames))
	if err := out.Flush(); err != nil {
		return err
	}
	_, err := w.Write(sum.Sum(nil))
	return err
}

// Restore adds the keys of a backup to the keys of the store. If both have a key, the higher
// revision wins, except that a key revoked or purged in either is revoked or purged afterwards. The
// changes are in force when Restore returns, on live contexts too. Restore writes an event for each
// changed key, with ActionRestore.
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
	s.usage.lose() // the backup lacks the uses of its keys after the backup was made
	defer s.usage.lose()
	return s.restore(ctx, second, frames, sum)
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

// checkBackup reads and checks a whole backup. If the backup is valid, checkBackup returns the
// number of frames and the checksum.
func (s *Store) checkBackup(ctx context.Context, r io.Reader) (frames int, sum []byte, err error) {
	b, err := newBackupReader(r)
	if err != nil {
		return 0, nil, err
	}
	var last []byte
	var others []string // schemes with a check value that the Hasher does not match
	for {
		if frames%1024 == 0 && ctx.Err() != nil {
			return 0, nil, ctx.Err()
		}
		e, err := b.next()
		if errors.Is(err, io.EOF) {
			return frames, b.sum.Sum(nil), nil
		}
		if err != nil {
			return 0, nil, err
		}
		if bytes.Compare(last, e.Key) >= 0 {
			return 0, nil, damaged("its entries are not in order")
		}
		last = e.Key
		switch e.Key[0] {
		case checkSpace:
			var d hashing.Digest
			if d, err = parseCheck(e); err == nil && s.knows(d.Scheme) {
				var ok bool
				if ok, err = s.matchesCheck(d); err == nil && !ok {
					others = append(others, d.Scheme)
				}
			}
		case keySpace:
			var kr *keyRecord
			if kr, err = parseSavedRecord(e); err == nil {
				for _, scheme := range others {
					if kr.needs(scheme) {
						return 0, nil, anotherPepper("the backup", scheme)
					}
				}
			}
		case usageSpace:
			_, err = parseUsage(e)
		default:
			err = damaged("it has an entry of an unknown kind")
		}
		if errors.Is(err, record.ErrNewer) {
			return 0, nil, invalid("the backup has a key that a later version has written: upgrade the program")
		}
		if plain := (*messageError)(nil); errors.As(err, &plain) {
			return 0, nil, err
		}
		if err != nil {
			return 0, nil, fmt.Errorf("keystore: restore: %w", err)
		}
		if e.Revision == 0 {
			return 0, nil, damaged("it has an entry without a revision")
		}
		frames++
	}
}

// A backupReader reads the frames and the trailer of a backup.
type backupReader struct {
	in     *bufio.Reader // the whole stream, including the checksum in the trailer
	sum    hash.Hash     // the checksum of the bytes that were read from in
	frames uint64
}

func newBackupReader(r io.Reader) (*backupReader, error) {
	b := &backupReader{in: bufio.NewReaderSize(r, 64<<10), sum: sha256.New()}
	head, err := b.take(len(backupMagic) + 1)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return nil, err
	}
	if err != nil || string(head[:len(backupMagic)]) != backupMagic {
		return nil, invalid("the stream is not a backup, or it is damaged at its very beginning")
	}
	if form := head[len(backupMagic)]; form != backupForm && form != backupFormChecks {
		return nil, invalid("the backup has form %d, and this program knows %d and %d: "+
			"upgrade the program", form, backupForm, backupFormChecks)
	}
	return b, nil
}

// next returns the next entry. After the last entry, next checks the trailer, and returns io.EOF if
// the trailer matches the frames.
func (b *backupReader) next() (backend.Entry, error) {
	size, err := b.size()
	if err != nil {
		return backend.Entry{}, err
	}
	if size == 0 {
		return backend.Entry{}, b.end()
	}
	frame, err := b.take(size)
	if err != nil {
		return backend.Entry{}, err
	}
	var saved record.Saved
	if err := proto.Unmarshal(frame, &saved); err != nil || len(saved.Key) == 0 {
		return backend.Entry{}, damaged("an entry cannot be read")
	}
	b.frames++
	return backend.Entry{Key: saved.Key, Value: saved.Value, Revision: saved.Revision}, nil
}

func (b *backupReader) size() (int, error) {
	size := 0
	for shift := 0; shift <= 14; shift += 7 {
		one, err := b.take(1)
		if err != nil {
			return 0, err
		}
		size |= int(one[0]&0x7f) << shift
		if one[0] < 0x80 {
			if size > maxFrame {
				break
			}
			return size, nil
		}
	}
	return 0, damaged("an entry is too large")
}

// end checks the trailer. If the trailer matches the frames and ends the stream, end returns
// io.EOF.
func (b *backupReader) end() error {
	count, err := b.take(8)
	if err != nil {
		return err
	}
	want := b.sum.Sum(nil)
	got, err := b.take(len(want))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) || binary.BigEndian.Uint64(count) != b.frames {
		return damaged("its checksum is wrong")
	}
	if _, err := b.in.ReadByte(); err == nil {
		return damaged("something follows its end")
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return io.EOF
}

func (b *backupReader) take(n int) ([]byte, error) {
	p := make([]byte, n)
	if _, err := io.ReadFull(b.in, p); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, damaged("it is cut off")
		}
		return nil, err
	}
	b.sum.Write(p)
	return p, nil
}

func damaged(what string) error {
	return &messageError{"keystore: restore: the backup is damaged: " + what + "; nothing was changed", ErrCorrupt}
}

// restore writes the entries of a checked backup to the store. frames and sum are the results of
// the check: the number of frames and the checksum.
func (s *Store) restore(ctx context.Context, r io.Reader, frames int, sum []byte) error {
	b, err := newBackupReader(r)
	if errors.Is(err, ErrCorrupt) || errors.Is(err, ErrInvalid) {
		return errOtherBackup
	}
	if err != nil {
		return err
	}
	var batch []backend.Entry // all entries belong to one key space
	read, changed, size := 0, 0, 0
	for {
		e, err := b.next()
		end := errors.Is(err, io.EOF)
		if errors.Is(err, ErrCorrupt) || end && !bytes.Equal(b.sum.Sum(nil), sum) {
			return errOtherBackup
		}
		if err != nil && !end {
			return err
		}
		// The size includes the event. The record of the store may also gain a revocation reason.
		size += len(e.Value) + maxText + maxReason + 256
		if len(batch) > 0 && (end || len(batch) == maxBatch || size > backend.MaxApplySize || batch[0].Key[0] != e.Key[0]) {
			n, err := s.restoreBatch(ctx, batch)
			changed += n
			if err != nil {
				return err
			}
			batch, size = nil, len(e.Value)+maxText+maxReason+256
		}
		if end || read%10_000 == 0 {
			s.log.Info("API key store restores a backup", "read", read, "of", frames, "keys changed", changed)
		}
		if end {
			return nil
		}
		batch = append(batch, e)
		read++
	}
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
	case usageSpace:
		merge = s.restoreUsage
	}
	for range changeAttempts {
		n, err := merge(ctx, batch)
		changed += n
		if !errors.Is(err, backend.ErrConflict) {
			return changed, err
		}
	}
	return changed, wrapErr("restore", errors.New("others keep changing the keys"))
}

func (s *Store) restoreKeys(ctx context.Context, batch []backend.Entry) (changed int, err error) {
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
		// The merged record may be the record of the store. The record of the store may be larger
		// than the saved record, and the batch was sized by the saved records.
		if size+p.size() > backend.MaxApplySize {
			if err := flush(); err != nil {
				return changed, err
			}
		}
		all, size = append(all, p), size+p.size()
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
	local, err := s.backend.Get(ctx, e.Key)
	if err == nil {
		have, err = parseKeyRecord(local)
		if err != nil {
			return nil, err
		}
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, s.scanError(ctx, "restore", err)
	}
	merged := merge(have, saved)
	if merged == nil {
		return nil, nil
	}
	return s.prepare(merged, have.revision, &record.Event{Action: record.Action_ACTION_RESTORE, Actor: actor})
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
		return &keyRecord{id: saved.id, record: saved.record, revision: max(saved.revision, have.revision+1)}
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
		return a.GetDigestScheme() == b.GetDigestScheme() && bytes.Equal(a.GetDigest(), b.GetDigest())
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
func (s *Store) restoreChecks(ctx context.Context, batch []backend.Entry) (changed int, err error) {
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

// restoreUsage writes each last use of the backup that is later than the last use in the store.
func (s *Store) restoreUsage(ctx context.Context, batch []backend.Entry) (changed int, err error) {
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
