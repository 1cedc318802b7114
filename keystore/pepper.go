package keystore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A different pepper under the same id, such as the same pepper with a line break at the end, would
// make every key unknown without any error. So the store keeps a check value for each scheme that
// was current. The check value is the digest of a fixed text. Open refuses a Hasher that makes or
// matches a scheme, but does not match the check value of the scheme.
//
// The rules:
//
//  1. A check value is written when the store holds no key that needs the scheme, or when a use of
//     an older key has proved the Hasher. So a wrong pepper cannot have a check value while the
//     store holds keys of the right pepper.
//  2. A check value that the Hasher does not match is an error of Open while a key needs the
//     scheme. If no key needs the scheme, the check value is replaced, or removed if the scheme is
//     not current: the pepper of an empty store may change.
//  3. A scheme that the Hasher does not know is not checked. Digests of the scheme are refused when
//     used.
//  4. SHA256 has no pepper and no check value.
//
// A check value does not admit a caller: the fixed text does not have the form of a token.

// sampleText is the fixed text. sampleText does not have the form of a token.
const sampleText = "grpc-api-key: a check of the pepper"

// checkingPepper is the operation that errors name.
const checkingPepper = "check the pepper"

func parseCheck(e backend.Entry) (hashing.Digest, error) {
	if len(e.Key) < 2 || e.Key[0] != checkSpace || len(e.Value) == 0 {
		return hashing.Digest{}, fmt.Errorf("%w: the storage key %x is not a check value's",
			ErrCorrupt, e.Key)
	}
	return hashing.Digest{Scheme: string(e.Key[1:]), Sum: e.Value}, nil
}

// A proof records whether the check value of the current scheme still has to be written.
type proof struct {
	state atomic.Int32
	since time.Time // only the use of a key created before since is a proof
}

const (
	proofDone   = iota // the check value exists, or no check value is needed
	proofWanted        // the scheme has keys and no check value: wait until an older key is used
	proofFound         // an older key was used
)

// noteProof checks whether the use of key e proves the Hasher, and records the proof. result is the
// match of a token with the current digest of e. e was read from the store. An imported key is no
// proof, because its CreatedAt may be older than its digest.
func (s *Store) noteProof(e *cachedKey, result hashing.Result) {
	p := &s.proof
	if p.state.Load() == proofWanted && result == hashing.Match && !isImported(e.ID) &&
		e.terms().scheme == s.dummyDigest.Scheme && e.key.CreatedAt.Before(p.since) {
		p.state.Store(proofFound)
	}
}

// plainScheme is the scheme of hashing.SHA256.
const plainScheme = "sha256"

// knows reports whether the scheme has check values and the Hasher makes or matches its digests. A
// Hasher without a method Schemes lists no earlier schemes.
func (s *Store) knows(scheme string) bool {
	return scheme != plainScheme && len(scheme) <= maxScheme &&
		(scheme == s.dummyDigest.Scheme || slices.Contains(s.earlierSchemes(), scheme))
}

func (s *Store) earlierSchemes() []string {
	if keyring, ok := s.hasher.(interface{ Schemes() []string }); ok {
		return keyring.Schemes()
	}
	return nil
}

// matchesCheck reports whether the Hasher matches a check value.
func (s *Store) matchesCheck(d hashing.Digest) (bool, error) {
	switch s.hasher.Match(d, sampleText) {
	case hashing.Match, hashing.MatchOutdated:
		return true, nil
	case hashing.Mismatch:
		return false, nil
	default:
		return false, errHasher
	}
}

// checkHasher compares the Hasher with the check values, and writes the check value of the current
// scheme.
func (s *Store) checkHasher() error {
	schemes := append(s.earlierSchemes(), s.dummyDigest.Scheme)
	slices.Sort(schemes)
	for _, scheme := range slices.Compact(schemes) {
		if s.knows(scheme) {
			if err := s.checkScheme(scheme); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *Store) checkScheme(scheme string) error {
	current := scheme == s.dummyDigest.Scheme
	for range changeAttempts {
		e, err := s.readCheck(scheme)
		if err != nil {
			return err
		}
		found := e.Revision > 0
		if found {
			d, err := parseCheck(e)
			if err != nil {
				return wrapErr(checkingPepper, err)
			}
			if ok, err := s.matchesCheck(d); ok || err != nil {
				return err
			}
		} else if !current {
			return nil
		}
		needed, err := s.needs(context.Background(), scheme)
		// The keys of another process that has the store open need the check value of that process.
		needed = needed || found && s.processes != nil &&
			s.processes.cluster.Stats().Processes > 1
		switch {
		case err != nil:
			return err
		case needed && found:
			return anotherPepper("Options.Hasher", scheme)
		case needed:
			s.proof.since = time.Now()
			s.proof.state.Store(proofWanted)
			return nil
		case current:
			err = s.writeCheck(context.Background(), e.Revision)
		default:
			forget := backend.Change{Key: e.Key, Expect: e.Revision, Delete: true}
			err = s.applyCheck(context.Background(), forget)
		}
		if !errors.Is(err, backend.ErrConflict) {
			return err
		}
	}
	return wrapErr(checkingPepper,
		errors.New("too much contention on the check value of the Hasher"))
}

func anotherPepper(where, scheme string) error {
	return invalid("%s: the keys of scheme %q were made with another pepper, and every one of "+
		"them would be refused as unknown: use that pepper (is there a line break at the end of "+
		"its file?), or give the new pepper an id of its own and put the other into a "+
		"hashing.Keyring", where, scheme)
}

// readCheck returns the entry of a check value. If the backend has no check value for the scheme,
// the revision of the entry is 0.
func (s *Store) readCheck(scheme string) (backend.Entry, error) {
	ctx, cancel := s.limited(context.Background())
	defer cancel()
	e, err := s.backend.Get(ctx, checkKey(scheme))
	if errors.Is(err, backend.ErrNotFound) {
		return backend.Entry{Key: checkKey(scheme)}, nil
	}
	if err != nil {
		return backend.Entry{}, s.scanError(ctx, checkingPepper, err)
	}
	return e, nil
}

// needs reports whether the store has a key that may still admit callers and has a digest of the
// scheme. If the store has no such key, needs reads all keys.
func (s *Store) needs(ctx context.Context, scheme string) (bool, error) {
	for e, err := range s.backend.Scan(ctx, []byte{keySpace}, []byte{keySpace + 1}) {
		if err != nil {
			return false, s.scanError(ctx, checkingPepper, err)
		}
		if kr, err := parseKeyRecord(e); err == nil && kr.needs(scheme) {
			return true, nil
		}
	}
	return false, nil
}

// needs reports whether a token of the key may be matched with a digest of the scheme.
func (kr *keyRecord) needs(scheme string) bool {
	r := kr.record
	return r.RevokedAt == 0 && !kr.purged() &&
		(r.DigestScheme == scheme || r.Previous != nil && r.Previous.DigestScheme == scheme)
}

// writeCheck writes the check value of the current scheme, and replaces the entry at revision
// expect. If expect is 0, no earlier check value exists, and a full disk does not prevent Open: the
// next Open tries again.
func (s *Store) writeCheck(ctx context.Context, expect uint64) error {
	d, err := s.digest(sampleText)
	if err != nil {
		return err
	}
	if ok, err := s.matchesCheck(d); !ok || err != nil {
		return err // a Hasher that accepts only tokens has no check value
	}
	err = s.applyCheck(ctx, backend.Change{Key: checkKey(d.Scheme), Value: d.Sum, Expect: expect})
	if errors.Is(err, backend.ErrFull) && expect == 0 {
		s.log.Warn("API key store could not write the check value of its Hasher", "error", err)
		return nil
	}
	return err
}

// applyCheck writes changes of check values. applyCheck returns backend.ErrConflict unchanged.
func (s *Store) applyCheck(ctx context.Context, changes ...backend.Change) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	err := s.backend.Apply(ctx, changes...)
	if err != nil && !errors.Is(err, backend.ErrConflict) {
		return s.scanError(ctx, checkingPepper, err)
	}
	return err
}

// writeProved writes the check value after the use of an older key has proved the Hasher. The
// background calls writeProved every minute.
func (s *Store) writeProved(ctx context.Context) {
	if s.proof.state.Load() != proofFound {
		return
	}
	if err := s.writeCheck(ctx, 0); err != nil && !errors.Is(err, backend.ErrConflict) {
		s.log.Warn("API key store could not write the check value of its Hasher, and will "+
			"try again", "error", err)
		return
	}
	s.proof.state.Store(proofDone)
}
