package keystore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The types of this file guard the application's code that the store calls: the Hasher, the
// Observer, the handler of the Logger, and a backend. A panic in the application's code does not
// end the process, and does not end a call of the store halfway. The guard recovers from the panic
// and logs the panic. Then the guard returns a result that makes the store fail closed.
//
// Callbacks that run on the goroutine of their caller are not guarded, because their panic belongs
// to the caller. These callbacks are the change of Update, Progress of RevokeAll, the loop bodies
// of List, Events and Follow, the writer of Backup and the reader of Restore. While such a callback
// runs, the store holds nothing, or releases everything with a defer.

// panics logs the panics that the guards recover from: the first few of each callback, and then at
// most one a second. Code that panics on each use of a key must not fill the disk with stacks.
type panics struct {
	log *slog.Logger

	mu    sync.Mutex // guards all below
	calls map[string]*panicCount
}

// A panicCount counts the panics of one callback.
type panicCount struct {
	logged, skipped int // skipped counts the panics since the last log line
	last            time.Time
}

const (
	firstPanics    = 4
	panicsInterval = time.Second
)

func newPanics(log *slog.Logger) *panics {
	return &panics{log: log, calls: make(map[string]*panicCount)}
}

// due reports whether to log a panic, and how many panics were not logged since the last log line.
func (p *panics) due(callback string) (due bool, skipped int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.calls[callback]
	if c == nil {
		c = new(panicCount)
		p.calls[callback] = c
	}
	now := time.Now()
	if c.logged >= firstPanics && now.Sub(c.last) < panicsInterval {
		c.skipped++
		return false, 0
	}
	skipped, c.skipped = c.skipped, 0
	c.logged++
	c.last = now
	return true, skipped
}

// recovered recovers from a panic. The caller must defer recovered directly. callback names the
// code that may panic.
func (p *panics) recovered(callback string) {
	if value := recover(); value != nil {
		p.report(callback, value)
	}
}

func (p *panics) report(callback string, value any) {
	if due, skipped := p.due(callback); due {
		p.log.Error("API key store recovered from a panic of the application's code",
			"callback", callback, "panic", describePanic(value), "stack", callers(),
			"panics not logged before", skipped)
	}
}

// describePanic returns the type of a panic's value. The value itself may hold a credential. So
// describePanic adds the text only of errors of the Go runtime.
func describePanic(value any) string {
	t := reflect.TypeOf(value)
	name := t.String()
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if err, ok := value.(runtime.Error); ok && t.PkgPath() == "runtime" {
		return name + ": " + err.Error()
	}
	return name
}

// callers returns the stack as functions and lines. Unlike debug.Stack, callers omits the arguments
// of the functions.
func callers() string {
	pcs := make([]uintptr, 64)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(3, pcs)])
	var b strings.Builder
	for {
		frame, more := frames.Next()
		fmt.Fprintf(&b, "%s\n\t%s:%d\n", frame.Function, frame.File, frame.Line)
		if !more {
			return b.String()
		}
	}
}

// A guardedHasher guards a Hasher. After a panic, Digest returns the zero Digest and Match returns
// failedMatch. The other Results of this package never come from the Hasher.
type guardedHasher struct {
	hasher hashing.Hasher
	panics *panics
}

// failedMatch is the Result of a Match that panicked, or that returned a Result which package
// hashing does not declare. The store treats failedMatch as a failure of the store.
const failedMatch = hashing.Result(0xff)

// errHasher is the error of a call whose Hasher gave no usable answer.
var errHasher = fmt.Errorf("%w: the Hasher panicked, or its answer is not usable", ErrUnavailable)

// guardHasher guards a Hasher. SHA256 needs no guard, because SHA256 cannot panic, and SHA256 is on
// the fast path of most stores.
func guardHasher(h hashing.Hasher, p *panics) hashing.Hasher {
	if h == hashing.SHA256() {
		return h
	}
	return &guardedHasher{h, p}
}

func (g *guardedHasher) Digest(token string) (d hashing.Digest) {
	defer g.panics.recovered("Hasher.Digest")
	return g.hasher.Digest(token)
}

func (g *guardedHasher) Match(d hashing.Digest, token string) (r hashing.Result) {
	r = failedMatch
	defer g.panics.recovered("Hasher.Match")
	switch result := g.hasher.Match(d, token); result {
	case hashing.Mismatch, hashing.Match, hashing.MatchOutdated:
		r = result
	}
	return r
}

// HasEarlier calls HasEarlier of a hashing.Keyring. For any other Hasher, the result is false.
func (g *guardedHasher) HasEarlier() bool {
	defer g.panics.recovered("Hasher.HasEarlier")
	keyring, ok := g.hasher.(interface{ HasEarlier() bool })
	return ok && keyring.HasEarlier()
}

// Schemes calls Schemes of a hashing.Keyring. For any other Hasher, the result is nil.
func (g *guardedHasher) Schemes() []string {
	defer g.panics.recovered("Hasher.Schemes")
	if keyring, ok := g.hasher.(interface{ Schemes() []string }); ok {
		return keyring.Schemes()
	}
	return nil
}

// SlowSchemes returns the slow schemes of a hashing.Keyring, or of the Hasher itself.
func (g *guardedHasher) SlowSchemes() []string {
	defer g.panics.recovered("Hasher.SlowSchemes")
	if keyring, ok := g.hasher.(interface{ SlowSchemes() []string }); ok {
		return keyring.SlowSchemes()
	}
	return nil
}

// Slow calls Slow of a Hasher. For any other Hasher, the result is false.
func (g *guardedHasher) Slow() bool {
	defer g.panics.recovered("Hasher.Slow")
	slow, ok := g.hasher.(interface{ Slow() bool })
	return ok && slow.Slow()
}

// Recognizes reports whether the Hasher can match a digest.
func (g *guardedHasher) Recognizes(d hashing.Digest) bool {
	defer g.panics.recovered("Hasher.Recognizes")
	if keyring, ok := g.hasher.(interface{ Recognizes(hashing.Digest) bool }); ok {
		return keyring.Recognizes(d)
	}
	own := g.hasher.Digest(sampleText)
	return d.Scheme == own.Scheme && len(d.Sum) == len(own.Sum)
}

// digest makes the digest of a token. The error means that the Hasher panicked, or that the digest
// cannot be stored.
func (s *Store) digest(text string) (hashing.Digest, error) {
	d := s.hasher.Digest(text)
	if d.Scheme == "" || len(d.Scheme) > maxScheme || len(d.Sum) == 0 || len(d.Sum) > maxSum {
		return hashing.Digest{}, errHasher
	}
	return d, nil
}

// maxScheme and maxSum are the largest name of a scheme and the largest sum of a digest, in bytes.
const (
	maxScheme = 255
	maxSum    = 1024
)

// A guardedObserver guards an Observer. If the Observer panics, the Observer misses this report.
type guardedObserver struct {
	observer Observer
	panics   *panics
}

func guardObserver(o Observer, p *panics) Observer {
	if o == nil {
		return nil
	}
	return &guardedObserver{o, p}
}

func (g *guardedObserver) Verified(v Verification) {
	defer g.panics.recovered("Observer.Verified")
	g.observer.Verified(v)
}

func (g *guardedObserver) Refused(r Refusal) {
	defer g.panics.recovered("Observer.Refused")
	g.observer.Refused(r)
}

func (g *guardedObserver) Changed(e Event) {
	defer g.panics.recovered("Observer.Changed")
	g.observer.Changed(e)
}

func (g *guardedObserver) Ended(e BindEnd) {
	defer g.panics.recovered("Observer.Ended")
	g.observer.Ended(e)
}

// A guardedHandler guards the handler of a Logger. After a panic, the log line is lost, because
// there is no other place to write to.
type guardedHandler struct{ slog.Handler }

func guardLogger(log *slog.Logger) *slog.Logger { return slog.New(guardedHandler{log.Handler()}) }

func (h guardedHandler) Enabled(ctx context.Context, level slog.Level) (enabled bool) {
	defer func() { _ = recover() }()
	return h.Handler.Enabled(ctx, level)
}

func (h guardedHandler) Handle(ctx context.Context, r slog.Record) (err error) {
	err = errPanicked
	defer func() { _ = recover() }()
	err = h.Handler.Handle(ctx, r)
	return err
}

func (h guardedHandler) WithAttrs(attrs []slog.Attr) (with slog.Handler) {
	with = h
	defer func() { _ = recover() }()
	with = guardedHandler{h.Handler.WithAttrs(attrs)}
	return with
}

func (h guardedHandler) WithGroup(name string) (with slog.Handler) {
	with = h
	defer func() { _ = recover() }()
	with = guardedHandler{h.Handler.WithGroup(name)}
	return with
}

var errPanicked = errors.New("it panicked")

// entries is the type that Scan and Snapshot return.
type entries = iter.Seq2[backend.Entry, error]

// A guardedBackend guards a backend of the application. A panic becomes an error, and callers
// receive ErrUnavailable. After a panic of Apply, the change may have happened.
type guardedBackend struct {
	backend.Backend
	panics *panics
}

func (g *guardedBackend) Get(ctx context.Context, key []byte) (e backend.Entry, err error) {
	err = errPanicked
	defer g.panics.recovered("Backend.Get")
	e, err = g.Backend.Get(ctx, key)
	return e, err
}

func (g *guardedBackend) Apply(ctx context.Context, changes ...backend.Change) (err error) {
	err = errPanicked
	defer g.panics.recovered("Backend.Apply")
	err = g.Backend.Apply(ctx, changes...)
	return err
}

func (g *guardedBackend) Scan(ctx context.Context, from, to []byte) entries {
	return guardSeq(g.panics, "Backend.Scan",
		func() entries { return g.Backend.Scan(ctx, from, to) })
}

func (g *guardedBackend) Snapshot(ctx context.Context, from, to []byte) entries {
	return guardSeq(g.panics, "Backend.Snapshot",
		func() entries { return g.Backend.Snapshot(ctx, from, to) })
}

// A guardedDownScanner guards the method of a backend.DownScanner.
type guardedDownScanner struct {
	down   backend.DownScanner
	panics *panics
}

func (g guardedDownScanner) ScanDown(ctx context.Context, from, to []byte) entries {
	return guardSeq(g.panics, "Backend.ScanDown",
		func() entries { return g.down.ScanDown(ctx, from, to) })
}

// batches is the type that Feed returns.
type batches = iter.Seq2[backend.Batch, error]

// A guardedFeed guards the method of a backend.Feeder.
type guardedFeed struct {
	feeder backend.Feeder
	panics *panics
}

func (g guardedFeed) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) batches {
	return guardSeq(g.panics, "Backend.Feed",
		func() batches { return g.feeder.Feed(ctx, from, to, after) })
}

// A guardedAllGetter guards the method of a backend.AllGetter.
type guardedAllGetter struct {
	all    backend.AllGetter
	panics *panics
}

func (g guardedAllGetter) GetAll(
	ctx context.Context, keys [][]byte,
) (all []backend.Entry, err error) {
	err = errPanicked
	defer g.panics.recovered("Backend.GetAll")
	all, err = g.all.GetAll(ctx, keys)
	if err == nil && len(all) != len(keys) {
		return nil, errWrongNumber
	}
	return all, err
}

var errWrongNumber = errors.New("GetAll has not returned one entry for each key")

// allGetterOf returns the backend as a backend.AllGetter, or nil. If the backend is guarded, the
// result is guarded too.
func allGetterOf(b backend.Backend) backend.AllGetter {
	if g, ok := b.(interface{ allGetter() backend.AllGetter }); ok {
		return g.allGetter()
	}
	all, _ := b.(backend.AllGetter)
	return all
}

func (g *guardedBackend) allGetter() backend.AllGetter {
	if all, ok := g.Backend.(backend.AllGetter); ok {
		return guardedAllGetter{all, g.panics}
	}
	return nil
}

// guardBackend guards a backend of the application. The result is a backend.DownScanner if the
// backend is one, and a backend.Feeder if the backend is one. For GetAll see allGetterOf.
func guardBackend(b backend.Backend, p *panics) backend.Backend {
	g := &guardedBackend{b, p}
	down, canScanDown := b.(backend.DownScanner)
	feeder, canFeed := b.(backend.Feeder)
	scanDown, feed := guardedDownScanner{down, p}, guardedFeed{feeder, p}
	switch {
	case canScanDown && canFeed:
		return struct {
			*guardedBackend
			guardedDownScanner
			guardedFeed
		}{g, scanDown, feed}
	case canScanDown:
		return struct {
			*guardedBackend
			guardedDownScanner
		}{g, scanDown}
	case canFeed:
		return struct {
			*guardedBackend
			guardedFeed
		}{g, feed}
	default:
		return g
	}
}

// guardSeq guards an iterator of a backend, and lets a panic of the loop body pass.
func guardSeq[V any](
	p *panics, callback string, open func() iter.Seq2[V, error],
) iter.Seq2[V, error] {
	return func(yield func(V, error) bool) {
		inBody, ended := false, false
		defer func() {
			if inBody {
				return
			}
			if value := recover(); value != nil {
				p.report(callback, value)
				if !ended {
					var zero V
					yield(zero, errPanicked)
				}
			}
		}()
		for v, err := range open() {
			inBody = true
			more := yield(v, err)
			inBody = false
			if !more {
				ended = true
				return
			}
		}
	}
}

// Check calls Check of a backend.Checker. Any other backend has nothing to check.
func (g *guardedBackend) Check(ctx context.Context) (err error) {
	c, ok := g.Backend.(backend.Checker)
	if !ok {
		return nil
	}
	err = errPanicked
	defer g.panics.recovered("Backend.Check")
	err = c.Check(ctx)
	return err
}
