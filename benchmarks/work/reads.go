package work

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The reads workload measures every Verify that is not a hit of the cache: a miss, and each kind of
// refusal. The reference for a miss is a bare read of the same entry. The reference for an unknown
// key is a bare read of a missing entry. Both references are measured twice: with
// internal/badgerdb, and with Badger itself and the same options. The stores are copies of one
// directory, because only one store can open a directory. The reference for a malformed key is to
// parse the key.
var readsWork = Workload{
	Name:  "reads",
	Title: "Misses and refusals",
	About: "One goroutine, and random keys from a store of 100,000 keys. A miss is a `Verify` " +
		"without a cache (`CacheSize: -1`). A bare read reads the same entry from a copy of the " +
		"same directory: with `internal/badgerdb`, the layer of the store over Badger, and with " +
		"a transaction of Badger itself, with the same options, that copies the value.",
	Goals: []Goal{
		{
			ID: "miss", Work: "Verify miss / a bare Badger read of the same record",
			Bound: atMost(2, Times),
		},
		{
			ID: "unknown", Work: "refusal of an unknown key / a bare Badger miss",
			Bound: atMost(2, Times),
		},
		{
			ID: "malformed", Work: "refusal of a malformed key / parsing the key",
			Bound: atMost(200, MoreThan),
		},
		{
			ID: "checksum", Work: "refusal of a bad checksum / parsing the key and computing the checksum",
			Bound: atMost(200, MoreThan),
		},
	},
}

func init() { readsWork.Run = runReads }

const (
	caseMiss          = "Verify, miss"
	caseLayerRead     = "bare read, internal/badgerdb"
	caseBareRead      = "bare read, Badger"
	caseUnknown       = "Verify, unknown key"
	caseLayerMiss     = "bare miss, internal/badgerdb"
	caseBareMiss      = "bare miss, Badger"
	caseWrong         = "Verify, wrong secret, cached key"
	caseRevoked       = "Verify, revoked key"
	caseMalformed     = "Verify, malformed"
	caseParse         = "parsing the malformed key"
	caseChecksum      = "Verify, bad checksum"
	caseParseChecksum = "parsing the key with a bad checksum, and computing the checksum"
)

// readStores contains stores that are open on copies of one directory.
type readStores struct {
	uncached, cached *keystore.Store
	layer            *badgerdb.DB
	bare             *badger.DB

	tokens, unknown     []string // of equal length
	known, none         [][]byte // the keys of their entries in internal/badgerdb
	revoked, wrong      string
	malformed, checksum string
}

func (r *readStores) Close() error {
	var errs []error
	if r.uncached != nil {
		errs = append(errs, r.uncached.Close())
	}
	if r.cached != nil {
		errs = append(errs, r.cached.Close())
	}
	if r.layer != nil {
		errs = append(errs, r.layer.Close())
	}
	if r.bare != nil {
		errs = append(errs, r.bare.Close())
	}
	return errors.Join(errs...)
}

func newReadStores(ctx context.Context, e *Env, keys int) (r *readStores, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	r = new(readStores)
	defer func() {
		if err != nil {
			err = errors.Join(err, r.Close())
			r = nil
		}
	}()
	path := func(name string) string { return filepath.Join(dir, name) }
	store, err := keystore.Open(path("uncached"), peers.Options(0))
	if err != nil {
		return r, err
	}
	r.tokens, err = peers.Create(ctx, store, keys, min(keys, hotKeys), e.progress("creating keys"))
	if err == nil {
		err = r.makeRefused(ctx, store)
	}
	if err = errors.Join(err, store.Close()); err != nil {
		return r, err
	}
	for _, name := range []string{"cached", "layer", "bare"} {
		if err := os.CopyFS(path(name), os.DirFS(path("uncached"))); err != nil {
			return r, err
		}
	}
	if r.uncached, err = keystore.Open(path("uncached"), peers.Options(-1)); err != nil {
		return r, err
	}
	if r.cached, err = keystore.Open(path("cached"), peers.Options(0)); err != nil {
		return r, err
	}
	if r.layer, err = badgerdb.Open(path("layer"), badgerdb.Options{}); err != nil {
		return r, err
	}
	r.bare, err = badger.OpenManaged(bareOptions(path("bare")))
	return r, err
}

// makeRefused makes what is to be refused.
func (r *readStores) makeRefused(ctx context.Context, store *keystore.Store) error {
	format, err := token.NewFormat("oil", 64, keystore.ASCII62)
	if err != nil {
		return err
	}
	for _, text := range r.tokens {
		id, _ := token.Parse(text)
		r.known = append(r.known, entryKey(id))
		id, other := format.New()
		r.unknown = append(r.unknown, other)
		r.none = append(r.none, entryKey(id))
	}
	issued, err := store.Create(ctx, peers.Spec())
	if err != nil {
		return err
	}
	r.revoked = issued.Secret.Reveal()
	if err := store.Revoke(ctx, issued.Key.ID, "to be refused"); err != nil {
		return err
	}
	id, _ := token.Parse(r.tokens[0])
	r.wrong = format.Renew(id)
	r.malformed = strings.ToUpper(r.tokens[0]) // no ID has upper case
	mistyped := []byte(r.unknown[0])
	if last := &mistyped[len(mistyped)-1]; *last == '0' {
		*last = '1'
	} else {
		*last = '0'
	}
	r.checksum = string(mistyped)
	return nil
}

// entryKey is what keystore calls the entry of a key.
func entryKey(id token.ID) []byte { return append([]byte{'k'}, id[:]...) }

// bareKey is what internal/badgerdb calls an entry.
func bareKey(key []byte) []byte { return append([]byte{'e'}, key...) }

// bareOptions are those of internal/badgerdb, as far as they bear on reads.
func bareOptions(dir string) badger.Options {
	return badger.DefaultOptions(dir).
		WithMemTableSize(8 << 20).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(8).
		WithNumCompactors(2).
		WithValueLogFileSize(1 << 20).
		WithValueThreshold(64 << 10).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		WithChecksumVerificationMode(options.NoVerification).
		WithMetricsEnabled(false).
		WithDetectConflicts(false).
		WithLogger(nil)
}

// bareGet reads an entry of internal/badgerdb with Badger itself, and copies the value.
func bareGet(db *badger.DB, at uint64, key []byte) error {
	txn := db.NewTransactionAt(at, false)
	defer txn.Discard()
	item, err := txn.Get(bareKey(key))
	if err == nil {
		_, err = item.ValueCopy(nil)
	}
	return err
}

func readCases(ctx context.Context, r *readStores) []measure.Case {
	// Each case has its own random source with the same seed, so that all cases use the same
	// sequence.
	each := func(name string, do func(i int) error) measure.Case {
		random := rand.New(rand.NewPCG(7, 8))
		return measure.Case{Name: name, Do: func(n int) error {
			for range n {
				if err := do(random.IntN(len(r.tokens))); err != nil {
					return err
				}
			}
			return nil
		}}
	}
	// refused returns nil if err is the wanted error.
	refused := func(err, want error) error {
		if err == want {
			return nil
		}
		return fmt.Errorf("the read must end with %v, but ended with: %v", want, err)
	}
	verify := func(s *keystore.Store, text string, want error) error {
		_, err := s.Verify(ctx, text)
		return refused(err, want)
	}
	at := r.bare.MaxVersion() // only once, because MaxVersion asks every table
	bare := func(key []byte, want error) error { return refused(bareGet(r.bare, at, key), want) }
	return []measure.Case{
		each(caseMiss, func(i int) error { return verify(r.uncached, r.tokens[i], nil) }),
		each(caseLayerRead, func(i int) error {
			_, err := r.layer.Get(ctx, r.known[i])
			return err
		}),
		each(caseBareRead, func(i int) error { return bare(r.known[i], nil) }),
		each(caseUnknown, func(i int) error {
			return verify(r.cached, r.unknown[i], keystore.ErrUnknown)
		}),
		each(caseLayerMiss, func(i int) error {
			_, err := r.layer.Get(ctx, r.none[i])
			return refused(err, keystore.ErrNotFound)
		}),
		each(caseBareMiss, func(i int) error { return bare(r.none[i], badger.ErrKeyNotFound) }),
		each(caseWrong, func(int) error { return verify(r.cached, r.wrong, keystore.ErrUnknown) }),
		each(caseRevoked, func(int) error { return verify(r.cached, r.revoked, keystore.ErrRevoked) }),
		each(caseMalformed, func(int) error {
			return verify(r.cached, r.malformed, keystore.ErrMalformed)
		}),
		each(caseParse, func(int) error {
			if _, ok := token.Parse(r.malformed); ok {
				return errors.New("the text is a valid token")
			}
			return nil
		}),
		each(caseChecksum, func(int) error {
			return verify(r.cached, r.checksum, keystore.ErrMalformed)
		}),
		each(caseParseChecksum, func(int) error {
			if _, ok := token.Parse(r.checksum); !ok || token.ChecksumOK(r.checksum) {
				return errors.New("the text is a valid token")
			}
			return nil
		}),
	}
}

func runReads(ctx context.Context, e *Env) (o *Outcome, err error) {
	r, err := newReadStores(ctx, e, e.size(100_000))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	// The case with a wrong secret needs its key in the cache.
	if _, err := r.cached.Verify(ctx, r.tokens[0]); err != nil {
		return nil, err
	}
	cases := readCases(ctx, r)
	timed, err := measure.AllTimed(cases, time.Millisecond)
	if err != nil {
		return nil, err
	}
	s, err := measure.Rounds(ctx, e.rounds(101), e.progress("missing and refusing"), timed...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	o.judge(&readsWork, "miss", measure.Ratios(s[caseMiss], s[caseBareRead]))
	o.judge(&readsWork, "unknown", measure.Ratios(s[caseUnknown], s[caseBareMiss]))
	o.judge(&readsWork, "malformed", measure.Differences(s[caseMalformed], s[caseParse]))
	o.judge(&readsWork, "checksum", measure.Differences(s[caseChecksum], s[caseParseChecksum]))
	o.figure("Verify miss / a read of internal/badgerdb", Times,
		measure.Ratios(s[caseMiss], s[caseLayerRead]))
	o.figure("refusal of an unknown key / a miss of internal/badgerdb", Times,
		measure.Ratios(s[caseUnknown], s[caseLayerMiss]))
	for _, c := range cases {
		o.figure(c.Name, Nanos, s[c.Name])
	}
	return o, nil
}
