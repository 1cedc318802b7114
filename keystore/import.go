package keystore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An Imported is a key of another system: a row of its export. Package
// [github.com/grpc-api-key/grpc-api-key/keystore/importer] reads the exports of several systems.
type Imported struct {
	// Row says where the row is, such as "line 7", for an ImportProblem. Row may be empty.
	Row string
	// Format is the Name of the format in Options.Legacy that the tokens of the key have.
	Format string
	// Token is the token itself, if the other system stores tokens as plain text. Otherwise, leave
	// Token zero, and set Lookup and Digest.
	Token Secret
	// Lookup is what Parse of the format returns as the lookup for the token. Digest is the digest
	// of what Parse returns as the secret. Options.Hasher must match the scheme of the digest.
	Lookup string
	Digest hashing.Digest
	// Spec has the properties of the key. An ExpiresAt in the past is accepted. A refill of
	// Spec.Credits with Every is counted from the import.
	Spec Spec
	// CreatedAt is when the other system made the key. Zero, or a time in the future, means the
	// time of the import. LastUsedAt is when the key was last used; zero means never, and a time in
	// the future means the time of the import.
	CreatedAt, LastUsedAt time.Time
	// RevokedAt and DisabledAt are when the other system revoked or disabled the key. Zero means
	// that the key is not revoked, or not disabled. A revoked key is imported too, as a revoked
	// key, so that the store knows why the key is refused.
	RevokedAt, DisabledAt time.Time
}

// ImportOptions are the settings of Import. Nil and the zero value are valid.
type ImportOptions struct {
	// DryRun imports nothing. Import makes every check, and counts what Import would do without
	// DryRun. The IDs of all rows are held in memory.
	DryRun bool
	// AllowWeak imports tokens of fewer than 20 characters. A reader of the ID of such a key, in
	// a log for example, may be able to find the token by trial.
	AllowWeak bool
	// Problem receives each row that was not imported, with the reason, in the order of the rows.
	// Nil means that the problems are only counted.
	Problem func(*ImportProblem)
	// Progress receives the number of rows that were read, from time to time. Up to 131,072 of
	// these rows may not be imported yet. Nil means that no progress is reported. A panic of
	// Problem or Progress passes through to the caller of Import, and ends the call as an error
	// would.
	Progress func(rows int)
}

// An ImportResult has the numbers of an Import.
type ImportResult struct {
	Rows      int // that were read
	Imported  int // new keys; with DryRun, the keys that would be new
	Unchanged int // keys that an earlier import has taken, whatever has become of the keys since
	Refused   int // rows with an ImportProblem
	// Slow is how many of the Imported keys have a digest that takes long to compare. The first use
	// of such a key takes up to a few seconds of processor time, and one such use runs at a time.
	Slow int
	// Metered is how many of the Imported keys have credits.
	Metered int
	// Problems counts the refused rows by the Reason of the ImportProblem.
	Problems map[string]int
}

// An ImportProblem says why a row was not imported. The text has neither a token nor a digest.
type ImportProblem struct {
	Row    string // from Imported
	Reason string // one of the constants from ImportUnreadable to ImportPurged
	Text   string // what is wrong and what to do, for people
}

func (p *ImportProblem) Error() string {
	if p.Row == "" {
		return p.Text
	}
	return p.Row + ": " + p.Text
}

// Why a row is not imported.
const (
	ImportUnreadable = "unreadable" // the row does not have the form of the export
	ImportFormat     = "format"     // the token does not have the format
	ImportWeak       = "weak"       // the token has fewer than 20 characters
	ImportNative     = "native"     // the token has the form of the store's own tokens
	ImportDigest     = "digest"     // the Hasher of the store cannot match the digest
	ImportSpec       = "spec"       // the Spec is invalid
	ImportLifetime   = "lifetime"   // Options.MaxLifetime forbids the expiry
	ImportDuplicate  = "duplicate"  // another key has the same Lookup
	ImportPurged     = "purged"     // the key was imported before, and was purged
)

// Import adds keys of other systems to the store, and returns when the keys are durable. From then
// on the store knows the tokens that the other systems have issued: Options.Legacy must have the
// formats of the tokens, and Options.Hasher must match the digests. An imported key is a key as any
// other key. Each digest is replaced at the first use of the key, see hashing.Keyring. Rotate gives
// the key a token of the store's own form, and during the grace both tokens work.
//
// rows yields the keys. An error of rows that is an ImportProblem is the problem of one row. Any
// other error ends Import, which returns the error. A problem of one row never stops the import:
// see ImportOptions.Problem and ImportResult.
//
// Import is idempotent: a row whose key was imported before changes nothing. So after an error, or
// a crash, call Import again with all rows. If another row has the Lookup of a key but another
// digest, the row is refused. A key that was revoked in the store stays revoked, and a key that was
// purged is not imported again. The credits of a key are written together with the key, and a later
// import leaves them alone.
//
// A RevokeAll that runs at the same time also evaluates the keys that Import is writing. Import
// writes an event for each new key, with ActionImport.
//
// Import collects 65,536 rows, or 32 MiB, and writes these rows in the order of the IDs, while
// Import reads the next rows. So the order of the keys and of the events is not the order of the
// rows. Problems are reported in the order of the rows.
//
// ErrInvalid means that nothing was done. After any other error, the rows before the error may have
// been imported. The result is valid in any case.
func (s *Store) Import(
	ctx context.Context, rows iter.Seq2[Imported, error], opts *ImportOptions,
) (ImportResult, error) {
	i := &importRun{store: s, result: ImportResult{Problems: make(map[string]int)}}
	if opts != nil {
		i.opts = *opts
	}
	if rows == nil {
		return i.result, invalid("the rows are nil")
	}
	if len(s.legacy) == 0 {
		return i.result, invalid("Options.Legacy is empty: the store would refuse the tokens of " +
			"imported keys")
	}
	if err := refuseCondition(ctx, "Import"); err != nil {
		return i.result, err
	}
	if err := s.ready(ctx); err != nil {
		return i.result, err
	}
	var err error
	if i.actor, err = actorOf(ctx); err != nil {
		return i.result, err
	}
	if i.opts.DryRun {
		i.seen = make(map[token.ID][importMark]byte)
	} else {
		s.background.uncount() // the keys may have digests of earlier hashers
		defer s.background.uncount()
	}
	err = i.run(ctx, rows)
	return i.result, err
}

// An importRun is one call of Import.
//
// The IDs of imported keys are random. A backend with sorted files reads and rewrites less of these
// files if many rows come in the order of their IDs. So an importRun collects rows in a window, and
// writes the window in the order of the IDs, while the next window is filled. The outcomes are
// counted, and reported, in the order of the rows.
type importRun struct {
	store  *Store
	opts   ImportOptions
	actor  string
	result ImportResult
	seen   map[token.ID][importMark]byte // by a dry run

	window  importWindow  // is being filled
	writing *importWindow // nil: no window is being written

	// found means that a batch has found keys of an earlier import, so that the next batch reads
	// before it writes.
	found atomic.Bool
}

// An importWindow is a part of the rows, in the order of the export.
type importWindow struct {
	rows []*importRow
	size int // in bytes
	done chan struct{}
	err  error // readable once done is closed
}

// An importRow is a row of an export.
type importRow struct {
	row      string
	id       token.ID
	record   *record.Record // nil: the row is refused
	size     int            // of the record, or of the problem, in bytes
	credits  *Credits
	lastUsed time.Time
	// outcome is noProblem if the row was imported, and unchanged if the key was imported before.
	// nil: the outcome is not known.
	outcome *ImportProblem
}

func refusedRow(p ImportProblem) *importRow {
	return &importRow{outcome: &p, size: len(p.Row) + len(p.Text)}
}

var noProblem, unchanged = new(ImportProblem), new(ImportProblem)

const (
	// A window has at most so many rows, and at most so many bytes of records and of problems. Two
	// windows are in memory at the same time.
	maxWindow     = 1 << 16
	maxWindowSize = 32 << 20
	// maxImportWrites is how many batches run at the same time, so that the backend can commit them
	// together.
	maxImportWrites = 32
	// importChanges is the largest number of changes that the import of a key takes: of the record,
	// the grave, the event, the two indexes, the last use and the balance.
	importChanges = 7
	// importMark is the length of Record.imported_digest.
	importMark = 16
	// minImported is the length of the shortest token that is imported without AllowWeak.
	minImported = 20
	// importProgress is the number of rows between two reports.
	importProgress = 1000
)

func (i *importRun) run(ctx context.Context, rows iter.Seq2[Imported, error]) (err error) {
	defer func() {
		if failed := i.finish(); err == nil {
			err = failed
		}
		i.count(i.window.rows) // after an error, the refused rows of the window
	}()
	now := time.Now()
	for row, err := range rows {
		var r *importRow
		if err == nil {
			r, err = i.store.importRow(&row, &i.opts, now)
		}
		if problem := (*ImportProblem)(nil); errors.As(err, &problem) {
			r = refusedRow(*problem) // is reported later
		} else if err != nil {
			_ = i.write(ctx) // the rows before the error
			return err
		}
		i.result.Rows++
		if i.result.Rows%importProgress == 0 {
			if i.opts.Progress != nil {
				i.opts.Progress(i.result.Rows)
			}
			if err := i.store.ready(ctx); err != nil {
				return err
			}
		}
		if i.opts.DryRun {
			if err := i.dryRun(ctx, r); err != nil {
				return err
			}
			continue
		}
		if err := i.add(ctx, r); err != nil {
			return err
		}
	}
	return i.write(ctx)
}

// count adds the outcomes of rows to the result, and reports the problems.
func (i *importRun) count(rows []*importRow) {
	for _, r := range rows {
		switch r.outcome {
		case nil:
		case unchanged:
			i.result.Unchanged++
		case noProblem:
			i.result.Imported++
			if i.store.slow.has(r.record.DigestScheme) {
				i.result.Slow++
			}
			if r.credits != nil {
				i.result.Metered++
			}
		default:
			i.result.Refused++
			i.result.Problems[r.outcome.Reason]++
			if i.opts.Problem != nil {
				i.opts.Problem(r.outcome)
			}
		}
	}
}

// add adds a row to the window, and begins to write a full window.
func (i *importRun) add(ctx context.Context, r *importRow) error {
	i.window.rows = append(i.window.rows, r)
	i.window.size += r.size
	if len(i.window.rows) < maxWindow && i.window.size < maxWindowSize {
		return nil
	}
	return i.write(ctx)
}

// write waits for the window that is being written, and begins to write the next window.
func (i *importRun) write(ctx context.Context) error {
	if err := i.finish(); err != nil || len(i.window.rows) == 0 {
		return err
	}
	w := i.window
	w.done = make(chan struct{})
	i.writing, i.window = &w, importWindow{}
	go func() {
		defer close(w.done)
		w.err = i.writeWindow(ctx, w.rows)
	}()
	return nil
}

// finish waits for the window that is being written, counts its outcomes, and returns its error.
func (i *importRun) finish() error {
	w := i.writing
	if w == nil {
		return nil
	}
	i.writing = nil
	<-w.done
	i.count(w.rows)
	return w.err
}

// writeWindow writes the rows that are not refused. After an error, some rows have no outcome.
func (i *importRun) writeWindow(ctx context.Context, rows []*importRow) error {
	rows = slices.DeleteFunc(slices.Clone(rows), func(r *importRow) bool { return r.record == nil })
	slices.SortStableFunc(rows, func(a, b *importRow) int { return bytes.Compare(a.id[:], b.id[:]) })
	turns := make(chan struct{}, maxImportWrites)
	for len(rows) > 0 {
		var running sync.WaitGroup
		var failed atomic.Pointer[error]
		batches, again := importBatches(rows)
		for _, batch := range batches {
			turns <- struct{}{}
			if failed.Load() != nil {
				<-turns
				break
			}
			running.Go(func() {
				defer func() { <-turns }()
				if err := i.importBatch(ctx, batch); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			})
		}
		running.Wait()
		if err := failed.Load(); err != nil {
			return *err
		}
		rows = again
	}
	return nil
}

// importBatches returns batches of sorted rows, each small enough for one write. If several rows
// have the same ID, the first row is in a batch. The other rows are returned too: their outcomes
// depend on that of the first row.
func importBatches(rows []*importRow) (batches [][]*importRow, again []*importRow) {
	var batch []*importRow
	size := 0
	for n, r := range rows {
		if n > 0 && rows[n-1].id == r.id {
			again = append(again, r)
			continue
		}
		most := r.size + maxText + 512 // see sizeOf
		if len(batch) == maxKeyChanges/importChanges || len(batch) > 0 && size+most > maxKeysSize {
			batches = append(batches, batch)
			batch, size = nil, 0
		}
		batch = append(batch, r)
		size += most
	}
	if len(batch) > 0 {
		batches = append(batches, batch)
	}
	return batches, again
}

func (i *importRun) dryRun(ctx context.Context, r *importRow) error {
	if r.record != nil {
		mark := [importMark]byte(r.record.ImportedDigest)
		if other, ok := i.seen[r.id]; !ok {
			i.seen[r.id] = mark
			ctx, cancel := i.store.limited(ctx)
			defer cancel()
			if err := i.store.readImports(ctx, []*importRow{r}, nil); err != nil {
				return err
			}
		} else if r.outcome = unchanged; other != mark {
			r.outcome = r.duplicate()
		}
	}
	i.count([]*importRow{r})
	return nil
}

func (r *importRow) duplicate() *ImportProblem {
	return &ImportProblem{r.row, ImportDuplicate,
		"the store has another key with the same public part: one of the two must get a new key"}
}

// problem returns an ImportProblem of a row.
func (row *Imported) problem(reason, format string, args ...any) error {
	return &ImportProblem{row.Row, reason, fmt.Sprintf(format, args...)}
}

// importRow checks a row, and makes the record of the key. The error is an ImportProblem if the row
// cannot be imported.
func (s *Store) importRow(row *Imported, opts *ImportOptions, now time.Time) (*importRow, error) {
	format := formatNamed(s.legacy, row.Format)
	if format == nil {
		return nil, row.problem(ImportFormat, "Options.Legacy has no format %.40q: the store would "+
			"refuse the token", row.Format)
	}
	secret, err := s.secretOfRow(row, format, opts)
	if err != nil {
		return nil, err
	}
	if err := s.checkRow(row, now); err != nil {
		return nil, err
	}
	created := row.CreatedAt
	if created.UnixNano() <= 0 || created.After(now) {
		created = now
	}
	lastUsed := row.LastUsedAt
	if lastUsed.After(now) {
		lastUsed = now // otherwise the key would not count as unused until the time has come
	}
	r := newRecord(row.Spec, format.Name, secret.digest, created)
	r.ImportedAt, r.ImportedDigest = toNanos(now), markOfDigest(secret.mark)
	switch {
	case !row.RevokedAt.IsZero():
		r.Status, r.RevokedAt = record.Status_STATUS_REVOKED, max(1, toNanos(row.RevokedAt))
		r.RevokeReason = importedReason
	case !row.DisabledAt.IsZero():
		r.Status, r.DisabledAt = record.Status_STATUS_DISABLED, max(1, toNanos(row.DisabledAt))
		r.DisableReason = importedReason
	}
	if err := checkSize(r, 0); err != nil {
		return nil, row.problem(ImportSpec, "the key needs more than %d bytes of storage",
			maxRecordSize)
	}
	return &importRow{row: row.Row, id: secret.id, record: r, size: proto.Size(r),
		credits: row.Spec.Credits, lastUsed: lastUsed}, nil
}

// A rowSecret is what the store keeps of the token of a row.
type rowSecret struct {
	id     token.ID
	digest hashing.Digest
	// mark is for markOfDigest. A later import of the row has the same mark, whatever the Hasher is.
	mark hashing.Digest
}

// secretOfRow checks the token or the digest of a row. The error is an ImportProblem if the store
// could not admit the token, or should not.
func (s *Store) secretOfRow(
	row *Imported, format *LegacyFormat, opts *ImportOptions,
) (rowSecret, error) {
	text, digest := row.Token.Reveal(), row.Digest
	switch {
	case text != "" && (row.Lookup != "" || digest.Scheme != ""):
		return rowSecret{}, row.problem(ImportUnreadable, "the row has both a token and a digest")
	case text != "":
		return s.secretOfToken(row, format, opts)
	case row.Lookup == "" || digest.Scheme == "" || len(digest.Sum) == 0:
		return rowSecret{}, row.problem(ImportUnreadable, "the row has neither a token nor a digest")
	case len(digest.Scheme) > maxScheme || len(digest.Sum) > maxSum || !s.recognizes(digest):
		return rowSecret{}, row.problem(ImportDigest, "the Hasher of the store cannot match the "+
			"digest of scheme %.40q: add the hasher of this scheme to a hashing.Keyring, or give the "+
			"client a new key", digest.Scheme)
	}
	return rowSecret{legacyID(format.Name, row.Lookup), digest, digest}, nil
}

// secretOfToken is secretOfRow for a row with a token.
func (s *Store) secretOfToken(
	row *Imported, format *LegacyFormat, opts *ImportOptions,
) (rowSecret, error) {
	text := row.Token.Reveal()
	if _, ok := token.Parse(text); ok {
		return rowSecret{}, row.problem(ImportNative, "the token has the form of the store's own "+
			"tokens: restore a backup of its store instead")
	}
	if len(text) < minImported && !opts.AllowWeak {
		return rowSecret{}, row.problem(ImportWeak, "the token has %d characters, and needs %d: give "+
			"the client a new key, or allow weak tokens", len(text), minImported)
	}
	if len(text) > token.MaxLength || strings.IndexFunc(text, notInToken) >= 0 {
		return rowSecret{}, row.problem(ImportFormat, "the token has more than %d bytes, or a "+
			"character that no header can carry", token.MaxLength)
	}
	id, secret, ok := s.parseLegacy(format, text)
	if !ok {
		return rowSecret{}, row.problem(ImportFormat, "the token does not have the format %s",
			format.Name)
	}
	digest, err := s.digest(secret)
	if err != nil {
		return rowSecret{}, wrapErr("import", err)
	}
	sum := sha256.Sum256([]byte(secret))
	return rowSecret{id, digest, hashing.Digest{Scheme: plainScheme, Sum: sum[:]}}, nil
}

// checkRow checks the Spec and the times of a row. The error is an ImportProblem.
func (s *Store) checkRow(row *Imported, now time.Time) error {
	if err := row.Spec.check(new(Spec)); err != nil {
		return row.problem(ImportSpec, "%v",
			strings.TrimPrefix(err.Error(), "keystore: invalid argument: "))
	}
	dead := !row.RevokedAt.IsZero() ||
		!row.Spec.ExpiresAt.IsZero() && !row.Spec.ExpiresAt.After(now)
	if s.maxLifetime > 0 && !dead {
		if err := row.Spec.checkTimes(now, s.maxLifetime); err != nil {
			return row.problem(ImportLifetime, "Options.MaxLifetime wants every key to expire within "+
				"%v", s.maxLifetime)
		}
	}
	for _, t := range []time.Time{
		row.CreatedAt, row.LastUsedAt, row.RevokedAt, row.DisabledAt, row.Spec.ExpiresAt,
	} {
		if !t.IsZero() && (t.Year() < 1970 || t.Year() > 2261) {
			return row.problem(ImportSpec, "a time is not between the years 1970 and 2261")
		}
	}
	return nil
}

// importedReason is the reason for a revocation or a disabling by the other system.
const importedReason = "by the system from which the key was imported"

// notInToken reports whether a character cannot be in a credential of a call.
func notInToken(r rune) bool { return r <= ' ' || r > '~' }

// markOfDigest returns Record.imported_digest for a digest.
func markOfDigest(d hashing.Digest) []byte {
	h := sha256.New()
	_, _ = io.WriteString(h, d.Scheme+"\x00")
	h.Write(d.Sum)
	return h.Sum(nil)[:importMark]
}

// importBatch imports the rows of a batch, and sets their outcomes. The IDs of the rows differ.
//
// The batch begins a stamp before it reads, and ends the stamp after the write. So a RevokeAll that
// begins in between waits for the batch: see watchAdded.
func (i *importRun) importBatch(ctx context.Context, batch []*importRow) error {
	s := i.store
	if err := s.ready(ctx); err != nil {
		return err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	if !s.isWrong(noImportStamp) {
		stamp := s.sequencer.Begin(true)
		defer s.endStamps(stamp)
	}
	// Most keys are new. If a key is not, the write conflicts, and the next attempt reads.
	reads := i.found.Load()
	for attempt := 0; ; attempt++ {
		err := s.importKeys(ctx, batch, i.actor, reads || attempt > 0)
		if !mayRetry(err) {
			i.found.Store(slices.ContainsFunc(batch, func(r *importRow) bool {
				return r.outcome == unchanged
			}))
			return err
		}
		if !s.retries(ctx, err, attempt, false) {
			return s.contention(ctx, "import", err)
		}
	}
}

// importKeys makes one attempt of importBatch. If reads is false, importKeys expects that the store
// has nothing of the keys.
func (s *Store) importKeys(
	ctx context.Context, batch []*importRow, actor string, reads bool,
) (err error) {
	var all []*prepared
	begun := false
	defer func() {
		if err == nil {
			return
		}
		for _, r := range batch {
			r.outcome = nil
		}
		if !begun {
			for _, p := range all {
				s.endStamps(p.stamp)
			}
		}
	}()
	befores := make([]importBefore, len(batch))
	if reads {
		if err := s.readImports(ctx, batch, befores); err != nil {
			return err
		}
	}
	guard, err := s.guard() // before the stamps: see processes
	if err != nil {
		return err
	}
	for n, r := range batch {
		if !reads {
			r.outcome = noProblem
		}
		if r.outcome != noProblem {
			continue
		}
		p, err := s.prepareImport(r, actor, befores[n])
		if err != nil {
			return err
		}
		p.guard = guard
		all = append(all, p)
		if reads {
			if _, err := s.mendOwners(ctx, p); err != nil {
				return err
			}
		}
	}
	if len(all) == 0 {
		return nil
	}
	begun = true
	return s.commit(ctx, ErrNarrowed, all...)
}

// An importBefore is what the store has of a key that has no record.
type importBefore struct {
	grave uint64 // the revision of the empty grave; 0: there is no grave
	used  int64  // the minute of the last use; 0: not known
	usage uint64 // the revision of the last use; 0: there is no last use
	// the revision of a balance that is left over; 0: there is no balance
	balance uint64
}

// readImports reads what the store has of the keys of a batch, and sets the outcome that the import
// of each row will have. befores is nil in a dry run.
func (s *Store) readImports(
	ctx context.Context, batch []*importRow, befores []importBefore,
) error {
	ids := make([]token.ID, len(batch))
	for n, r := range batch {
		ids[n] = r.id
	}
	entries := make([]backend.Entry, len(batch))
	var err error
	if s.all != nil {
		if entries, _, err = s.readTogether(ctx, nil, ids, false, nil); err != nil {
			return s.scanError(ctx, "import", err)
		}
	}
	for n, r := range batch {
		e := entries[n]
		if s.all == nil {
			e, err = s.backend.Get(ctx, storageKey(r.id))
			if err != nil && !errors.Is(err, backend.ErrNotFound) {
				return s.scanError(ctx, "import", err)
			}
		}
		if e.Revision > 0 {
			kr, err := parseKeyRecord(e)
			if err != nil {
				return wrapErr("import", err)
			}
			r.outcome = unchanged
			if string(kr.record.ImportedDigest) != string(r.record.ImportedDigest) {
				r.outcome = r.duplicate()
			}
			continue
		}
		grave, err := s.readGrave(ctx, r.id)
		if err != nil {
			return err
		}
		if grave.record != nil {
			r.outcome = &ImportProblem{r.row, ImportPurged,
				"the key was imported before, and was purged: a purged key does not come back"}
			continue
		}
		r.outcome = noProblem
		if befores == nil {
			continue
		}
		befores[n].grave = grave.revision
		if !r.lastUsed.IsZero() {
			befores[n].used, befores[n].usage, err = s.readUsage(ctx, r.id)
			if err != nil {
				return err
			}
		}
		if r.credits != nil {
			b, err := s.readBalanceToSet(ctx, r.id)
			if err != nil {
				return err
			}
			befores[n].balance = b.revision
		}
	}
	return nil
}

// prepareImport prepares the import of a key that has no record, with a stamp for the event.
//
// The key is imported at the stamp, so that the record leads to the event: see prepareNew. A key
// that has a grave may come from another store, and the event index leads to the event.
func (s *Store) prepareImport(
	r *importRow, actor string, before importBefore,
) (*prepared, error) {
	stamp, now := s.sequencer.Begin(true), time.Now().UnixNano()
	r.record.ImportedAt = now
	leads := before.grave == 0 && stamp-now < int64(maxLead)
	if leads {
		r.record.ImportedAt = stamp
	}
	kr := &keyRecord{id: r.id, record: r.record, revision: 1}
	event := &record.Event{Action: record.Action_ACTION_IMPORT, Actor: actor}
	err := kr.grant(r.credits, before.balance, event)
	var p *prepared
	if err == nil {
		p, err = s.prepare(prior{grave: before.grave}, kr, event)
	}
	if err != nil {
		s.endStamps(stamp)
		return nil, err
	}
	p.stamp, p.indexesEvent = stamp, !leads
	if minute := minuteOf(r.lastUsed); !r.lastUsed.IsZero() && minute > before.used {
		p.keyChanges = append(p.keyChanges, backend.Change{Key: usageKey(r.id),
			Value: binary.AppendUvarint(nil, uint64(minute)), Expect: before.usage})
	}
	return p, nil
}
