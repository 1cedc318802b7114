package keystore

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
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
	// Spec has the properties of the key. An ExpiresAt in the past is accepted. Credits are refused.
	Spec Spec
	// CreatedAt is when the other system made the key. Zero, or a time in the future, means the
	// time of the import. LastUsedAt is when the key was last used; zero means never.
	CreatedAt, LastUsedAt time.Time
	// RevokedAt and DisabledAt are when the other system revoked or disabled the key. Zero means
	// that the key is not revoked, or not disabled. A revoked key is imported too, as a revoked key,
	// so that the store knows why the key is refused.
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
	// Problem receives each row that was not imported, with the reason. Nil means that the problems
	// are only counted.
	Problem func(*ImportProblem)
	// Progress receives the number of rows so far, from time to time. Nil means that no progress is
	// reported. A panic of Problem or Progress passes through to the caller of Import, and ends the
	// call as an error would.
	Progress func(rows int)
}

// An ImportResult has the numbers of an Import.
type ImportResult struct {
	Rows      int // that were read
	Imported  int // new keys; with DryRun, the keys that would be new
	Unchanged int // keys that an earlier import has taken, whatever has become of the keys since
	Refused   int // rows with an ImportProblem
	// Slow is how many of the Imported keys have a digest that takes long to compare. The first use
	// of such a key takes a part of a second, and one such use runs at a time.
	Slow int
	// Problems counts the refused rows by the Reason of the ImportProblem.
	Problems map[string]int
}

// An ImportProblem says why a row was not imported. The text has neither a token nor a digest.
type ImportProblem struct {
	Row    string // from Imported
	Reason string // one of the constants below
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
	ImportCredits    = "credits"    // the key has a limited number of uses, which would be lost
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
// purged is not imported again.
//
// A RevokeAll that runs at the same time also evaluates the keys that Import is writing. Import has
// an event for each key, with ActionImport.
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
type importRun struct {
	store  *Store
	opts   ImportOptions
	actor  string
	result ImportResult
	seen   map[token.ID][importMark]byte // by a dry run

	batch   []*importRow
	size    int // of the batch, in bytes
	running []chan importedBatch
}

// An importRow is a row that can be imported.
type importRow struct {
	row      string
	id       token.ID
	record   *record.Record
	lastUsed time.Time
}

// An importedBatch is the outcome of a batch. problems has an element for each row: noProblem if
// the row was imported, nil if the key was imported before.
type importedBatch struct {
	rows     []*importRow
	problems []*ImportProblem
	err      error
}

var noProblem = new(ImportProblem)

const (
	// maxImportWrites is how many batches run at the same time, so that the backend can commit them
	// together.
	maxImportWrites = 32
	// importChanges is how many changes the import of a key takes: of the record, the grave, the
	// event, the two indexes and the last use.
	importChanges = 6
	// importMark is the length of Record.imported_digest.
	importMark = 16
	// minImported is the length of the shortest token that is imported without AllowWeak.
	minImported = 20
	// importProgress is the number of rows between two reports.
	importProgress = 1000
)

func (i *importRun) run(ctx context.Context, rows iter.Seq2[Imported, error]) (err error) {
	defer func() {
		if failed := i.finish(0); err == nil {
			err = failed
		}
	}()
	now := time.Now()
	for row, err := range rows {
		if problem := (*ImportProblem)(nil); errors.As(err, &problem) {
			i.result.Rows++
			i.refuse(problem)
			continue
		}
		if err != nil {
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
		r, problem, err := i.store.importRow(&row, &i.opts, now)
		if err != nil {
			return err
		}
		if problem != nil {
			i.refuse(problem)
			continue
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
	return i.flush(ctx)
}

func (i *importRun) refuse(p *ImportProblem) {
	i.result.Refused++
	i.result.Problems[p.Reason]++
	if i.opts.Problem != nil {
		i.opts.Problem(p)
	}
}

// count adds the outcome of one row to the result.
func (i *importRun) count(r *importRow, problem *ImportProblem) {
	switch problem {
	case nil:
		i.result.Unchanged++
	case noProblem:
		i.result.Imported++
		if i.store.slow.has(r.record.DigestScheme) {
			i.result.Slow++
		}
	default:
		i.refuse(problem)
	}
}

// add adds a row to the batch, and begins to write a full batch.
func (i *importRun) add(ctx context.Context, r *importRow) error {
	size := proto.Size(r.record) + maxText + 384 // as sizeOf
	if len(i.batch) == maxKeyChanges/importChanges || i.size+size > maxKeysSize {
		if err := i.flush(ctx); err != nil {
			return err
		}
	}
	i.batch, i.size = append(i.batch, r), i.size+size
	return nil
}

// flush begins to write the batch.
func (i *importRun) flush(ctx context.Context) error {
	if len(i.batch) == 0 {
		return nil
	}
	if err := i.finish(maxImportWrites - 1); err != nil {
		return err
	}
	batch, outcome := i.batch, make(chan importedBatch, 1)
	i.batch, i.size = nil, 0
	i.running = append(i.running, outcome)
	go func() {
		problems, err := i.store.importBatch(ctx, batch, i.actor)
		outcome <- importedBatch{batch, problems, err}
	}()
	return nil
}

// finish waits until at most so many batches are running, and returns the first error of the
// finished batches.
func (i *importRun) finish(most int) (err error) {
	for len(i.running) > most {
		b := <-i.running[0]
		i.running = i.running[1:]
		if b.err != nil {
			if err == nil {
				err = b.err
			}
			continue
		}
		for n, r := range b.rows {
			i.count(r, b.problems[n])
		}
	}
	return err
}

func (i *importRun) dryRun(ctx context.Context, r *importRow) error {
	mark := [importMark]byte(r.record.ImportedDigest)
	if other, ok := i.seen[r.id]; ok {
		if other == mark {
			i.count(r, nil)
		} else {
			i.count(r, r.duplicate())
		}
		return nil
	}
	i.seen[r.id] = mark
	ctx, cancel := i.store.limited(ctx)
	defer cancel()
	p, problem, err := i.store.importKey(ctx, r, i.actor)
	if err == nil {
		i.count(r, problem)
	}
	if p != nil {
		i.store.endStamps(p.stamp)
	}
	return err
}

func (r *importRow) duplicate() *ImportProblem {
	return &ImportProblem{r.row, ImportDuplicate,
		"the store has another key with the same public part: one of the two must get a new key"}
}

// importRow checks a row, and makes the record of the key.
func (s *Store) importRow(
	row *Imported, opts *ImportOptions, now time.Time,
) (*importRow, *ImportProblem, error) {
	refuse := func(reason, format string, args ...any) (*importRow, *ImportProblem, error) {
		return nil, &ImportProblem{row.Row, reason, fmt.Sprintf(format, args...)}, nil
	}
	format := formatNamed(s.legacy, row.Format)
	if format == nil {
		return refuse(ImportFormat, "Options.Legacy has no format %.40q: the store would refuse "+
			"the token", row.Format)
	}
	lookup, digest := row.Lookup, row.Digest
	id := legacyID(format.Name, lookup)
	mark := digest
	if text := row.Token.Reveal(); text != "" {
		if lookup != "" || digest.Scheme != "" {
			return refuse(ImportUnreadable, "the row has both a token and a digest")
		}
		if _, ok := token.Parse(text); ok {
			return refuse(ImportNative, "the token has the form of the store's own tokens: "+
				"restore a backup of its store instead")
		}
		if len(text) < minImported && !opts.AllowWeak {
			return refuse(ImportWeak, "the token has %d characters, and needs %d: give the client "+
				"a new key, or allow weak tokens", len(text), minImported)
		}
		if len(text) > token.MaxLength || strings.IndexFunc(text, notInToken) >= 0 {
			return refuse(ImportFormat, "the token has more than %d bytes, or a character that no "+
				"header can carry", token.MaxLength)
		}
		var secret string
		var ok bool
		if id, secret, ok = s.parseLegacy(format, text); !ok {
			return refuse(ImportFormat, "the token does not have the format %s", format.Name)
		}
		var err error
		if digest, err = s.digest(secret); err != nil {
			return nil, nil, wrapErr("import", err)
		}
		sum := sha256.Sum256([]byte(secret))
		mark = hashing.Digest{Scheme: plainScheme, Sum: sum[:]}
	} else {
		if lookup == "" || digest.Scheme == "" || len(digest.Sum) == 0 {
			return refuse(ImportUnreadable, "the row has neither a token nor a digest")
		}
		if len(digest.Scheme) > maxScheme || len(digest.Sum) > maxSum || !s.recognizes(digest) {
			return refuse(ImportDigest, "the Hasher of the store cannot match the digest of scheme "+
				"%.40q: add the hasher of this scheme to a hashing.Keyring, or give the client a "+
				"new key", digest.Scheme)
		}
	}
	if err := row.Spec.check(new(Spec)); err != nil {
		return refuse(ImportSpec, "%v", strings.TrimPrefix(err.Error(), "keystore: invalid argument: "))
	}
	if row.Spec.Credits != nil {
		return refuse(ImportCredits, "the import cannot set credits: import the key without them, and "+
			"call SetCredits before a client uses the key")
	}
	dead := !row.RevokedAt.IsZero() ||
		!row.Spec.ExpiresAt.IsZero() && !row.Spec.ExpiresAt.After(now)
	if s.maxLifetime > 0 && !dead {
		if err := row.Spec.checkTimes(now, s.maxLifetime); err != nil {
			return refuse(ImportLifetime, "Options.MaxLifetime wants every key to expire within %v",
				s.maxLifetime)
		}
	}
	for _, t := range []time.Time{
		row.CreatedAt, row.LastUsedAt, row.RevokedAt, row.DisabledAt, row.Spec.ExpiresAt,
	} {
		if !t.IsZero() && (t.Year() < 1970 || t.Year() > 2261) {
			return refuse(ImportSpec, "a time is not between the years 1970 and 2261")
		}
	}
	created := row.CreatedAt
	if created.UnixNano() <= 0 || created.After(now) {
		created = now
	}
	r := newRecord(row.Spec, format.Name, digest, created)
	r.ImportedAt, r.ImportedDigest = toNanos(now), markOfDigest(mark)
	switch {
	case !row.RevokedAt.IsZero():
		r.Status, r.RevokedAt = record.Status_STATUS_REVOKED, max(1, toNanos(row.RevokedAt))
		r.RevokeReason = importedReason
	case !row.DisabledAt.IsZero():
		r.Status, r.DisabledAt = record.Status_STATUS_DISABLED, max(1, toNanos(row.DisabledAt))
		r.DisableReason = importedReason
	}
	if err := checkSize(r, 0); err != nil {
		return refuse(ImportSpec, "the key needs more than %d bytes of storage", maxRecordSize)
	}
	return &importRow{row.Row, id, r, row.LastUsedAt}, nil, nil
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

// importBatch imports the rows of a batch, and returns an outcome for each row: see importedBatch.
//
// The batch begins a stamp before it reads, and ends the stamp after the write. So a RevokeAll that
// begins in between waits for the batch: see watchAdded.
func (s *Store) importBatch(
	ctx context.Context, batch []*importRow, actor string,
) ([]*ImportProblem, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	if !s.isWrong(noImportStamp) {
		stamp := s.sequencer.Begin(true)
		defer s.endStamps(stamp)
	}
	for attempt := 0; ; attempt++ {
		problems, err := s.importKeys(ctx, batch, actor, attempt)
		if !mayRetry(err) {
			return problems, err
		}
		if !s.retries(ctx, err, attempt, false) {
			return nil, s.contention(ctx, "import", err)
		}
	}
}

// importKeys makes one attempt of importBatch.
func (s *Store) importKeys(
	ctx context.Context, batch []*importRow, actor string, attempt int,
) ([]*ImportProblem, error) {
	problems := make([]*ImportProblem, len(batch))
	marks := make(map[token.ID]string, len(batch)) // of the keys in this write
	guard, err := s.guard()                        // before the stamps: see processes
	if err != nil {
		return nil, err
	}
	var all []*prepared
	begun := false
	defer func() {
		if !begun {
			for _, p := range all {
				s.endStamps(p.stamp)
			}
		}
	}()
	for n, r := range batch {
		if mark, twice := marks[r.id]; twice {
			if mark != string(r.record.ImportedDigest) {
				problems[n] = r.duplicate()
			}
			continue
		}
		p, problem := (*prepared)(nil), noProblem
		if attempt == 0 {
			// Most keys are new. If one is not, the write conflicts, and the next attempt reads.
			p, err = s.prepareImport(ctx, r, actor, 0, false)
		} else {
			p, problem, err = s.importKey(ctx, r, actor)
		}
		if err != nil {
			return nil, err
		}
		problems[n] = problem
		if p == nil {
			continue
		}
		p.guard = guard
		all = append(all, p)
		marks[r.id] = string(r.record.ImportedDigest)
		if attempt > 0 {
			if _, err := s.mendOwners(ctx, p); err != nil {
				return nil, err
			}
		}
	}
	if len(all) == 0 {
		return problems, nil
	}
	begun = true
	return problems, s.commit(ctx, ErrNarrowed, all...)
}

// importKey prepares the import of one key. The results are nil if the key was imported before.
func (s *Store) importKey(
	ctx context.Context, r *importRow, actor string,
) (*prepared, *ImportProblem, error) {
	e, err := s.backend.Get(ctx, storageKey(r.id))
	switch {
	case err == nil:
		kr, err := parseKeyRecord(e)
		if err != nil {
			return nil, nil, wrapErr("import", err)
		}
		if string(kr.record.ImportedDigest) != string(r.record.ImportedDigest) {
			return nil, r.duplicate(), nil
		}
		return nil, nil, nil
	case !errors.Is(err, backend.ErrNotFound):
		return nil, nil, s.scanError(ctx, "import", err)
	}
	grave, err := s.readGrave(ctx, r.id)
	if err != nil {
		return nil, nil, err
	}
	if grave.record != nil {
		return nil, &ImportProblem{r.row, ImportPurged,
			"the key was imported before, and was purged: a purged key does not come back"}, nil
	}
	p, err := s.prepareImport(ctx, r, actor, grave.revision, true)
	return p, noProblem, err
}

// prepareImport prepares the import of a key that has no record, with a stamp for the event. grave is
// the revision of the grave. If reads is false, prepareImport expects that there is no last use.
//
// The key is imported at the stamp, so that the record leads to the event: see prepareNew. A key
// that has a grave may come from another store, and the event index leads to the event.
func (s *Store) prepareImport(
	ctx context.Context, r *importRow, actor string, grave uint64, reads bool,
) (*prepared, error) {
	var usage []backend.Change
	if minute := minuteOf(r.lastUsed); !r.lastUsed.IsZero() {
		have, revision, err := int64(0), uint64(0), error(nil)
		if reads {
			have, revision, err = s.readUsage(ctx, r.id)
		}
		if err != nil {
			return nil, err
		}
		if minute > have {
			usage = append(usage, backend.Change{Key: usageKey(r.id),
				Value: binary.AppendUvarint(nil, uint64(minute)), Expect: revision})
		}
	}
	stamp, now := s.sequencer.Begin(true), time.Now().UnixNano()
	r.record.ImportedAt = now
	leads := grave == 0 && stamp-now < int64(maxLead)
	if leads {
		r.record.ImportedAt = stamp
	}
	p, err := s.prepare(prior{grave: grave}, &keyRecord{id: r.id, record: r.record, revision: 1},
		&record.Event{Action: record.Action_ACTION_IMPORT, Actor: actor})
	if err != nil {
		s.endStamps(stamp)
		return nil, err
	}
	p.stamp, p.indexesEvent = stamp, !leads
	p.keyChanges = append(p.keyChanges, usage...)
	return p, nil
}
