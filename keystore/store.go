package keystore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Store holds API keys. Open or New make one; Close ends it. It is safe for concurrent use.
type Store struct {
	format  *token.Format
	hasher  hashing.Hasher
	decoy   hashing.Digest // what the token of an unknown key is compared with
	foreign sync.Once      // a warning of digests that the hasher does not make
	proof   proof          // of the hasher, for its check value
	backend backend.Backend
	fence   *fence.Fence[entry]
	log     *slog.Logger
	panics  *panics
	down    atomic.Pointer[error] // why nothing is served any more: ErrClosed or ErrUnavailable; nil while all is well

	observer    Observer // nil: nobody
	maxLifetime time.Duration
	retention   time.Duration // of events; 0 or less: for ever

	timeout time.Duration // of a mutation; 0 or less: none
	patient bool          // reads need no timeout, because none would help

	journal journal
	queue   changeQueue
	limits  *limits
	texts   texts
	usage   usage

	_       [64]byte // a flood of refusals is not to take from every core the cache lines that a hit reads
	refused atomic.Uint64
	_       [64]byte

	background background

	mu      sync.Mutex     // guards closing against a change that is about to start
	closing bool           // no change starts any more
	closed  chan struct{}  // closed when the first Close has ended what goes on, which others wait for
	changes sync.WaitGroup // goroutines that wait for the backend; grows under mu only
}

// Open opens the store in a directory, which must be the store's own. A store is made where the
// directory is missing or empty, unless Options.MustExist is set. The directory gets mode 0700. Nil
// options are the defaults.
//
// A directory that holds anything else than a store, such as another program's Badger database, is
// refused and not touched. Files that others have put beside a store's files are left alone.
//
// A directory that another process, or another Store of this one, has open gives ErrLocked; one
// that is damaged, or lacks something that was acknowledged, ErrCorrupt, and it is left as it is
// (see Options.Recover and CheckIntegrity); unusable options give ErrInvalid, and so does a Hasher
// with another pepper than the keys of the store have. Any other error is the operating system's:
// too little space on the disk is syscall.ENOSPC, and a quota that allows too little is both
// syscall.ENOSPC and syscall.EDQUOT. A file that the user of this process may not write is
// fs.ErrPermission, and the text says whose file it is and what to do. No store, with
// Options.MustExist, is fs.ErrNotExist. On a 32-bit system Open returns errors.ErrUnsupported,
// because Badger damages its tables there; use New with another backend.
func Open(dir string, opts *Options) (*Store, error) {
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	settings := badgerdb.Options{Logger: s.log, Failed: s.noteFailure}
	if opts != nil {
		settings.Recover, settings.MustExist = opts.Recover, opts.MustExist
	}
	db, err := badgerdb.Open(dir, settings)
	if err != nil {
		return nil, fmt.Errorf("keystore: open: %w", err)
	}
	s.patient = true
	if err := s.start(db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

// New makes a store on any backend, which it owns from then on: Close closes it. Nil options are
// the defaults; ErrInvalid says what is wrong with them, as it does for Open. After an error the
// backend is still the caller's.
func New(b backend.Backend, opts *Options) (*Store, error) {
	if b == nil {
		return nil, invalid("the backend is nil")
	}
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	if err := s.start(&guardedBackend{b, s.panics}); err != nil {
		return nil, err
	}
	return s, nil
}

// start begins to work on a backend.
func (s *Store) start(b backend.Backend) error {
	s.backend = b
	if err := s.checkHasher(); err != nil {
		return err
	}
	if err := s.resumeJournal(); err != nil {
		return err
	}
	s.resumeUsage()
	s.startBackground()
	return nil
}

func newStore(opts *Options) (*Store, error) {
	o := opts.settled()
	format, err := token.NewFormat(o.Prefix, o.SecretLength, o.SecretCharset)
	if err != nil {
		return nil, invalid("%v", err)
	}
	log := guardLogger(o.Logger)
	panics := newPanics(log)
	s := &Store{
		format:  format,
		hasher:  guardHasher(o.Hasher, panics),
		fence:   fence.New(o.CacheSize, (*entry).node),
		log:     log,
		panics:  panics,
		closed:  make(chan struct{}),
		timeout: o.Timeout,

		observer:    guardObserver(o.Observer, panics),
		maxLifetime: o.MaxLifetime,
		retention:   o.EventRetention,
	}
	s.usage.used, s.usage.most = make(map[token.ID]int64), maxUsed
	s.limits = newLimits(&s.usage)
	_, unused := format.New()
	if s.decoy, err = s.digest(unused); err != nil {
		return nil, invalid("Options.Hasher panicked, or made a digest without a scheme or a sum, "+
			"or one of more than %d bytes", maxSum)
	}
	return s, nil
}

// Close ends every context that Bind gave out, with cause ErrClosed: a key that nobody can revoke
// any more admits nobody. It waits for changes that are under way, and releases the directory.
// After it, every method returns ErrClosed, and a Close after one that returned nil does nothing;
// one that is called meanwhile waits for the first.
//
// To stop a gRPC server and its store, call Shutdown of package interceptor. A server whose store
// is closed first refuses every call, also calls with a good key.
//
// An error means that the directory may still be held: where there is no space left on the disk,
// Close can be called again when there is. Where storage could not be written, Close can be called
// again, too, and returns an error as long as the directory is held. Nothing that was acknowledged
// is lost in any case.
func (s *Store) Close() error {
	s.mu.Lock()
	again := s.closing
	s.closing = true
	s.mu.Unlock()
	if !again {
		s.down.Store(&ErrClosed)
		s.fence.Close(ErrClosed)
		s.stopBackground()
		close(s.closed)
	}
	<-s.closed
	err := s.backend.Close() // which does nothing if it has been closed
	s.changes.Wait()
	if err != nil {
		return trouble("close", err)
	}
	return nil
}

// CheckIntegrity reads everything that is stored, and returns ErrCorrupt, which says what is damaged, if any of it is not
// what was written. It looks at one moment of a store that goes on working, takes about a second for each million keys,
// and changes nothing. Open checks the files, and each use of a key its record; this is for a look from time to time, and
// before a backup is kept for good.
func (s *Store) CheckIntegrity(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	var damage []error
	if c, ok := s.backend.(backend.Checker); ok {
		if err := c.Check(ctx); errors.Is(err, backend.ErrCorrupt) {
			damage = append(damage, err)
		} else if err != nil {
			return s.scanError(ctx, "check", err)
		}
	}
	const enough = 16
	for e, err := range s.backend.Scan(ctx, nil, nil) {
		if err == nil {
			err = checkStored(e)
		} else if !errors.Is(err, backend.ErrCorrupt) {
			return s.scanError(ctx, "check", err)
		}
		if err != nil {
			damage = append(damage, err)
		}
		if len(damage) == enough {
			damage = append(damage, errors.New("and there may be more"))
			break
		}
	}
	if len(damage) == 0 {
		return nil
	}
	return fmt.Errorf("keystore: check: %w", errors.Join(damage...))
}

// checkStored reads an entry of whatever kind.
func checkStored(e backend.Entry) (err error) {
	switch e.Key[0] {
	case keySpace:
		_, err = parseStored(e)
	case eventSpace:
		_, err = parseEvent(e)
	case usageSpace:
		_, err = parseUsage(e)
	case checkSpace:
		_, err = parseCheck(e)
	case usageStateKey[0]:
		_, err = parseUsageState(e)
	}
	return err
}

// Stats describes a store at work.
type Stats struct {
	// Hits and Misses count the look-ups of Verify and Bind that were answered from memory, and those that were not.
	Hits, Misses uint64
	// Refused counts the calls of Verify and Bind that returned an error.
	Refused uint64
	// Cached is the number of keys in memory. Live is the number of contexts from Bind that have not ended.
	Cached, Live int
	// Outdated is the number of stored digests that were made by an earlier hasher of a hashing.Keyring, as they were
	// counted last: no use makes more of them. When it is 0, the earlier hashers can go. It is -1 until they have been
	// counted, in the background, and if the Hasher has no earlier ones.
	Outdated int
}

// Stats returns counts since the store was opened, and numbers of now. Those of the cache are of
// one moment. For package expvar:
//
//	expvar.Publish("apikeys", expvar.Func(func() any { return store.Stats() }))
func (s *Store) Stats() Stats {
	st := s.fence.Stats()
	b := &s.background
	b.mu.Lock()
	defer b.mu.Unlock()
	return Stats{
		Hits:     st.Hits,
		Misses:   st.Misses,
		Refused:  s.refused.Load(),
		Cached:   st.Cached,
		Live:     st.Bound,
		Outdated: b.outdated,
	}
}

// Err returns why the store has stopped, or nil while it serves. After Close that is ErrClosed. After a failure of the
// storage, which only a new Open can end, it wraps ErrUnavailable and says what failed. It never changes back to nil.
//
// Trouble that may pass, such as a full disk, does not stop a store. Err is cheap and asks nothing of the storage, so it
// suits a health check: a failure shows once a call, or the background work of each minute, has met it.
func (s *Store) Err() error { return s.serving() }

// serving returns nil, ErrClosed, or ErrUnavailable.
func (s *Store) serving() error {
	if err := s.down.Load(); err != nil {
		return *err
	}
	return nil
}

// noteFailure stops the store for good if err says that the backend has stopped.
func (s *Store) noteFailure(err error) {
	if !errors.Is(err, backend.ErrFailed) {
		return
	}
	down := trouble("serve", err)
	if s.down.CompareAndSwap(nil, &down) {
		s.log.Error("API key store failed; reopen it", "error", err)
	}
}

var errSlow = fmt.Errorf("%w: storage did not answer in time", ErrUnavailable)

// limited bounds a call that waits for the backend.
func (s *Store) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.timeout <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, s.timeout, errSlow)
}

// endOf returns nil while ctx goes on, ErrUnavailable if the limit ended it, and otherwise the context's own error. A
// cause that the caller gave is left out: it may be a denial of another key.
func endOf(ctx context.Context) error {
	if cause := context.Cause(ctx); errors.Is(cause, errSlow) {
		return cause
	}
	return ctx.Err()
}

// scanError says what a Scan's error is to the caller of the list.
func (s *Store) scanError(ctx context.Context, doing string, err error) error {
	if ended := endOf(ctx); ended != nil {
		return ended
	}
	s.noteFailure(err)
	return trouble(doing, err)
}

// get reads and decodes one record. The context may be limited. Its errors are this package's, and the context's own
// only if the caller ended it.
func (s *Store) get(ctx context.Context, id token.ID) (*stored, error) {
	e, err := s.backend.Get(ctx, storageKey(id))
	if err == backend.ErrNotFound { // as it comes from most: a flood of unknown keys is not to cost more than it must
		return nil, errNoKey
	}
	if err != nil {
		if ended := endOf(ctx); ended != nil {
			return nil, ended
		}
		s.noteFailure(err)
		return nil, trouble("read", err)
	}
	st, err := parseStored(e)
	if err == nil && st.purged() {
		return nil, errNoKey
	}
	return st, err
}

var errNoKey = trouble("read", ErrNotFound)

// apply hands one change to the backend, and returns when it is durable or ctx is done, whichever is first. A change
// cannot be withdrawn, so it is followed to its end in a goroutine even if nobody waits: settle is called there with the
// outcome, once, before apply returns it. Where apply did not wait for the outcome, the change may
// happen yet. Once the backend has answered, the outcome is known, however long settle takes to tell of it.
func (s *Store) apply(ctx context.Context, c []backend.Change, settle func(error)) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		settle(ErrClosed)
		return ErrClosed
	}
	var known atomic.Bool
	done := make(chan error, 1)
	s.changes.Go(func() {
		var err error
		// Even if an Observer ends the goroutine, as FailNow of a test does.
		defer func() { done <- err }()
		err = s.backend.Apply(context.WithoutCancel(ctx), c...)
		known.Store(true)
		settle(err)
	})
	s.mu.Unlock()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		if !known.Load() {
			return fmt.Errorf("keystore: write: the outcome is not known: %w", endOf(ctx))
		}
		err = <-done
	}
	if err == nil || errors.Is(err, backend.ErrConflict) {
		return err
	}
	s.noteFailure(err)
	s.log.Error("API key store could not write", "error", err)
	return trouble("write", err)
}
