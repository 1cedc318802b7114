package keystore

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A balance is the stored credits of a key: those that no process has leased.
//
// The invariants:
//
//  1. Each write of a balance expects the revision that the writer has read. So no two writers take
//     the same credits, in one process or in several.
//  2. If the record of a key says that the key has credits, the key has a balance. SetCredits
//     writes both in one Apply. A balance without a record, or of a key whose use is no longer
//     limited, may be left over, and does no harm.
//  3. While a key exists, its balance is never deleted. Otherwise the revision of the entry would
//     begin again at 1, and a late write could meet the revision that it expects.
//  4. refilled_at never goes back, until the credits are set again. So a clock that is set back
//     does not refill twice.
type balance struct {
	*record.Balance
	id       token.ID
	revision uint64 // of the entry; 0: the backend has no entry
}

func creditKey(id token.ID) []byte {
	return append(append(make([]byte, 0, 1+len(id)), creditSpace), id[:]...)
}

// noBalance returns the error for a key with credits whose balance is lost.
func noBalance(id token.ID) error {
	return fmt.Errorf("keystore: %w: the balance of key %s is missing: call SetCredits", ErrCorrupt,
		id)
}

// readBalance reads the balance of a key. If the key has no balance, or the balance cannot be read,
// the error wraps ErrCorrupt, and the balance is empty, with the revision of the entry.
func (s *Store) readBalance(ctx context.Context, id token.ID) (*balance, error) {
	e, err := s.backend.Get(ctx, creditKey(id))
	if errors.Is(err, backend.ErrNotFound) {
		return &balance{new(record.Balance), id, 0}, noBalance(id)
	}
	if err != nil {
		return nil, s.scanError(ctx, "read credits", err)
	}
	return parseBalance(e)
}

// readBalanceToSet is readBalance for a change that sets all of the balance: the balance may be
// missing or lost, unless a later version has written the balance.
func (s *Store) readBalanceToSet(ctx context.Context, id token.ID) (*balance, error) {
	b, err := s.readBalance(ctx, id)
	if errors.Is(err, ErrCorrupt) && !errors.Is(err, record.ErrNewer) {
		err = nil
	}
	return b, err
}

// parseBalance decodes the entry of a balance. If the balance is damaged, parseBalance returns the
// error, and an empty balance with the ID and the revision.
func parseBalance(e backend.Entry) (*balance, error) {
	if len(e.Key) != 1+len(token.ID{}) || e.Key[0] != creditSpace {
		return nil, fmt.Errorf("%w: the storage key %x is not in the form of a balance", ErrCorrupt,
			e.Key)
	}
	id := token.ID(e.Key[1:])
	b, err := record.DecodeBalance(e.Value)
	if err == nil && !(&balance{Balance: b}).bounded() {
		err = errBalanceBounds
	}
	if err != nil {
		return &balance{new(record.Balance), id, e.Revision},
			fmt.Errorf("%w: the balance of key %s: %w", ErrCorrupt, id, err)
	}
	return &balance{b, id, e.Revision}, nil
}

var errBalanceBounds = errors.New("the credits, the refill, or the time of the last refill, are " +
	"out of bounds")

// bounded reports whether the balance keeps the bounds of SetCredits, and the store can represent
// the time of the next refill. Otherwise a call that takes credits could lease in a loop, because
// each lease would end before the call has taken a credit.
func (b *balance) bounded() bool {
	return b.credits().check("") == nil && b.RefilledAt <= math.MaxInt64-int64(maxEvery)
}

// change returns the change that writes the balance.
func (b *balance) change() (*backend.Change, error) {
	value, err := record.EncodeBalance(b.Balance)
	if err != nil {
		return nil, wrapErr("encode", err)
	}
	return &backend.Change{Key: creditKey(b.id), Value: value, Expect: b.revision}, nil
}

// set sets the credits of a key, or removes the credits if c is nil. set changes the record r too,
// which is to have the revision. The new revision makes all leases void.
func (b *balance) set(r *record.Record, revision uint64, c *Credits) {
	b.Balance = &record.Balance{
		CreditsRevision: revision, GrantedRevision: revision, RefilledAt: toNanos(time.Now()),
		Unlimited: c == nil,
	}
	r.CreditsRevision = 0
	if c != nil {
		r.CreditsRevision = revision
		b.Remaining, b.Refill = c.Remaining, c.Refill.toRecord()
	}
}

// grant sets the first credits of a new key. The Apply that writes the record writes the balance
// too. old is the revision of a balance that is left over, or 0. If c is nil, grant does nothing.
func (kr *keyRecord) grant(c *Credits, old uint64, event *record.Event) (err error) {
	if c == nil {
		return nil
	}
	b := &balance{id: kr.id, revision: old}
	b.set(kr.record, kr.revision, c)
	event.Credits = c.toRecord()
	kr.balance, err = b.change()
	return err
}

// add adds n credits, or takes -n away. The record of the key is to have the revision.
func (b *balance) add(revision uint64, n int64) error {
	if n > maxCredits-b.Remaining {
		return invalid("key %s has %d credits: with %d more it would have more than %d", b.id,
			b.Remaining, n, maxCredits)
	}
	b.Remaining = max(0, b.Remaining+n)
	b.GrantedRevision = revision
	return nil
}

// credits returns the credits, or nil if the use of the key is not limited.
func (b *balance) credits() *Credits {
	if b.Unlimited {
		return nil
	}
	return &Credits{Remaining: b.Remaining, Refill: refillOf(b.Refill)}
}

// refill makes the refill that is due now, if there is one.
func (b *balance) refill(now time.Time) {
	if at := b.due(now.UnixNano()); at > b.RefilledAt {
		b.Remaining, b.RefilledAt = b.Balance.Refill.Amount, at
	}
}

// due returns the time of the last refill at or before now. The result is 0 if no refill was due.
func (b *balance) due(now int64) int64 {
	r := b.Balance.Refill
	if r == nil || now <= b.RefilledAt {
		return 0
	}
	if r.Every > 0 {
		return now - (now-b.RefilledAt)%r.Every
	}
	at := fromNanos(now).Truncate(24 * time.Hour) // the zero Time was at midnight too
	if r.MonthDay > 0 {
		month := monthlyRefill(at, r.MonthDay, 0)
		if month.After(at) {
			month = monthlyRefill(at, r.MonthDay, -1)
		}
		at = month
	}
	return at.UnixNano()
}

// next returns the time of the next refill, or 0 if the balance is never refilled.
func (b *balance) next() int64 {
	r := b.Balance.Refill
	if r == nil {
		return 0
	}
	if r.Every > 0 {
		return b.RefilledAt + r.Every
	}
	last := time.Unix(0, b.RefilledAt).UTC()
	day := last.Truncate(24 * time.Hour)
	if r.Daily {
		return day.AddDate(0, 0, 1).UnixNano()
	}
	month := monthlyRefill(day, r.MonthDay, 0)
	if !month.After(last) {
		month = monthlyRefill(day, r.MonthDay, 1)
	}
	return month.UnixNano()
}

// monthlyRefill returns the time of the refill in the month of t, or in another month.
func monthlyRefill(t time.Time, day uint32, months int) time.Time {
	first := time.Date(t.Year(), t.Month()+time.Month(months), 1, 0, 0, 0, 0, time.UTC)
	last := first.AddDate(0, 1, -1)
	return first.AddDate(0, 0, min(int(day), last.Day())-1)
}

func (r Refill) toRecord() *record.Refill {
	if r == (Refill{}) {
		return nil
	}
	return &record.Refill{Amount: r.Amount, Every: int64(r.Every), Daily: r.Daily,
		MonthDay: uint32(r.MonthDay)}
}

func refillOf(r *record.Refill) Refill {
	if r == nil {
		return Refill{}
	}
	return Refill{Amount: r.Amount, Every: time.Duration(r.Every), Daily: r.Daily,
		MonthDay: int(r.MonthDay)}
}

func (c *Credits) toRecord() *record.Credits {
	if c == nil {
		return nil
	}
	return &record.Credits{Remaining: c.Remaining, Refill: c.Refill.toRecord()}
}

func creditsOf(c *record.Credits) *Credits {
	if c == nil {
		return nil
	}
	return &Credits{Remaining: c.Remaining, Refill: refillOf(c.Refill)}
}

// writtenNumbers is how many numbers of writes a balance keeps.
const writtenNumbers = 8

// editBalance changes the balance of a key by edit. edit may run several times, each time on a
// fresh balance, and reports whether the balance is to be written. made reports whether the write
// of the last edit, or of the edit with the result that editBalance returns, was made.
//
// The answer of a write may be lost. If editBalance then wrote again, the credits could be taken,
// or given back, twice. So each write has a random number, and the balance keeps the last numbers:
// a lost answer is found in the balance. If the numbers do not tell either, because others have
// written many times in between, editBalance returns the error of the write. Then the credits of
// one lease may be lost, but are never spent twice.
func editBalance[R any](
	s *Store, id token.ID, edit func(b *balance) (result R, write bool),
) (result R, made bool, err error) {
	var none R
	type lostWrite struct {
		result R
		expect uint64 // the revision that the write expects
		err    error
	}
	lost := make(map[uint64]lostWrite) // the writes whose answers are lost, by their numbers
	for failures := 0; ; {
		b, err := s.readBalanceAlone(id)
		if err != nil {
			failures++
			if len(lost) == 0 || failures > balanceAttempts || errors.Is(err, ErrCorrupt) {
				return none, false, err
			}
			time.Sleep(rand.N(maxPause))
			continue
		}
		for _, number := range b.Writes {
			if w, ok := lost[number]; ok && !s.isWrong(blindCredits) {
				return w.result, true, nil
			}
		}
		for _, w := range lost {
			if b.revision > w.expect+writtenNumbers { // the number may have been dropped
				return none, false, wrapErr("write credits", w.err)
			}
		}
		result, write := edit(b)
		if !write {
			return result, false, nil
		}
		number, err := s.writeBalance(b)
		switch {
		case err == nil:
			return result, true, nil
		case errors.Is(err, backend.ErrConflict):
			if s.processes != nil {
				time.Sleep(rand.N(maxPause / 8)) // so that each process has its turn
			}
		case outcomeUnknown(err) && failures < balanceAttempts &&
			!errors.Is(err, backend.ErrFailed) && !errors.Is(err, backend.ErrClosed):
			failures++
			lost[number] = lostWrite{result, b.revision, err}
			time.Sleep(rand.N(maxPause))
		default:
			return none, false, wrapErr("write credits", err)
		}
	}
}

// balanceAttempts is how often editBalance tries again after a failure of the backend.
const balanceAttempts = 4

// readBalanceAlone is readBalance for a goroutine that no call waits for without a timeout.
func (s *Store) readBalanceAlone(id token.ID) (*balance, error) {
	ctx, cancel := s.limitedWrite(context.Background())
	defer cancel()
	return s.readBalance(ctx, id)
}

// writeBalance writes a balance, and returns the number of the write. The error is an error of the
// backend.
func (s *Store) writeBalance(b *balance) (number uint64, err error) {
	number = rand.Uint64()
	if drop := len(b.Writes) + 1 - writtenNumbers; drop > 0 {
		b.Writes = slices.Delete(b.Writes, 0, drop)
	}
	b.Writes = append(b.Writes, number)
	change, err := b.change()
	if err != nil {
		return 0, err
	}
	ctx, cancel := s.limitedWrite(context.Background())
	defer cancel()
	err = s.backend.Apply(ctx, *change)
	for s.isWrong(blindBalance) && errors.Is(err, backend.ErrConflict) {
		e, _ := s.backend.Get(ctx, change.Key)
		change.Expect = e.Revision
		err = s.backend.Apply(ctx, *change)
	}
	s.counts.noteWrite(err)
	s.noteFailure(err)
	return number, err
}
