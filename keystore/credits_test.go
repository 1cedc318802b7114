package keystore

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// creditsTest runs a test in a bubble, with a store in memory.
func creditsTest(t *testing.T, test func(t *testing.T, s *Store)) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(backendtest.NewMemory(), nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		test(t, s)
	})
}

func withCredits(t *testing.T, s *Store, c *Credits) *Issued {
	t.Helper()
	issued, err := s.Create(t.Context(), Spec{Name: "test", Credits: c})
	require.NoError(t, err)
	return issued
}

// remaining returns what Store.Credits says of a key.
func remaining(t *testing.T, s *Store, i *Issued) int64 {
	t.Helper()
	c, err := s.Credits(t.Context(), i.Key.ID)
	require.NoError(t, err)
	return c.Remaining
}

// admitted verifies until the store refuses, and returns how many calls were admitted.
func admitted(t *testing.T, s *Store, i *Issued) (n int) {
	t.Helper()
	for {
		_, err := s.Verify(t.Context(), i.Secret.Reveal())
		if err != nil {
			require.ErrorAs(t, err, new(*CreditsError))
			require.NotErrorIs(t, err, ErrDenied)
			return n
		}
		n++
	}
}

func TestCredits(t *testing.T) {
	creditsTest(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		i := withCredits(t, s, &Credits{Remaining: 100})
		require.Equal(t, 100, admitted(t, s, i))
		_, err := s.Verify(ctx, i.Secret.Reveal())
		require.Equal(t, &CreditsError{}, err)
		require.Equal(t, "credits_exhausted", Reason(err))
		st := s.Stats()
		require.EqualValues(t, 2, st.Refusals["credits_exhausted"])
		require.EqualValues(t, 2, st.Exhausted)
		require.Less(t, st.Leases, uint64(40), "a lease has more than one credit")
		key, err := s.Get(ctx, i.Key.ID)
		require.NoError(t, err)
		require.Equal(t, StatusActive, key.Status())
		require.True(t, key.Metered())

		// Inspect says the same, and takes nothing.
		in, err := s.Inspect(ctx, i.Secret.Reveal())
		require.NoError(t, err)
		require.Equal(t, &CreditsError{}, in.Refusal)

		c, err := s.AddCredits(ctx, i.Key.ID, 5)
		require.NoError(t, err)
		require.Equal(t, &Credits{Remaining: 5}, c)
		in, err = s.Inspect(ctx, i.Secret.Reveal())
		require.NoError(t, err)
		require.NoError(t, in.Refusal)
		require.Equal(t, 5, admitted(t, s, i))

		require.NoError(t, s.SetCredits(ctx, i.Key.ID, nil))
		for range 300 {
			key, err := s.Verify(ctx, i.Secret.Reveal())
			require.NoError(t, err)
			require.False(t, key.Metered())
		}
		c, err = s.Credits(ctx, i.Key.ID)
		require.NoError(t, err)
		require.Nil(t, c)
		_, err = s.AddCredits(ctx, i.Key.ID, 5)
		require.ErrorIs(t, err, ErrInvalid)

		require.NoError(t, s.SetCredits(ctx, i.Key.ID, &Credits{})) // 0 is 0, and not unlimited
		require.Zero(t, admitted(t, s, i))

		var events []Event
		for e, err := range s.Events(WithActor(ctx, "x"), EventQuery{KeyID: i.Key.ID}) {
			require.NoError(t, err)
			events = append(events, e)
		}
		require.Len(t, events, 4)
		require.Equal(t, &Credits{Remaining: 100}, events[0].Credits)
		for _, e := range events[1:] {
			require.Equal(t, ActionCredits, e.Action)
		}
		require.Equal(t, &Credits{}, events[1].CreditsBefore)
		require.Equal(t, &Credits{Remaining: 5}, events[1].Credits)
		require.Equal(t, &Credits{}, events[2].CreditsBefore)
		require.Nil(t, events[2].Credits)
		require.Nil(t, events[3].CreditsBefore)
		require.Equal(t, &Credits{}, events[3].Credits)
		require.NoError(t, s.CheckIntegrity(ctx))
	})
}

func TestCostsInCredits(t *testing.T) {
	creditsTest(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		i := withCredits(t, s, &Credits{Remaining: 100})
		text := i.Secret.Reveal()
		key, err := s.Verify(WithCost(ctx, 0), text)
		require.NoError(t, err)
		require.EqualValues(t, 100, remaining(t, s, i))
		require.NoError(t, key.Spend(ctx, 30))
		require.NoError(t, key.Spend(ctx, 0))
		require.EqualValues(t, 70, remaining(t, s, i))
		require.ErrorAs(t, key.Spend(ctx, 71), new(*CreditsError)) // all or none
		require.EqualValues(t, 70, remaining(t, s, i))
		require.ErrorIs(t, key.Spend(ctx, -1), ErrInvalid)
		_, err = s.Verify(WithCost(ctx, -1), text)
		require.ErrorIs(t, err, ErrInvalid)
		session, err := s.Bind(WithCost(ctx, 20), text)
		require.NoError(t, err)
		defer session.Close()
		require.NoError(t, session.Spend(ctx, 50))
		require.ErrorAs(t, session.Spend(ctx, 1), new(*CreditsError))
		_, err = s.Bind(ctx, text)
		require.ErrorAs(t, err, new(*CreditsError))

		// The session of a key with credits goes on with other credits, and with none.
		require.NoError(t, s.SetCredits(ctx, i.Key.ID, &Credits{Remaining: 7}))
		require.NoError(t, session.Cause())
		require.NoError(t, session.Spend(ctx, 7))
		require.ErrorAs(t, session.Spend(ctx, 1), new(*CreditsError))
		require.NoError(t, s.SetCredits(ctx, i.Key.ID, nil))
		require.NoError(t, session.Cause())
		require.NoError(t, session.Spend(ctx, 1000))

		// The session of a key without credits ends.
		other, err := s.Bind(ctx, text)
		require.NoError(t, err)
		defer other.Close()
		require.NoError(t, s.SetCredits(ctx, i.Key.ID, &Credits{Remaining: 7}))
		require.ErrorIs(t, other.Cause(), ErrNarrowed)
		require.ErrorIs(t, session.Cause(), ErrNarrowed) // its key had no credits for a while

		require.NoError(t, NewKey(Spec{}).Spend(ctx, 5))
	})
}

func TestWrongCredits(t *testing.T) {
	creditsTest(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		i := withCredits(t, s, nil)
		for _, c := range []Credits{
			{Remaining: -1},
			{Remaining: 1<<53 + 1},
			{Refill: Refill{Daily: true}},
			{Refill: Refill{Amount: -1, Daily: true}},
			{Refill: Refill{Amount: 1<<53 + 1, Daily: true}},
			{Refill: Refill{Amount: 1}},
			{Refill: Refill{Amount: 1, Daily: true, MonthDay: 1}},
			{Refill: Refill{Amount: 1, Every: time.Millisecond}},
			{Refill: Refill{Amount: 1, Every: 11 * 365 * 24 * time.Hour}},
			{Refill: Refill{Amount: 1, MonthDay: 32}},
			{Refill: Refill{Amount: 1, MonthDay: -1}},
		} {
			err := s.SetCredits(ctx, i.Key.ID, &c)
			require.ErrorIs(t, err, ErrInvalid, "%+v", c)
			_, err = s.Create(ctx, Spec{Name: "x", Credits: &c})
			require.ErrorIs(t, err, ErrInvalid, "%+v", c)
		}
		_, err := s.Update(ctx, i.Key.ID, func(spec *Spec) error {
			spec.Credits = &Credits{}
			return nil
		})
		require.ErrorIs(t, err, ErrInvalid)
		require.ErrorContains(t, err, "SetCredits")
		require.NoError(t, s.SetCredits(ctx, i.Key.ID, &Credits{Remaining: 1 << 53}))
		_, err = s.AddCredits(ctx, i.Key.ID, 1)
		require.ErrorIs(t, err, ErrInvalid)
		c, err := s.AddCredits(ctx, i.Key.ID, -(1 << 53))
		require.NoError(t, err)
		require.Zero(t, c.Remaining)
		c, err = s.AddCredits(ctx, i.Key.ID, -1)
		require.NoError(t, err)
		require.Zero(t, c.Remaining)

		id, _ := s.format.New()
		require.ErrorIs(t, s.SetCredits(ctx, id.String(), nil), ErrNotFound)
		_, err = s.Credits(ctx, id.String())
		require.ErrorIs(t, err, ErrNotFound)
		require.ErrorIs(t, s.SetCredits(IfRevision(ctx, 1), i.Key.ID, nil), ErrConflict)
		require.NoError(t, s.Revoke(ctx, i.Key.ID, ""))
		require.ErrorIs(t, s.SetCredits(ctx, i.Key.ID, nil), ErrKeyRevoked)
		_, err = s.AddCredits(ctx, i.Key.ID, 1)
		require.ErrorIs(t, err, ErrKeyRevoked)
	})
}

// Rotate, Disable and Enable keep the credits. Purge removes them.
func TestCreditsOverTheLifeOfAKey(t *testing.T) {
	creditsTest(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		i := withCredits(t, s, &Credits{Remaining: 50})
		_, err := s.Verify(ctx, i.Secret.Reveal())
		require.NoError(t, err)
		i, err = s.Rotate(ctx, i.Key.ID, 0)
		require.NoError(t, err)
		require.NoError(t, s.Disable(ctx, i.Key.ID, ""))
		_, err = s.Verify(ctx, i.Secret.Reveal())
		require.ErrorIs(t, err, ErrDisabled)
		require.NoError(t, s.Enable(ctx, i.Key.ID))
		_, err = s.Update(ctx, i.Key.ID, func(spec *Spec) error {
			spec.RateLimit = RateLimit{PerSecond: 1, Burst: 1}
			return nil
		})
		require.NoError(t, err)
		_, err = s.Verify(ctx, i.Secret.Reveal())
		require.NoError(t, err)
		_, err = s.Verify(ctx, i.Secret.Reveal())
		require.ErrorAs(t, err, new(*RateLimitError)) // costs no credit
		require.EqualValues(t, 48, remaining(t, s, i))
		require.NoError(t, s.Revoke(ctx, i.Key.ID, ""))
		time.Sleep(time.Minute)
		n, err := s.Purge(ctx, time.Now())
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Empty(t, read(t, s.backend, creditSpace))
		time.Sleep(5 * time.Minute) // what was leased is not written back
		require.Empty(t, read(t, s.backend, creditSpace))
		require.NoError(t, s.CheckIntegrity(ctx))
	})
}

func date(text string) time.Time {
	at, err := time.Parse("2006-01-02 15:04", text)
	if err != nil {
		panic(err)
	}
	return at
}

func TestRefills(t *testing.T) {
	daily, last, every := Refill{Amount: 9, Daily: true}, Refill{Amount: 9, MonthDay: 31},
		Refill{Amount: 9, Every: 36 * time.Hour}
	for _, tt := range []struct {
		refill          Refill
		last, now, want string // want "" is no refill
		next            string // after the refill
	}{
		{daily, "2026-11-30 13:00", "2026-11-30 23:59", "", "2026-12-01 00:00"},
		{daily, "2026-11-30 13:00", "2026-12-01 00:00", "2026-12-01 00:00", "2026-12-02 00:00"},
		{daily, "2026-11-30 00:00", "2026-11-30 00:00", "", "2026-12-01 00:00"},
		{daily, "2026-11-30 13:00", "2027-01-01 07:00", "2027-01-01 00:00", "2027-01-02 00:00"},
		{daily, "2026-12-01 00:00", "2026-11-30 23:00", "", "2026-12-02 00:00"}, // the clock went back
		{every, "2026-11-30 13:00", "2026-12-02 00:59", "", "2026-12-02 01:00"},
		{every, "2026-11-30 13:00", "2026-12-02 01:00", "2026-12-02 01:00", "2026-12-03 13:00"},
		{every, "2026-11-30 13:00", "2026-12-05 12:00", "2026-12-05 01:00", "2026-12-06 13:00"},
		{every, "2026-11-30 13:00", "2026-11-01 00:00", "", "2026-12-02 01:00"},
		{last, "2026-01-31 12:00", "2026-02-27 23:59", "", "2026-02-28 00:00"},
		{last, "2026-01-31 12:00", "2026-02-28 00:00", "2026-02-28 00:00", "2026-03-31 00:00"},
		{last, "2028-01-31 12:00", "2028-02-28 23:59", "", "2028-02-29 00:00"}, // a leap year
		{last, "2028-01-31 12:00", "2028-02-29 00:00", "2028-02-29 00:00", "2028-03-31 00:00"},
		{last, "2028-02-29 00:00", "2028-03-30 23:59", "", "2028-03-31 00:00"},
		{last, "2026-03-31 00:00", "2026-04-30 05:00", "2026-04-30 00:00", "2026-05-31 00:00"},
		{last, "2026-11-30 00:00", "2027-02-01 00:00", "2027-01-31 00:00", "2027-02-28 00:00"},
		{last, "2026-11-30 00:00", "2026-11-29 00:00", "", "2026-12-31 00:00"},
		{Refill{Amount: 9, MonthDay: 30}, "2100-01-30 00:00", "2100-02-28 00:00",
			"2100-02-28 00:00", "2100-03-30 00:00"}, // not a leap year
		{Refill{Amount: 9, MonthDay: 29}, "2028-01-29 00:00", "2028-03-01 00:00",
			"2028-02-29 00:00", "2028-03-29 00:00"},
		{Refill{Amount: 9, MonthDay: 29}, "2027-01-29 00:00", "2027-03-01 00:00",
			"2027-02-28 00:00", "2027-03-29 00:00"},
		{Refill{Amount: 9, MonthDay: 1}, "2026-12-15 08:00", "2027-01-01 00:00",
			"2027-01-01 00:00", "2027-02-01 00:00"},
		{Refill{Amount: 9, MonthDay: 1}, "2026-12-15 08:00", "2026-12-31 23:59", "",
			"2027-01-01 00:00"},
		{Refill{}, "2026-12-15 08:00", "2030-12-31 23:59", "", ""},
	} {
		b := &balance{Balance: &record.Balance{Remaining: 3, Refill: tt.refill.toRecord(),
			RefilledAt: date(tt.last).UnixNano()}}
		b.refill(date(tt.now))
		at, remains := tt.last, int64(3)
		if tt.want != "" {
			at, remains = tt.want, 9
		}
		require.Equal(t, date(at), fromNanos(b.RefilledAt), "%+v", tt)
		require.Equal(t, remains, b.Remaining, "%+v", tt)
		next := time.Time{}
		if tt.next != "" {
			next = date(tt.next)
		}
		require.Equal(t, next, fromNanos(b.next()), "%+v", tt)
	}
}

// A refill sets, and does not add: neither what remained, nor what was leased, nor several refills
// that were due.
func TestRefillsSet(t *testing.T) {
	creditsTest(t, func(t *testing.T, s *Store) {
		ctx := t.Context()
		i := withCredits(t, s, &Credits{Remaining: 1000, Refill: Refill{Amount: 100, Daily: true}})
		for range 300 {
			_, err := s.Verify(ctx, i.Secret.Reveal())
			require.NoError(t, err)
		}
		require.EqualValues(t, 700, remaining(t, s, i))
		day := time.Now().UTC().Truncate(24 * time.Hour).Add(24 * time.Hour)
		time.Sleep(time.Until(day) - time.Nanosecond)
		require.EqualValues(t, 700, remaining(t, s, i))
		_, err := s.Verify(ctx, i.Secret.Reveal())
		require.NoError(t, err)
		time.Sleep(time.Nanosecond)
		require.EqualValues(t, 100, remaining(t, s, i))
		require.Equal(t, 100, admitted(t, s, i))
		_, err = s.Verify(ctx, i.Secret.Reveal())
		require.Equal(t, &CreditsError{day.Add(24 * time.Hour)}, err)
		_, err = s.Verify(WithCost(ctx, 101), i.Secret.Reveal()) // no refill suffices
		require.Equal(t, &CreditsError{}, err)
		time.Sleep(5 * 24 * time.Hour)
		require.Equal(t, 100, admitted(t, s, i))
		_, err = s.AddCredits(ctx, i.Key.ID, 50)
		require.NoError(t, err)
		time.Sleep(24 * time.Hour)
		require.Equal(t, 100, admitted(t, s, i))
	})
}

// What a process has leased and does not need goes back: after an idle time, and at Close.
func TestLeasesAreGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		b := backendtest.NewMemory()
		s, err := New(open{b}, nil)
		require.NoError(t, err)
		i := withCredits(t, s, &Credits{Remaining: 10_000})
		id, err := parseID("", i.Key.ID)
		require.NoError(t, err)
		stored := func() int64 {
			e, err := b.Get(ctx, creditKey(id))
			require.NoError(t, err)
			stored, err := parseBalance(e)
			require.NoError(t, err)
			return stored.Remaining
		}
		spend := func(n int) {
			for range n {
				_, err := s.Verify(ctx, i.Secret.Reveal())
				require.NoError(t, err)
			}
		}
		spend(500)
		require.Less(t, stored(), int64(9500))
		require.EqualValues(t, 9500, remaining(t, s, i))
		time.Sleep(3 * time.Minute)
		require.EqualValues(t, 9500, stored())
		spend(500)
		require.EqualValues(t, 9000, remaining(t, s, i))
		require.Less(t, stored(), int64(9000))
		require.NoError(t, s.Close())
		require.EqualValues(t, 9000, stored())
		_, err = s.Credits(ctx, i.Key.ID)
		require.ErrorIs(t, err, ErrClosed)
	})
}

// Three processes with 64 goroutines each spend one balance: exactly the balance.
func TestProcessesShareCredits(t *testing.T) {
	const credits = 100_000
	shared := backendtest.NewShared()
	var stores []*Store
	for range 3 {
		s, err := New(shared.Open(), realTime())
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		stores = append(stores, s)
	}
	i := withCredits(t, stores[0], &Credits{Remaining: credits})
	var wg sync.WaitGroup
	var total atomic.Int64
	for _, s := range stores {
		for range 64 {
			wg.Go(func() {
				for {
					_, err := s.Verify(t.Context(), i.Secret.Reveal())
					if short := (*CreditsError)(nil); errors.As(err, &short) {
						return
					}
					if err != nil {
						t.Error(err)
						return
					}
					total.Add(1)
				}
			})
		}
	}
	wg.Wait()
	require.EqualValues(t, credits, total.Load())
	leases := uint64(0)
	for _, s := range stores {
		leases += s.Stats().Leases
	}
	t.Log(leases, "leases")
	require.Less(t, leases, uint64(2000))
}
