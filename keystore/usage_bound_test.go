package keystore

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A store that has no space for the use of a key knows that it does not know of this use.
func TestAForgottenUseIsNotReportedAsNoUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(backendtest.NewMemory(), nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		s.usage.most = 2
		var keys []*Issued
		for range 3 {
			issued, err := s.Create(t.Context(), Spec{Name: "n"})
			require.NoError(t, err)
			keys = append(keys, issued)
		}
		time.Sleep(time.Hour)
		synctest.Wait() // the background has seen the new minute
		for _, k := range keys {
			_, err := s.Verify(t.Context(), k.Secret.Reveal())
			require.NoError(t, err)
		}
		forgotten, err := s.Get(t.Context(), keys[2].Key.ID)
		require.NoError(t, err)
		require.Zero(t, forgotten.LastUsedAt)
		time.Sleep(10 * time.Minute)
		synctest.Wait() // the background has seen the new minute
		unused := Query{UnusedSince: time.Now().Add(-30 * time.Minute)}
		for _, dry := range []bool{true, false} {
			n, err := s.RevokeAll(t.Context(), unused, "", &RevokeAllOptions{DryRun: dry})
			require.ErrorIs(t, err, ErrInvalid)
			require.Zero(t, n)
		}
		_, err = s.Verify(t.Context(), keys[2].Secret.Reveal())
		require.NoError(t, err)
		known, err := s.Get(t.Context(), keys[2].Key.ID)
		require.NoError(t, err)
		require.Equal(t, time.Now().Truncate(time.Minute).UTC(), known.LastUsedAt,
			"there is space again")
		n, err := s.RevokeAll(t.Context(), unused, "", nil)
		require.NoError(t, err, "no key would be selected")
		require.Zero(t, n)
	})
}

// What a flush cannot write counts for the bound, too.
func TestUsageIsBoundedWhileWritesFail(t *testing.T) {
	u := &usage{used: make(map[token.ID]int64), most: 100}
	var noted atomic.Uint32
	for i := range 200 {
		u.note(token.ID{byte(i)}, &noted)
		if i == 50 {
			u.used, u.writing = u.writing, u.used
			u.used = make(map[token.ID]int64)
		}
	}
	require.Equal(t, 100, len(u.used)+len(u.writing))
}

// The machine sleeps for ten minutes. A key whose use was noted before, written or not, may have
// been used after that.
func TestLastUsedWhenTheClockJumps(t *testing.T) {
	for _, written := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s, err := New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			issued, err := s.Create(t.Context(), Spec{Name: "n"})
			require.NoError(t, err)
			_, err = s.Verify(t.Context(), issued.Secret.Reveal())
			require.NoError(t, err)
			if written {
				require.NoError(t, s.flushUsage(context.Background()))
			}
			id, ok := token.ParseID(issued.Key.ID)
			require.True(t, ok)
			woke := time.Now().Add(10 * time.Minute)
			s.usage.advance(woke)
			require.Equal(t, minuteOf(woke), s.usage.pending(id))
		})
	}
}
