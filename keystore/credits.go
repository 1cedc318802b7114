package keystore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/credit"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Credits limit how often a key may be used altogether: in all processes, and whatever restarts or
// crashes. Each call of Verify or Bind takes a credit, or as many as WithCost says. A nil *Credits
// is a key whose use is not limited. Credits with a Remaining of 0 admit no use.
//
// A RateLimit limits how fast a key may be used, costs no write, and is separate in each process.
// A key may have both.
type Credits struct {
	// Remaining is how many credits are left: from 0 to 1<<53.
	Remaining int64
	// Refill says when Remaining is set to another number. The zero Refill means never.
	Refill Refill `json:",omitzero"`
}

// A Refill sets the remaining credits of a key to Amount from time to time. What remains then is
// not added. Set exactly one of Every, Daily and MonthDay. Between two refills, at most Amount
// credits are spent, however many refills were due while the key was not used.
type Refill struct {
	// Amount is from 1 to 1<<53. 0 means that there is no refill: the other fields must then be
	// zero too.
	Amount int64
	// Every is the time between two refills, counted from the moment at which the credits were set:
	// from one second to ten years.
	Every time.Duration `json:",omitzero"`
	// Daily refills at 00:00 UTC of each day.
	Daily bool `json:",omitzero"`
	// MonthDay refills at 00:00 UTC of this day of each month, from 1 to 31. In a month that is
	// shorter, the refill is on the last day of the month.
	MonthDay int `json:",omitzero"`
}

const (
	maxCredits = int64(1) << 53 // every JSON number up to here is exact
	minEvery   = time.Second
	maxEvery   = 10 * 365 * 24 * time.Hour
)

// check returns an error if the credits are not usable. what names the argument.
func (c *Credits) check(what string) error {
	if c == nil {
		return nil
	}
	r := c.Refill
	ways := 0
	for _, set := range []bool{r.Every != 0, r.Daily, r.MonthDay != 0} {
		if set {
			ways++
		}
	}
	switch {
	case c.Remaining < 0 || c.Remaining > maxCredits:
		return invalid("%s.Remaining is %d: it must be from 0 to %d", what, c.Remaining, maxCredits)
	case r == Refill{}:
		return nil
	case r.Amount < 1 || r.Amount > maxCredits:
		return invalid("%s.Refill.Amount is %d: it must be from 1 to %d", what, r.Amount, maxCredits)
	case ways != 1:
		return invalid("%s.Refill must say when: set exactly one of Every, Daily and MonthDay", what)
	case r.Every != 0 && (r.Every < minEvery || r.Every > maxEvery):
		return invalid("%s.Refill.Every is %v: it must be from %v to %v", what, r.Every, minEvery,
			maxEvery)
	case r.MonthDay < 0 || r.MonthDay > 31:
		return invalid("%s.Refill.MonthDay is %d: it must be from 1 to 31", what, r.MonthDay)
	}
	return nil
}

// A CreditsError means that the key is valid, but has too few credits for the call. CreditsError
// does not wrap ErrDenied, because nothing is wrong with the key. The key stays.
type CreditsError struct {
	// RefillAt is when the next refill makes the call possible. Zero means that no refill will, so
	// that the call is refused until SetCredits or AddCredits.
	RefillAt time.Time
}

func (e *CreditsError) Error() string {
	if e.RefillAt.IsZero() {
		return "the API key has no credits left"
	}
	return fmt.Sprintf("the API key has no credits left until %s", e.RefillAt.Format(time.RFC3339))
}

// WithCost returns a context under which Verify and Bind take so many credits. Without WithCost,
// they take one. With a cost of 0, the call is free: a caller of Verify may then take the credits
// later, with Spend. With a negative cost, Verify and Bind return ErrInvalid for a key with
// credits.
func WithCost(ctx context.Context, credits int64) context.Context {
	return context.WithValue(ctx, credit.Key{}, credits)
}

// costOf returns how many credits a call of Verify or Bind takes. paid means that the call takes
// nothing, neither credits nor a use of the RateLimit.
func costOf(ctx context.Context) (cost int64, paid bool) {
	switch cost := ctx.Value(credit.Key{}).(type) {
	case int64:
		return cost, false
	case credit.Paid:
		return 0, true
	}
	return 1, false
}

// Metered reports whether the key has credits, so that its use is counted. Store.Credits returns
// the credits. A key from NewKey or from JSON is not metered.
func (k *Key) Metered() bool {
	q := k.granted().quota
	return q != nil && q.since != 0
}

// Spend takes credits from the key, for example for a call that turned out to be dear. Spend takes
// all of them or none. If the key has too few, the error is a *CreditsError. If the store cannot
// tell how many the key has, the error is ErrUnavailable, ErrCorrupt or ErrClosed, or the error of
// a ctx that has ended: then no credits of the call are taken. Spend may wait for the storage. Once
// Revoke or Disable of the key has returned, the error is ErrRevoked or ErrDisabled. ErrInvalid
// means that credits is negative.
//
// If the key did not come from Verify or Bind, or is not metered, Spend always returns nil.
func (k *Key) Spend(ctx context.Context, credits int64) error {
	return k.granted().spend(ctx, credits, decision{})
}

// SetCredits sets the credits of a key, and returns when the change is in force in every process.
// From then on, at most credits.Remaining are spent until the next refill: credits that a process
// has leased before are void. With nil, the use of the key is not limited from then on.
//
// A key without credits that gets some is narrowed: its sessions end with ErrNarrowed. The sessions
// of a key that has credits already continue, with the new credits.
//
// ErrInvalid means that an argument cannot be used. ErrKeyRevoked means that the key is revoked.
// ErrNotFound means that there is no such key. ErrConflict means that the key does not have the
// revision of IfRevision. After each of these errors, nothing was done. With ErrNotEverywhere, the
// change was made. After any other error, the change may have been made: call SetCredits again. The
// second call sets the credits once more, so what was spent in between can be spent again.
func (s *Store) SetCredits(ctx context.Context, id string, credits *Credits) error {
	parsed, err := parseID("", id)
	if err != nil {
		return err
	}
	if err := credits.check("Credits"); err != nil {
		return err
	}
	_, err = s.changeCredits(ctx, parsed, "set credits", func(kr *keyRecord, b *balance) error {
		b.set(kr.record, kr.revision+1, credits)
		return nil
	})
	return err
}

// AddCredits adds n credits to the remaining credits of a key, and returns the credits afterwards,
// without those that processes have leased. The refill stays: at the next refill, what was added is
// gone too. A negative n takes credits away, but never more than remain. Credits that a process has
// leased stay leased: see Credits.
//
// The errors are the same as the errors of SetCredits. ErrInvalid also means that the key has no
// credits to add to, or would have more than 1<<53. After an error other than these and
// ErrNotEverywhere, the credits may have been added: call Credits before you add them again, or
// give the change a revision with IfRevision, so that a second call cannot add them twice.
func (s *Store) AddCredits(ctx context.Context, id string, n int64) (*Credits, error) {
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if n < -maxCredits || n > maxCredits {
		return nil, invalid("%d credits: at most %d can be added or taken away at once", n, maxCredits)
	}
	return s.changeCredits(ctx, parsed, "add credits", func(kr *keyRecord, b *balance) error {
		switch {
		case kr.record.CreditsRevision == 0:
			return invalid("the use of key %s is not limited, so there are no credits to add to: "+
				"call SetCredits", id)
		case b.CreditsRevision == 0: // missing or damaged
			return noBalance(parsed)
		}
		return b.add(kr.revision+1, n)
	})
}

// Credits returns the credits of a key, or nil if the use of the key is not limited. Remaining
// counts the credits that this process has leased and not spent. If several processes have the
// store open, Remaining lacks the credits that the other processes have leased and not spent: each
// at most an eighth of what remained at the time, or one credit.
//
// ErrNotFound means that there is no such key. ErrInvalid means that id is not an ID.
func (s *Store) Credits(ctx context.Context, id string) (*Credits, error) {
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	kr, err := s.get(ctx, parsed)
	if errors.Is(err, ErrNotFound) {
		err = noKey("read the credits of", parsed)
	}
	if err != nil || kr.record.CreditsRevision == 0 {
		return nil, err
	}
	b, err := s.readCredits(ctx, parsed)
	if err != nil {
		return nil, err
	}
	return b.credits(), nil
}

// readCredits reads the balance of a key that has credits. Remaining includes the credits that this
// process has leased and not spent.
func (s *Store) readCredits(ctx context.Context, id token.ID) (*balance, error) {
	for attempt := 0; ; attempt++ {
		own := s.accounts.find(id)
		before, busy := own.leases()
		b, err := s.readBalance(ctx, id)
		if err != nil {
			return nil, err
		}
		b.refill(time.Now())
		left := own.unspent(b)
		after, busyNow := own.leases()
		// If a lease came in between, Remaining would have its credits twice or not at all.
		if attempt == creditsAttempts || !busy && !busyNow && before == after {
			b.Remaining += left
			return b, nil
		}
	}
}

const creditsAttempts = 8

// peekCredits returns the error that the next use of a key would get from its credits, or nil as
// the refusal, and takes nothing.
func (s *Store) peekCredits(ctx context.Context, id token.ID) (refusal, err error) {
	b, err := s.readCredits(ctx, id)
	if err != nil || b.Unlimited || b.Remaining > 0 {
		return nil, err
	}
	return &CreditsError{RefillAt: fromNanos(b.next())}, nil
}

// changeCredits changes the balance of a key, together with its record and an event, and returns
// the credits after the change.
func (s *Store) changeCredits(
	ctx context.Context, id token.ID, doing string, edit func(*keyRecord, *balance) error,
) (*Credits, error) {
	var after *Credits
	event := &record.Event{Action: record.Action_ACTION_CREDITS}
	e, err := s.changeKey(ctx, id, event, ErrNarrowed, func(kr *keyRecord) (bool, error) {
		if err := refuseRevoked(doing, id.String(), kr.record); err != nil {
			return false, err
		}
		b, err := s.readBalanceToSet(ctx, id)
		if err != nil {
			return false, err
		}
		b.refill(time.Now())
		event.CreditsBefore, event.Credits = nil, nil
		if kr.record.CreditsRevision != 0 {
			event.CreditsBefore = b.credits().toRecord()
		}
		if err := edit(kr, b); err != nil {
			return false, err
		}
		if kr.balance, err = b.change(); err != nil {
			return false, err
		}
		after = b.credits()
		event.Credits = after.toRecord()
		return true, nil
	})
	if e == nil {
		return nil, err
	}
	return after, err
}
