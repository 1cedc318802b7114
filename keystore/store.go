package keystore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/changequeue"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/intern"
	"github.com/grpc-api-key/grpc-api-key/internal/sequencer"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Store holds API keys. Open or New makes a Store, and Close ends the Store. A Store is safe for
// concurrent use.
type Store struct {
	format      *token.Format
	hasher      hashing.Hasher
	summer      summer         // the hasher, if it is one; or nil
	dummyDigest hashing.Digest // compared with the token of an unknown key
	legacy      []LegacyFormat // Options.Legacy
	slow        *slowMatches   // nil: the hasher has no slow scheme
	warnScheme  sync.Once      // for the warning about digests that the hasher does not make
	proof       proof          // for the check value of the hasher
	backend     backend.Backend
	all         backend.AllGetter // the backend, if it is one; or nil
	fence       *fence.Fence[cachedKey]
	log         *slog.Logger
	panics      *panics
	// down is why the store refuses all calls: ErrClosed or ErrUnavailable. Nil while the store
	// serves.
	down atomic.Pointer[error]
	// serves ends when down is set. stopServing ends serves.
	serves      context.Context
	stopServing context.CancelFunc

	observer    Observer // nil: none
	maxLifetime time.Duration
	retention   time.Duration // of events; 0 or less: forever

	freshness            time.Duration // Options.Freshness
	timeout              time.Duration // of a mutation; 0 or less: none
	readsUninterruptible bool          // reads have no timeout, because a timeout would not help

	sequencer sequencer.Sequencer // of the events
	queue     changequeue.Queue
	limits    *limits
	accounts  *accounts
	interner  intern.Interner // of the owners and scopes of cached keys
	shared    sharedTerms     // of cached keys
	usage     usage

	rebuildIndexes bool // Options.RebuildIndexes
	// indexedSince is the indexState.since of the indexes; written by Open only.
	indexedSince int64
	// processes is nil if the store belongs to this process alone.
	processes *processes
	// reads are the reads of Verify and Bind; nil if the store belongs to this process alone.
	reads *sharedReads
	// configureCluster changes the Config of the cluster before the store joins. Only tests set
	// configureCluster.
	configureCluster func(*cluster.Config)

	counts *storeCounts
	wrong  variant // for tests

	background background

	mu      sync.Mutex // guards closing against a change that is about to start
	closing bool       // no further change starts
	// closed is closed after the first Close has ended the contexts and the background work. Other
	// calls of Close wait for closed.
	closed chan struct{}
	writes sync.WaitGroup // goroutines that wait for the backend; grows under mu only
}

// Open opens the store in a directory. The directory must belong to the store alone. If the
// directory is missing or empty, Open makes a store, unless Options.MustExist is set. The directory
// gets mode 0700. Nil options mean the defaults.
//
// If the directory holds something other than a store, such as another program's Badger database,
// Open refuses the directory and does not touch it. Open does not touch the files that others have
// put beside the files of a store.
//
// If an earlier version without indexes has made or changed the store, Open builds the indexes,
// once, and logs the progress to Options.Logger. This takes about half a minute for each million
// keys and events. If the process is killed before the end, nothing is lost: the next Open
// continues.
//
// Open returns these errors:
//
//   - ErrLocked, if another process, or another Store of this process, has the directory open;
//   - ErrCorrupt, if the directory is damaged, or lacks something that was acknowledged: Open does
//     not change the directory then (see Options.Recover and CheckIntegrity);
//   - ErrInvalid, if the options are unusable, if the Hasher has another pepper than the keys of
//     the store, or if a later version has written the indexes of the store, or an entry that Open
//     has to index;
//   - fs.ErrNotExist, if there is no store and Options.MustExist is set;
//   - fs.ErrPermission, if the user of this process may not write a file: the text names the owner
//     of the file and says what to do;
//   - syscall.ENOSPC, if the disk has too little space, and both syscall.ENOSPC and syscall.EDQUOT
//     if a quota allows too little;
//   - errors.ErrUnsupported on a 32-bit system, because Badger damages its tables on such a system:
//     use New with another backend.
//
// Any other error is an error of the operating system.
func Open(dir string, opts *Options) (*Store, error) {
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	settings := badgerdb.Options{
		Logger: s.log,
		Failed: s.noteFailure,
		// A recovery may lose index entries and last uses. Without the state, both are incomplete.
		Forget: [][]byte{stateKey},
		Parent: indexed,
	}
	if opts != nil {
		settings.MustExist = opts.MustExist
		settings.Recover = opts.Recover
	}
	db, err := badgerdb.Open(dir, settings)
	if err != nil {
		return nil, fmt.Errorf("keystore: open: %w", err)
	}
	s.readsUninterruptible = true
	if err := s.start(db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

// New makes a store on any backend. The store owns the backend from then on: Close closes the
// backend. After an error, the backend still belongs to the caller. Nil options mean the defaults.
// If the options are unusable, New returns ErrInvalid, as Open does, and the text gives the reason.
//
// If the backend is a backend.Feeder, several processes may have the store open at the same time:
// see the package comment. New then joins the other processes, and returns once this process may
// admit callers. If that takes longer than Options.Timeout, New returns ErrUnavailable.
//
// Any other backend belongs to one Store. Do not open a second Store on the same data, in this
// process or in another process: a key that is revoked in one Store would stay valid in the other.
func New(b backend.Backend, opts *Options) (*Store, error) {
	if b == nil {
		return nil, invalid("the backend is nil")
	}
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	if err := s.start(guardBackend(b, s.panics)); err != nil {
		return nil, err
	}
	return s, nil
}

// start begins to work on a backend.
func (s *Store) start(b backend.Backend) error {
	s.backend, s.all = b, allGetterOf(b)
	if err := s.joinProcesses(); err != nil {
		return err
	}
	err := s.prepareBackend()
	if err == nil {
		s.startBackground()
	} else if s.processes != nil {
		s.processes.cluster.Close()
	}
	return err
}

// prepareBackend checks what the backend holds, and continues after it.
func (s *Store) prepareBackend() error {
	if err := s.checkHasher(); err != nil {
		return err
	}
	if err := s.migrate(context.Background()); err != nil {
		return err
	}
	if err := s.sequencer.Resume(s.firstStamp); err != nil {
		return wrapErr("open", err)
	}
	s.resumeUsage()
	return nil
}

func newStore(opts *Options) (*Store, error) {
	o := opts.withDefaults()
	format, err := token.NewFormat(o.Prefix, o.SecretLength, o.SecretCharset)
	if err != nil {
		return nil, invalid("%v", err)
	}
	log := guardLogger(o.Logger)
	panics := newPanics(log)
	s := &Store{
		format:  format,
		hasher:  guardHasher(o.Hasher, panics),
		fence:   fence.New(o.CacheSize, (*cachedKey).node),
		log:     log,
		panics:  panics,
		counts:  new(storeCounts),
		closed:  make(chan struct{}),
		timeout: o.Timeout,

		freshness: o.Freshness,

		observer:    guardObserver(o.Observer, panics),
		maxLifetime: o.MaxLifetime,
		retention:   o.EventRetention,

		rebuildIndexes: o.RebuildIndexes,
	}
	s.serves, s.stopServing = context.WithCancel(context.Background())
	s.usage.used, s.usage.most = make(map[token.ID]int64), maxUsed
	s.usage.flushing = make(chan struct{}, 1)
	s.limits = newLimits(&s.usage)
	s.accounts = s.newAccounts()
	s.summer, _ = s.hasher.(summer) // a guarded Hasher is no summer
	if s.legacy, err = checkLegacy(o.Legacy); err != nil {
		return nil, err
	}
	_, unused := format.New()
	if s.dummyDigest, err = s.digest(unused); err != nil {
		return nil, invalid("Options.Hasher panicked, or made a digest without a scheme or a sum, "+
			"or one of more than %d bytes", maxSum)
	}
	s.slow = newSlowMatches(s.hasher, s.dummyDigest.Scheme)
	return s, nil
}

// Close ends every session, with the cause ErrClosed: a key that can no longer be revoked must not
// admit any caller. Close waits for changes that are under way, and releases the directory. After
// Close, every method returns ErrClosed. After a Close that returned nil, a further Close does
// nothing. A Close that is called during the first Close waits for the first Close.
//
// To stop a gRPC server and its store, call Shutdown of package interceptor. If the store is closed
// before the server, the server refuses every call, even a call with a valid key.
//
// An error means that the store may still hold the directory. If the disk has no space left, call
// Close again when the disk has space. If storage could not be written, Close can be called again
// too. Close then returns an error as long as the store holds the directory. Close never loses an
// acknowledged change.
func (s *Store) Close() error {
	s.mu.Lock()
	again := s.closing
	s.closing = true
	s.mu.Unlock()
	if !again {
		s.down.Store(&ErrClosed)
		s.stopServing()
		s.fence.Close(ErrClosed)
		s.stopBackground()
		s.closeAccounts()
		s.leaveProcesses()
		s.awaitReports()
		close(s.closed)
	}
	<-s.closed
	err := s.backend.Close() // does nothing if the backend is closed already
	s.writes.Wait()
	if s.reads != nil && err == nil {
		s.reads.close()
	}
	if err != nil {
		return wrapErr("close", err)
	}
	return nil
}

// awaitReports waits until no goroutine of the store notifies the observer of the end of a context.
// The observer may be stuck, or may call Close, so awaitReports gives up after reportPatience.
func (s *Store) awaitReports() {
	timer := time.NewTimer(reportPatience)
	defer timer.Stop()
	select {
	case <-s.fence.Quiesce():
	case <-timer.C:
		s.log.Warn("API key store closes while Observer.Ended is still running")
	}
}

// reportPatience is how long Close waits for an observer, beyond the changes that are under way.
const reportPatience = 5 * time.Second

// Stats describes a store at work. Each of the maps, except OutdatedSchemes, has every word that it
// can have, also with a count of 0. The caller may change the maps.
type Stats struct {
	// Hits counts the look-ups of Verify and Bind that were answered from memory. Misses counts the
	// other look-ups.
	Hits, Misses uint64
	// Admitted counts the calls of Verify and Bind that returned no error.
	Admitted uint64
	// Refused counts the calls of Verify and Bind that returned an error. Refusals counts the same
	// calls by the Reason of the error.
	Refused  uint64
	Refusals map[string]uint64
	// Changes counts the changes of keys that this Store has made, by the action.
	Changes map[Action]uint64
	// Durations has how long the calls that change one key took, by the action and whatever the
	// result: Create, Update, Rotate, Disable, Enable, Revoke, SetCredits and AddCredits, until the
	// change was in force in every process, and the rehash of a digest in the background.
	Durations map[Action]Histogram
	// FailedWrites counts the writes of changes and of last uses that failed, by one of two words:
	// full, if the storage had no space, and failed. Most of the failed writes are those of a call
	// that returned ErrUnavailable.
	FailedWrites map[string]uint64
	// Ended counts the sessions that the store has ended, by the Reason of the cause: revoked,
	// disabled, not_yet_valid, narrowed, expired or closed; or unavailable, if this process was out
	// of contact with the other processes of the store. A session that ends with Close of the
	// session, or whose context ends, does not count.
	Ended map[string]uint64
	// Processes is the number of processes that have the store open, including this process, as
	// far as this process knows: 1 if the backend is not a backend.Feeder. A process that died
	// counts until the other processes have removed it, after about three times the freshness of
	// the store. 0 means that this process is out of contact with the other processes.
	Processes int
	// Fresh is the result of Store.Fresh: whether this process may admit callers.
	Fresh bool
	// Freshness is the freshness of the store: see Options.Freshness. FeedLag is how long the
	// storage took to confirm the last heartbeat of this process and to deliver it in the feed of
	// the changes, or how long the process waits for this now, if that is longer. Barriers has how
	// long calls waited until a change was in force in every process. LostTouch counts how often
	// this process had no new proof in time, and refused all calls until the next proof.
	// Removed counts the silent processes that this process has removed from the store. If the
	// backend is not a backend.Feeder, all of these are 0.
	Freshness, FeedLag time.Duration
	Barriers           Histogram
	LostTouch, Removed uint64
	// Leases counts the leases of credits: each is a write. Exhausted counts the calls of Verify,
	// Bind and Spend that were refused with a *CreditsError. A call of Spend is in no other count.
	Leases, Exhausted uint64
	// Evicted counts the keys that left the memory because other keys needed the space: see
	// Options.CacheSize.
	Evicted uint64
	// Cached is the number of keys in memory. Live is the number of sessions from Bind that have
	// not ended.
	Cached, Live int
	// Outdated is the number of stored digests that an earlier hasher of a hashing.Keyring has
	// made, by the last count. No use of a key adds an outdated digest. When Outdated is 0, you can
	// remove the earlier hashers. Outdated is -1 before the first count, which runs in the
	// background, and if the Hasher has no earlier hashers.
	Outdated int
	// OutdatedSchemes has the numbers of Outdated by the scheme of the digests, such as
	// "hmac-sha256:2025". A scheme without digests is not in the map, so you can remove its hasher.
	// A scheme that no hasher of the keyring has is in the map too. Nil means that Outdated is -1.
	OutdatedSchemes map[string]int
}

// Stats returns counts since the store was opened, and current numbers. All numbers of the cache
// are of the same moment. A count never goes down. For package expvar:
//
//	expvar.Publish("apikeys", expvar.Func(func() any { return store.Stats() }))
func (s *Store) Stats() Stats {
	var st Stats
	s.counts.fill(&st)
	cache := s.fence.Stats()
	st.Hits += cache.Hits
	st.Misses, st.Cached, st.Live = cache.Misses, cache.Cached, cache.Bound
	st.Evicted = cache.Evicted
	st.Processes, st.Fresh = 1, s.Fresh()
	if s.processes != nil {
		c := s.processes.cluster.Stats()
		st.Processes, st.FeedLag = c.Processes, c.FeedLag
		st.LostTouch, st.Removed = c.Closings, c.Evictions
		st.Freshness = s.processes.cluster.Freshness()
		st.Ended[reasons[reasonOf(errStale)].word] += 0 // the word can occur
	}
	b := &s.background
	b.mu.Lock()
	defer b.mu.Unlock()
	st.Outdated, st.OutdatedSchemes = -1, maps.Clone(b.outdated)
	if b.outdated != nil {
		st.Outdated = 0
	}
	for _, n := range b.outdated {
		st.Outdated += n
	}
	return st
}

// Err returns why the store has stopped, or nil while the store serves. After Close, the error is
// ErrClosed. After a failure of the storage that only a new Open can end, the error wraps
// ErrUnavailable and says what failed. The error never changes back to nil.
//
// Temporary trouble does not stop a store: a full disk, or lost contact with the other processes of
// the store, see Fresh. Err is cheap and does not use the storage, so Err suits a health check. Err
// reports a failure once a call, or the background work of each minute, has met the failure.
func (s *Store) Err() error { return s.serving() }

// Fresh reports whether this process may admit callers. Fresh is false while this process is out of
// contact with the other processes of the store: Verify and Bind then return ErrUnavailable. The
// process joins again without help, and Fresh is true again. See Options.Freshness. If the backend
// is not a backend.Feeder, Fresh is true until Close. After Close, Fresh is false.
//
// Fresh is cheap and does not use the storage, so Fresh suits a check whether to send calls to this
// process. For a check whether to restart the process, use Err: a restart does not bring the other
// processes, or the storage, into reach.
func (s *Store) Fresh() bool { return s.down.Load() != &ErrClosed && s.isFresh() }

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
	down := wrapErr("serve", err)
	if s.down.CompareAndSwap(nil, &down) {
		s.stopServing()
		s.log.Error("API key store failed; reopen it", "error", err)
	}
}

var errSlow = fmt.Errorf("%w: storage did not answer in time", ErrUnavailable)

// limited returns a context with the timeout for a call that waits for the backend.
func (s *Store) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.timeout <= 0 {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, s.timeout, errSlow)
}

// limitedWrite is limited for a write to a store of several processes, which has a timeout even if
// Options.Timeout is negative. The network may have lost the answer, and the readers of events in
// all processes wait for the outcome.
func (s *Store) limitedWrite(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.timeout <= 0 {
		return context.WithTimeoutCause(ctx, defaultTimeout, errSlow)
	}
	return s.limited(ctx)
}

// limitedRead is limited for a read.
func (s *Store) limitedRead(ctx context.Context) (context.Context, context.CancelFunc) {
	if s.readsUninterruptible {
		return ctx, func() {}
	}
	return s.limited(ctx)
}

// limitedMiss is limitedRead for Verify and Bind. limitedMiss returns a context that ends earlier
// anyway as it is, such as that of a gRPC call with a deadline: a timer takes a microsecond.
func (s *Store) limitedMiss(ctx context.Context) (context.Context, context.CancelFunc) {
	limit := s.limitedRead
	if s.reads != nil {
		limit = s.limitedWrite // a read must not keep its place among the reads for good
	}
	timeout := s.timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	if end, ok := ctx.Deadline(); ok && time.Until(end) <= timeout {
		return ctx, func() {}
	}
	return limit(ctx)
}

// endOf returns nil while ctx has not ended, ErrUnavailable if the timeout of the store has ended
// ctx, and otherwise the error of ctx. endOf does not return a cause from the caller, because the
// cause may be a denial of another key.
func endOf(ctx context.Context) error {
	if cause := context.Cause(ctx); errors.Is(cause, errSlow) {
		return cause
	}
	return ctx.Err()
}

// scanError converts the error of a Scan into the error for the caller of the list.
func (s *Store) scanError(ctx context.Context, doing string, err error) error {
	if ended := endOf(ctx); ended != nil {
		return ended
	}
	s.noteFailure(err)
	return wrapErr(doing, err)
}

// get reads and decodes one record. The context may have the timeout of limited. The errors are
// errors of this package, or the error of the context if the caller has ended the context.
func (s *Store) get(ctx context.Context, id token.ID) (*keyRecord, error) {
	e, err := s.backend.Get(ctx, storageKey(id))
	return s.decode(ctx, e, err)
}

// decode is get after the read has returned e and err.
func (s *Store) decode(ctx context.Context, e backend.Entry, err error) (*keyRecord, error) {
	// Most backends return ErrNotFound itself. The comparison without errors.Is keeps a flood of
	// unknown keys cheap.
	if err == backend.ErrNotFound {
		return nil, errNoKey
	}
	if err != nil {
		if ended := endOf(ctx); ended != nil {
			return nil, ended
		}
		s.noteFailure(err)
		return nil, wrapErr("read", err)
	}
	kr, err := parseKeyRecord(e)
	if err == nil && kr.purged() {
		return nil, errNoKey
	}
	return kr, err
}

var errNoKey = wrapErr("read", ErrNotFound)

// ready returns nil if a change can start. Otherwise ready returns the reason.
func (s *Store) ready(ctx context.Context) error {
	if err := s.serving(); err != nil {
		return err
	}
	return ctx.Err()
}
