package keystore

import (
	"context"
	"errors"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/credit"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// An account is what this process knows of the credits of a key that has some. To spend a credit
// without a write, the process leases many credits together: the process takes them from the
// balance, in one durable write, and spends them from memory.
//
// The invariants:
//
//  1. A credit is in the balance, or in one lease of one process, or spent. A lease comes into left
//     after the write that has taken the lease from the balance is durable. What is given back
//     leaves left before the write that adds it to the balance. So no credit is spent twice,
//     whatever crashes: a crash loses what the process has leased, and nothing else.
//  2. Callers take credits from left with CompareAndSwap, and without a lock. So two callers never
//     take the same credit. Everything else that changes left holds mu, and only adds a lease or
//     removes all that is left.
//  3. All credits in left were granted at the revision since and in the period since the refill at
//     period. If SetCredits or a refill begins another grant, left is emptied before the first
//     credit of the new grant comes into left. So at most the new grant is spent from then on.
//  4. SetCredits returns after each process has noted the new revision of the record: the feed
//     calls note, in the order of the changes, before the barrier is acknowledged. A lease that was
//     written before SetCredits, and arrives after note, has a lower revision and is dropped. A
//     lease cannot be written after SetCredits with the old balance: see balance. No call waits for
//     a process that has lost contact, and the feed of the process may leave SetCredits out. So
//     after a gap in the feed, all leases are held, with those that are on their way, until a look
//     at the balance that began after the gap has found the same grant.
//  5. At most one goroutine leases for an account, so that many callers who find nothing left cost
//     one write. The others wait for fetch.done, or for the end of their contexts. A caller is
//     refused only by an answer about the balance that was asked for after the caller began to
//     wait, or that is not older than shortTrust while the record has not changed.
//  6. No caller takes a credit once Revoke or Disable of its key has returned, however long the
//     caller has waited for a lease: note sets stopped and empties left before they return, in
//     every process, as in invariant 4. A process that has lost contact admits nothing, so a caller
//     asks ready again after the wait. An account may not have noted a change from before the
//     account was in accounts.all, or a change that the feed left out. So unsure is set until
//     a read of the record that began afterwards. While unsure is set, nothing comes into left, and
//     no caller takes a credit after a wait. The same holds for every change: Verify and Bind take
//     credits after a wait only if the account has the revision that they have decided by.
//     Otherwise they take nothing, and read the record again.
//  7. A closed account has nothing left, and nothing comes into left any more. The accounts hold no
//     closed account, unless the store is closed, and one account of a key.
type account struct {
	id token.ID

	left  atomic.Int64 // leased and not spent
	until atomic.Int64 // the time of the next refill, when the lease ends; 0: never

	mu       sync.Mutex // guards all below; not held during a call of the backend
	closed   bool
	revision uint64 // the newest known revision of the record
	since    uint64 // the revision at which the credits in left, or later credits, were set
	period   int64  // the time of the refill that the credits in left are from
	free     bool   // the use of the key is no longer limited
	stopped  error  // why the key admits no caller at the revision; nil: it may admit callers
	unsure   bool   // a change of the record may not have come to note
	held     int64  // leased like left, and not to be spent until installLocked
	gaps     uint64 // the number of calls of hold
	waiting  waiters
	fetch    *fetch // nil: no goroutine leases
	count    uint64 // the number of leases that came in

	// What the last look at the balance has found: so many credits remained, and the next refill.
	// Zero trusted means that a caller must look again.
	remaining int64
	next      int64 // 0: no refill
	amount    int64 // of the refill
	trusted   time.Time

	leasedAt time.Time // when the last lease came in; zero: never
	leased   int64     // what was left then
	idle     int64     // what was left at the last call of closeIdle; -1: not known
	reported time.Time // when trouble was logged last
}

// waiters are the callers that wait for credits: how many callers there are for each cost.
type waiters map[int64]int64

// sum returns the sum of the costs of the callers for whom most credits suffice, if the callers
// with low costs come first. Another caller counts nothing: otherwise a process would lease all
// that remains for a call that is refused.
func (w waiters) sum(most int64) (sum int64) {
	for _, cost := range slices.Sorted(maps.Keys(w)) {
		n := min(w[cost], (most-sum)/cost)
		sum += n * cost
		if n < w[cost] {
			break
		}
	}
	return sum
}

// A fetch is an attempt to lease.
type fetch struct {
	done chan struct{}
	err  error // why there was no answer about the balance; readable once done is closed
}

const (
	// shortTrust is how long a process refuses the calls of a key without credits before it looks at
	// the balance again: another process may have given back what it had leased.
	shortTrust = time.Second
	// leaseTime is for how long of use a process leases credits.
	leaseTime = 10 * time.Second
	// A lease takes at most this part of what remains, so that other processes find credits, and a
	// crash loses few. A lease is at most leaseGrowth times larger than the lease before.
	leasePart   = 8
	leaseGrowth = 16
)

// take takes n credits if so many are left.
func (a *account) take(n int64) bool {
	if end := a.until.Load(); end != 0 && time.Now().UnixNano() >= end {
		return false // the refill is due
	}
	for {
		left := a.left.Load()
		if left < n {
			return false
		}
		if a.left.CompareAndSwap(left, left-n) {
			return true
		}
	}
}

// A decision says why Verify or Bind may take credits. The zero decision is of a caller that has a
// Key already.
type decision struct {
	terms    *terms // the record that admits the bearer
	rotation uint32 // of the secret
}

// again returns nil if the decision is still right after a wait. revision is the present revision
// of the record. If the record has changed, again returns errLate.
func (d decision) again(ctx context.Context, revision uint64) error {
	switch {
	case d.terms == nil:
		return nil
	case d.terms.revision != revision:
		return errLate
	default:
		return d.terms.permits(ctx, d.rotation) // the key may have expired
	}
}

// spend takes n credits of the key. If spend returns an error, spend has taken nothing.
func (g *grants) spend(ctx context.Context, n int64, d decision) error {
	q := g.quota
	if n == 0 || q == nil || q.accounts == nil {
		return nil
	}
	if n < 0 {
		return invalid("the cost of a call is %d credits: it cannot be negative", n)
	}
	if err := q.accounts.ready(ctx); err != nil {
		return err
	}
	if q.account.Load().take(n) {
		return nil
	}
	return q.accounts.draw(ctx, q, n, d)
}

// The accounts are those of the keys with credits that were used lately. Callers reach the accounts
// through a Key, and a Key must not lead a dump to the Store, so the accounts have functions of the
// Store.
type accounts struct {
	ready func(context.Context) error // returns nil if this process may admit a caller
	draw  func(ctx context.Context, q *quota, n int64, d decision) error

	mu     sync.Mutex // guards all below
	closed bool
	all    map[token.ID]*account
}

func (s *Store) newAccounts() *accounts {
	return &accounts{
		ready: func(ctx context.Context) error {
			if s.isFresh() {
				return nil
			}
			return s.refuseStale(ctx)
		},
		draw: s.draw,
		all:  make(map[token.ID]*account),
	}
}

// of returns the account of a key whose record has a revision, and credits that were set at the
// revision since. stopped is that of terms.
func (as *accounts) of(id token.ID, revision, since uint64, stopped error) *account {
	as.mu.Lock()
	a, ok := as.all[id]
	if !ok {
		a = &account{id: id, idle: -1, closed: as.closed, unsure: true}
		if !as.closed {
			as.all[id] = a
		}
	}
	as.mu.Unlock()
	a.note(revision, since, stopped)
	return a
}

// find returns the account of a key, or nil.
func (as *accounts) find(id token.ID) *account {
	as.mu.Lock()
	defer as.mu.Unlock()
	return as.all[id]
}

// note notes the present state of a key.
func (as *accounts) note(e *cachedKey) {
	if a := as.find(e.ID); a != nil {
		a.noteKey(e)
	}
}

func (a *account) noteKey(e *cachedKey) {
	t := e.terms()
	a.note(t.revision, e.since(), t.stopped())
}

// note notes the record of the key. since is 0 if the use of the key is not limited.
func (a *account) note(revision, since uint64, stopped error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if revision <= a.revision || a.closed {
		return
	}
	a.revision, a.free, a.trusted = revision, since == 0, time.Time{}
	a.stopped = stopped
	if since > a.since {
		a.since, a.period, a.held = since, 0, 0
		a.left.Store(0)
	}
	if stopped != nil {
		a.held += a.left.Swap(0)
	}
}

// hold notes that a change of the record may not come to note: the feed has left out records, or one
// record of the key, the key is gone, or the outcome of a change is not known.
func (a *account) hold() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.closed {
		a.held += a.left.Swap(0)
		a.gaps++
		a.unsure = true
		a.trusted = time.Time{}
	}
}

// draw takes n credits of a key, and leases more if too few are left.
func (s *Store) draw(ctx context.Context, q *quota, n int64, d decision) error {
	if waits, ok := ctx.Value(credit.Waits{}).(func()); ok {
		waits()
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	for {
		a := q.account.Load()
		err := s.drawFrom(ctx, a, n, d)
		if _, short := err.(*CreditsError); short {
			s.counts.exhausted.Add(1)
		}
		if err != errAccountClosed {
			return err
		}
		if err := s.serving(); err != nil {
			return err
		}
		q.account.Store(s.accounts.of(a.id, q.revision, q.since, nil))
	}
}

var errAccountClosed = errors.New("the account is closed: take another")

// drawFrom takes n credits of an account. The context has the timeout of limited.
func (s *Store) drawFrom(ctx context.Context, a *account, n int64, d decision) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting == nil {
		a.waiting = make(waiters)
	}
	a.waiting[n]++
	defer func() {
		if a.waiting[n]--; a.waiting[n] == 0 {
			delete(a.waiting, n)
		}
	}()
	for asked := false; ; asked = true {
		switch {
		case a.closed:
			return errAccountClosed
		case asked && !s.isFresh():
			return s.refuseStale(ctx)
		case a.unsure && (asked || a.free || a.stopped != nil): // the record must be read first
		case a.stopped != nil:
			return a.stopped
		default:
			if asked {
				if err := d.again(ctx, a.revision); err != nil {
					return err
				}
			}
			if a.free || a.take(n) {
				return nil
			}
		}
		if err := a.shortLocked(n, time.Now()); err != nil {
			return err
		}
		f := a.fetch
		if f == nil {
			if f = s.beginFetchLocked(a, n); f == nil {
				return ErrClosed
			}
			asked = true
		}
		if err := a.waitLocked(ctx, f); err != nil {
			return err
		}
		if f.err != nil && asked {
			return f.err
		}
	}
}

// waitLocked waits for the end of a fetch. During the wait, mu is not held.
func (a *account) waitLocked(ctx context.Context, f *fetch) error {
	a.mu.Unlock()
	defer a.mu.Lock()
	select {
	case <-f.done:
		return nil
	case <-ctx.Done():
		return endOf(ctx)
	}
}

// shortLocked returns a *CreditsError if the process knows that the key has fewer than n credits.
func (a *account) shortLocked(n int64, now time.Time) error {
	age := now.Sub(a.trusted)
	due := a.next != 0 && now.UnixNano() >= a.next
	if a.trusted.IsZero() || age < 0 || age >= shortTrust || due || a.left.Load()+a.remaining >= n {
		return nil
	}
	short := new(CreditsError)
	if a.amount >= n {
		short.RefillAt = fromNanos(a.next)
	}
	return short
}

// A lease is what a fetch has found: the credits of the lease, and what the balance says.
type lease struct {
	size      int64
	since     uint64
	period    int64
	next      int64 // the time of the next refill; 0: never
	amount    int64 // of the refill
	remaining int64 // after the lease
	unlimited bool
}

// beginFetchLocked starts to lease credits, for a caller that wants n. If the store is closing,
// beginFetchLocked returns nil.
func (s *Store) beginFetchLocked(a *account, n int64) *fetch {
	if !s.enter() {
		return nil
	}
	f := &fetch{done: make(chan struct{})}
	a.fetch = f
	revision, gaps := a.revision, a.gaps
	go func() {
		defer s.writes.Done()
		l, made, err := editBalance(s, a.id, func(b *balance) (lease, bool) {
			return a.plan(b, n, time.Now())
		})
		if made {
			s.counts.leases.Add(1)
		}
		if s.isWrong(noRefillEnd) {
			l.next = 0
		}
		noted := err
		if err == nil {
			noted = s.noteUnsure(a)
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if noted == nil && gaps == a.gaps {
			a.unsure = false
		}
		if err == nil {
			a.installLocked(l, revision, gaps, time.Now())
		}
		if now := time.Now(); noted != nil && now.Sub(a.reported) >= reportAgain {
			a.reported = now // one line for each call would make the trouble worse
			s.log.Error("API key credits could not be leased", "id", a.id.String(), "error", noted)
		}
		a.fetch, f.err = nil, noted
		close(f.done)
	}()
	return f
}

// noteUnsure reads the record of an account that is unsure, and notes the record.
func (s *Store) noteUnsure(a *account) error {
	a.mu.Lock()
	unsure, revision := a.unsure, a.revision
	a.mu.Unlock()
	if !unsure {
		return nil
	}
	ctx, cancel := s.limitedWrite(context.Background())
	defer cancel()
	kr, err := s.get(ctx, a.id)
	switch {
	case errors.Is(err, ErrNotFound): // purged
		a.note(revision+1, 0, ErrRevoked)
	case err != nil:
		return err
	default:
		a.noteKey(kr.cached())
	}
	return nil
}

// reportAgain is how long trouble with the credits of a key is not logged again.
const reportAgain = 10 * time.Second

// plan takes a lease from a balance, for a caller that wants n, and for the others that wait. If
// the balance has too little for the caller, plan takes nothing.
func (a *account) plan(b *balance, n int64, now time.Time) (l lease, write bool) {
	if b.Unlimited {
		return lease{unlimited: true}, false
	}
	b.refill(now)
	a.mu.Lock()
	defer a.mu.Unlock()
	b.CreditsRevision = max(b.CreditsRevision, a.since)
	left := int64(0)
	if b.CreditsRevision == a.since && b.RefilledAt == a.period {
		left = a.left.Load() + a.held
	}
	if left+b.Remaining >= n {
		want := max(a.waiting.sum(left+b.Remaining)-left, a.sizeLocked(b.Remaining, now))
		l.size = max(0, min(want, b.Remaining))
	}
	b.Remaining -= l.size
	l.since, l.period, l.next = b.CreditsRevision, b.RefilledAt, b.next()
	l.amount, l.remaining = b.Refill.GetAmount(), b.Remaining
	return l, l.size > 0
}

// sizeLocked returns how many credits a lease has, unless callers wait for more: see leaseTime.
func (a *account) sizeLocked(remaining int64, now time.Time) int64 {
	if a.leasedAt.IsZero() {
		return 1
	}
	used := a.leased - a.left.Load()
	perSecond := float64(used) / max(now.Sub(a.leasedAt), time.Millisecond).Seconds()
	size := min(float64(remaining/leasePart), perSecond*leaseTime.Seconds(),
		float64(a.leased)*leaseGrowth)
	return max(1, int64(size))
}

// installLocked takes over what a fetch has found. revision and gaps are those of the account when
// the fetch began.
func (a *account) installLocked(l lease, revision, gaps uint64, now time.Time) {
	if revision == a.revision && gaps == a.gaps && !a.unsure {
		// The record has not changed since, so the answer is not older than the last SetCredits or
		// AddCredits that this process has noted.
		a.free, a.trusted = l.unlimited, now
		a.remaining, a.next, a.amount = l.remaining, l.next, l.amount
	}
	if l.unlimited || l.since < a.since {
		return // the credits were set again
	}
	if l.since != a.since || l.period != a.period {
		a.since, a.period, a.held = l.since, l.period, 0
		a.left.Store(0)
	}
	a.until.Store(l.next)
	a.held += l.size
	if l.size > 0 {
		a.leased, a.leasedAt = a.left.Load()+a.held, now
		a.count++
	}
	if gaps == a.gaps && !a.unsure && a.stopped == nil {
		a.left.Add(a.held)
		a.held = 0
	}
}

// leases returns how many leases came in, and whether one is under way. The account may be nil.
func (a *account) leases() (count uint64, busy bool) {
	if a == nil {
		return 0, false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.count, a.fetch != nil
}

// unspent returns how many credits of the grant of a balance are left. The account may be nil.
func (a *account) unspent(b *balance) int64 {
	if a == nil {
		return 0
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.since != b.CreditsRevision || a.period != b.RefilledAt {
		return 0
	}
	return max(0, a.left.Load()+a.held)
}

// closeLocked closes the account, and returns what was left.
func (a *account) closeLocked() (left int64) {
	a.closed = true
	left, a.held = a.held, 0
	return max(0, left+a.left.Swap(math.MinInt64/2))
}

// settle gives back what was leased for keys that were not used since the last call, and forgets
// their accounts.
func (s *Store) settle(ctx context.Context) {
	for _, a := range s.accounts.list() {
		if ctx.Err() != nil {
			return
		}
		left, idle := s.accounts.closeIdle(a)
		if !idle {
			continue
		}
		if err := s.giveBack(a, left); err != nil {
			s.log.Warn("API key store could not give back leased credits; they are lost",
				"id", a.id.String(), "credits", left, "error", err)
		}
	}
}

// closeIdle closes and forgets an account if nothing was spent since the last call, and returns
// what was left.
func (as *accounts) closeIdle(a *account) (left int64, idle bool) {
	as.mu.Lock()
	defer as.mu.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	before := a.idle
	a.idle = a.left.Load() + a.held
	if a.fetch != nil || len(a.waiting) > 0 || a.idle != before {
		return 0, false
	}
	delete(as.all, a.id)
	return a.closeLocked(), true
}

func (as *accounts) list() []*account {
	as.mu.Lock()
	defer as.mu.Unlock()
	return slices.Collect(maps.Values(as.all))
}

// giveBack adds what was left of a closed account to the balance, unless the credits were set again
// or refilled since the lease.
func (s *Store) giveBack(a *account, left int64) error {
	if left == 0 {
		return nil
	}
	_, _, err := editBalance(s, a.id, func(b *balance) (struct{}, bool) {
		b.refill(time.Now())
		same := !b.Unlimited && b.CreditsRevision == a.since && b.RefilledAt == a.period
		b.Remaining = min(maxCredits, b.Remaining+left) // AddCredits may have filled the balance
		return struct{}{}, same || s.isWrong(blindGiveBack)
	})
	return err
}

// closeAccounts gives back all that was leased and is left. The store is closing, so no fetch
// begins.
func (s *Store) closeAccounts() {
	s.accounts.mu.Lock()
	s.accounts.closed = true
	s.accounts.mu.Unlock()
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	turns := make(chan struct{}, closedTogether)
	for _, a := range s.accounts.list() {
		turns <- struct{}{}
		wg.Go(func() {
			defer func() { <-turns }()
			left := a.close()
			if failed.Load() != nil {
				return // every further attempt would wait for the storage as long
			}
			if err := s.giveBack(a, left); err != nil {
				failed.CompareAndSwap(nil, &err)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		s.log.Warn("API key store could not give back leased credits; some are lost", "error", *err)
	}
}

// closedTogether is how many accounts give back at the same time, so that the backend can commit
// the writes together.
const closedTogether = 32

// close waits for the end of a fetch, and closes the account. No further fetch begins.
func (a *account) close() (left int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.fetch != nil {
		f := a.fetch
		a.mu.Unlock()
		<-f.done
		a.mu.Lock()
	}
	return a.closeLocked()
}
