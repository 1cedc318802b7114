package keystore

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// slowMatches runs the matches of slow schemes. Systems that hash keys as if they were passwords
// spend 0.1 to 2 s of CPU on each match, and a caller who knows the public part of one token can
// ask for a match. The digest of a key is slow only until the first use of the key.
//
// The rules:
//
//  1. One match runs at a time. So matches of slow schemes use one core at most. At most
//     maxSlowWaits calls wait for their match, and no longer than Options.Timeout. The digests of a
//     slow present Hasher have no such limit: only Create, Rotate and Import, and the bearer of a
//     valid key with an outdated digest, make the Hasher work, see rehashLater.
//  2. The result of a match depends on the digest and the text alone, so results are remembered.
//     A burst of calls with one token, and a client that repeats a wrong token, cost one match.
//  3. A token whose key does not exist costs a match too, so that the time of the answer does not
//     reveal which keys exist, and the match follows the same rules.
//  4. After a wrong token for a key, the next second has no match of the key for the same address.
//  5. A call that waited for a match does not decide by the record from before the wait: the key
//     may have been revoked during the wait. The result is lateMatch, and the call reads the record
//     again. The second match has a remembered result, and does not wait.
//
// Calls that have no match for these reasons get ErrUnavailable, because nothing is known about
// their token.
type slowMatches struct {
	schemes []string
	running chan struct{} // has an element while a match runs
	waits   atomic.Int32

	mu sync.Mutex // guards all below
	// results has the results of matches, by a hash of the digest and the text.
	results *simplelru.LRU[[sha256.Size]byte, hashing.Result]
	// failed has when the last wrong token for a key came from an address.
	failed *simplelru.LRU[slowFailure, time.Time]
}

type slowFailure struct {
	id   token.ID
	addr netip.Addr
}

const (
	maxSlowWaits   = 16
	maxSlowResults = 1024
	slowPause      = time.Second
)

// busyMatch is the Result of a match that did not run: see failedMatch.
const busyMatch = hashing.Result(0xfe)

// lateMatch is the Result of a match that succeeded after a wait: see rule 5 of slowMatches.
const lateMatch = hashing.Result(0xfd)

// errLate is the error for lateMatch, for a call that has made a slow digest, see rehashLater, and
// for a call during whose wait for credits the record has changed, see decision. No caller of the
// store receives errLate.
var errLate = errors.New("the record may have changed in the meantime")

// errSlowMatches is the error for busyMatch.
var errSlowMatches = fmt.Errorf("%w: too many tokens are compared with slow digests of imported "+
	"keys", ErrUnavailable)

// busyError returns the error for a busyMatch.
func busyError(ctx context.Context) error {
	if ended := endOf(ctx); ended != nil {
		return ended
	}
	return errSlowMatches
}

// newSlowMatches returns nil if the Hasher has no slow scheme.
func newSlowMatches(h hashing.Hasher, current string) *slowMatches {
	var schemes []string
	if keyring, ok := h.(interface{ SlowSchemes() []string }); ok {
		schemes = keyring.SlowSchemes()
	}
	if slow, ok := h.(interface{ Slow() bool }); ok && slow.Slow() {
		schemes = append(schemes, current)
	}
	if len(schemes) == 0 {
		return nil
	}
	m := &slowMatches{schemes: schemes, running: make(chan struct{}, 1)}
	// The errors are about a size of 0.
	m.results, _ = simplelru.NewLRU[[sha256.Size]byte, hashing.Result](maxSlowResults, nil)
	m.failed, _ = simplelru.NewLRU[slowFailure, time.Time](maxSlowResults, nil)
	return m
}

// has reports whether a scheme is slow.
func (m *slowMatches) has(scheme string) bool {
	if m != nil {
		for _, slow := range m.schemes {
			if slow == scheme {
				return true
			}
		}
	}
	return false
}

// matchDigest compares a text with a digest of a key. The result is busyMatch if a slow match did
// not run, and lateMatch instead of Match and MatchOutdated if the call has waited.
func (s *Store) matchDigest(
	ctx context.Context, id token.ID, d hashing.Digest, text string,
) hashing.Result {
	m := s.slow
	if !m.has(d.Scheme) {
		return s.hasher.Match(d, text)
	}
	sum := sumOfMatch(d, text)
	from := slowFailure{id, clientaddr.FromContext(ctx)}
	if result, known := m.look(sum, from); known {
		return result
	}
	if m.waits.Add(1) > maxSlowWaits {
		m.waits.Add(-1)
		return busyMatch
	}
	defer m.waits.Add(-1)
	ctx, cancel := s.limited(ctx)
	defer cancel()
	select {
	case m.running <- struct{}{}:
		defer func() { <-m.running }()
	case <-ctx.Done():
		return busyMatch
	case <-s.serves.Done():
		return busyMatch
	}
	result, known := m.look(sum, from) // another call may have had the same match
	if !known {
		result = s.hasher.Match(d, text)
		m.note(sum, from, result)
	}
	if result == hashing.Match || result == hashing.MatchOutdated {
		return lateMatch
	}
	return result
}

// sumOfMatch returns a hash of a digest and a text.
func sumOfMatch(d hashing.Digest, text string) (sum [sha256.Size]byte) {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(d.Scheme)))
	b = append(b, d.Scheme...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(d.Sum)))
	b = append(append(b, d.Sum...), text...)
	defer clear(b)
	return sha256.Sum256(b)
}

// look returns the result of a match without a match, if the result is known or must wait.
func (m *slowMatches) look(sum [sha256.Size]byte, from slowFailure) (hashing.Result, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if result, ok := m.results.Get(sum); ok {
		return result, true
	}
	at, ok := m.failed.Get(from)
	return busyMatch, ok && time.Since(at) < slowPause
}

// note remembers the result of a match. A caller without an address has no pause: one caller could
// lock out the others.
func (m *slowMatches) note(sum [sha256.Size]byte, from slowFailure, result hashing.Result) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch result {
	case hashing.Match, hashing.MatchOutdated:
		m.results.Add(sum, result)
	case hashing.Mismatch:
		m.results.Add(sum, result)
		if from.addr.IsValid() {
			m.failed.Add(from, time.Now())
		}
	}
}
