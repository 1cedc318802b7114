package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// fill creates n keys, by many at once.
func fill(
	t testing.TB, s *keystore.Store, n int, spec func(i int) keystore.Spec,
) []*keystore.Issued {
	t.Helper()
	const writers = 64
	keys := make([]*keystore.Issued, n)
	var wg sync.WaitGroup
	errs := make([]error, writers)
	for w := range writers {
		wg.Go(func() {
			for i := w; i < n; i += writers {
				sp := spec(i)
				if sp.Name == "" {
					sp.Name = fmt.Sprint("key ", i)
				}
				if keys[i], errs[w] = s.Create(context.Background(), sp); errs[w] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	return keys
}

// admitted returns how many of the keys a store admits, and requires that the others are denied.
func admitted(t testing.TB, s *keystore.Store, keys []*keystore.Issued) (n int) {
	t.Helper()
	for _, k := range keys {
		_, err := s.Verify(context.Background(), k.Secret.Reveal())
		if err == nil {
			n++
			continue
		}
		require.ErrorIs(t, err, keystore.ErrRevoked)
	}
	return n
}

func TestRevokeAllRevokesTheSelectionAndNothingElse(t *testing.T) {
	for name, tt := range map[string]struct {
		spec  func(i int) keystore.Spec // of the even ones, which are selected, and the odd
		query keystore.Query
	}{
		"owner": {
			func(i int) keystore.Spec {
				return keystore.Spec{Owner: []string{"acme", "ajax"}[i%2]}
			},
			keystore.Query{Owner: "acme"},
		},
		"scope": {
			func(i int) keystore.Spec {
				return keystore.Spec{Scopes: [][]string{{"orders:*"}, {"stock:read"}}[i%2]}
			},
			keystore.Query{Scope: "orders:write"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, nil)
			keys := fill(t, s, 300, tt.spec)
			var in, out []*keystore.Issued
			for i, k := range keys {
				if i%2 == 0 {
					in = append(in, k)
				} else {
					out = append(out, k)
				}
			}
			require.Equal(t, 150, admitted(t, s, in)) // and cached

			var listed []string
			n, err := s.RevokeAll(t.Context(), tt.query, "", &keystore.RevokeAllOptions{
				DryRun: true,
				Progress: func(k *keystore.Key, done int) {
					listed = append(listed, k.ID)
					require.Len(t, listed, done)
				},
			})
			require.NoError(t, err)
			require.Equal(t, 150, n)
			require.Equal(t, 150, admitted(t, s, in), "a dry run has revoked something")

			var revoked []string
			n, err = s.RevokeAll(t.Context(), tt.query, "leaked", &keystore.RevokeAllOptions{
				Progress: func(k *keystore.Key, done int) {
					revoked = append(revoked, k.ID)
					require.Equal(t, "leaked", k.RevokeReason)
					require.Len(t, revoked, done)
				},
			})
			require.NoError(t, err)
			require.Equal(t, 150, n)
			require.Equal(t, listed, revoked)
			require.Zero(t, admitted(t, s, in))
			require.Equal(t, 150, admitted(t, s, out))

			n, err = s.RevokeAll(t.Context(), tt.query, "again", nil)
			require.NoError(t, err)
			require.Zero(t, n)
			key, err := s.Get(t.Context(), in[0].Key.ID)
			require.NoError(t, err)
			require.Equal(t, "leaked", key.RevokeReason)
		})
	}
}

// A Query that selects every key, as one whose Owner is a variable that was not set, needs a word
// that all are meant.
func TestRevokeAllOfEveryKeyNeedsAll(t *testing.T) {
	s := open(t, nil)
	keys := fill(t, s, 3,
		func(int) keystore.Spec { return keystore.Spec{Owner: "acme", Scopes: []string{"a"}} })
	live := bind(t, s, keys[0].Secret.Reveal())
	var owner string
	for _, dry := range []bool{true, false} {
		for _, q := range []keystore.Query{
			{Owner: owner}, {Owner: owner, Limit: 1}, {Owner: owner, Cursor: keys[0].Key.ID},
			{Limit: -1},
		} {
			n, err := s.RevokeAll(t.Context(), q, "", &keystore.RevokeAllOptions{DryRun: dry})
			require.ErrorIs(t, err, keystore.ErrInvalid, "%+v", q)
			require.ErrorContains(t, err, "RevokeAllOptions.All")
			require.Zero(t, n)
		}
		for _, q := range []keystore.Query{
			{Owner: "x"}, {Status: keystore.StatusActive}, {Scope: "a"},
			{CreatedBefore: time.Now()}, {UnusedSince: time.Now()},
		} {
			_, err := s.RevokeAll(t.Context(), q, "", &keystore.RevokeAllOptions{DryRun: dry,
				All: true})
			require.ErrorIs(t, err, keystore.ErrInvalid, "%+v", q)
		}
	}
	_, err := s.RevokeAll(t.Context(), keystore.Query{}, "", nil)
	require.ErrorIs(t, err, keystore.ErrInvalid)
	require.NoError(t, live.Err())
	require.Equal(t, 3, admitted(t, s, keys))
	all := &keystore.RevokeAllOptions{All: true}
	n, err := s.RevokeAll(t.Context(), keystore.Query{Limit: 2}, "", all)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	n, err = s.RevokeAll(t.Context(), keystore.Query{}, "", all)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Zero(t, admitted(t, s, keys))
	require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
}

// If the query selects more keys than the caller expects, none is revoked.
func TestRevokeAllAtMost(t *testing.T) {
	for name, q := range map[string]keystore.Query{
		"owner": {Owner: "acme"}, "scope": {Scope: "a"}, "all": {},
		"newest": {Owner: "acme", Newest: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, nil)
			keys := fill(t, s, 100, func(int) keystore.Spec {
				return keystore.Spec{Owner: "acme", Scopes: []string{"a"}}
			})
			for _, k := range keys[:10] {
				require.NoError(t, s.Revoke(t.Context(), k.Key.ID, ""))
			}
			calls := 0
			revoke := func(q keystore.Query, most int, dry bool) (int, error) {
				calls = 0
				return s.RevokeAll(t.Context(), q, "", &keystore.RevokeAllOptions{
					All: name == "all", AtMost: most, DryRun: dry,
					Progress: func(*keystore.Key, int) { calls++ }})
			}
			refused := &keystore.SelectionError{Selected: 90, AtMost: 89}
			n, err := revoke(q, 89, false)
			require.Equal(t, refused, asSelection(t, err))
			require.Zero(t, n)
			require.Zero(t, calls)
			n, err = revoke(q, 89, true)
			require.Equal(t, refused, asSelection(t, err))
			require.Equal(t, 90, n)
			require.Equal(t, 90, calls)
			require.Equal(t, 90, admitted(t, s, keys))

			limited := q
			limited.Limit = 5
			n, err = revoke(limited, 5, false)
			require.NoError(t, err, "a Limit is no excess")
			require.Equal(t, 5, n)
			n, err = revoke(q, 85, false)
			require.NoError(t, err)
			require.Equal(t, 85, n)
			require.Zero(t, admitted(t, s, keys))
			n, err = revoke(q, 1, false)
			require.NoError(t, err)
			require.Zero(t, n)
		})
	}
}

func asSelection(t *testing.T, err error) *keystore.SelectionError {
	t.Helper()
	var e *keystore.SelectionError
	require.ErrorAs(t, err, &e)
	return e
}

// The selection grows during the call, by a new key and by a change of a key: RevokeAll stops after
// the keys that the caller expects, and reports the rest.
func TestRevokeAllAtMostOfAGrowingSelection(t *testing.T) {
	for name, grow := range map[string]func(*keystore.Store, *keystore.Key) error{
		"a new key": func(s *keystore.Store, _ *keystore.Key) error {
			_, err := s.Create(context.Background(), keystore.Spec{Name: "x", Owner: "acme"})
			return err
		},
		"another owner": func(s *keystore.Store, k *keystore.Key) error {
			_, err := s.Update(context.Background(), k.ID, func(spec *keystore.Spec) error {
				spec.Owner = "acme"
				return nil
			})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, nil)
			const n = 10
			fill(t, s, n, func(int) keystore.Spec { return keystore.Spec{Owner: "acme"} })
			other := fill(t, s, 1, func(int) keystore.Spec { return keystore.Spec{Owner: "ajax"} })
			done, err := s.RevokeAll(t.Context(), keystore.Query{Owner: "acme"}, "",
				&keystore.RevokeAllOptions{AtMost: n, Progress: func(_ *keystore.Key, done int) {
					if done == 1 {
						require.NoError(t, grow(s, other[0].Key))
					}
				}})
			require.Equal(t, &keystore.SelectionError{Selected: n + 1, AtMost: n}, asSelection(t, err))
			require.Equal(t, n, done)
		})
	}
}

func TestRevokeAllByAgeAndByUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := keystore.New(backendtest.NewMemory(), nil)
		require.NoError(t, err)
		defer s.Close()
		old, used := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
		time.Sleep(time.Hour)
		_, err = s.Verify(t.Context(), used.Secret.Reveal())
		require.NoError(t, err)
		young := create(t, s, keystore.Spec{})

		n, err := s.RevokeAll(t.Context(),
			keystore.Query{UnusedSince: time.Now().Add(-time.Minute)}, "", nil)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, 2, admitted(t, s, []*keystore.Issued{old, used, young}))

		n, err = s.RevokeAll(t.Context(), keystore.Query{CreatedBefore: time.Now()}, "", nil)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, 1, admitted(t, s, []*keystore.Issued{used, young}))

		n, err = s.RevokeAll(t.Context(), keystore.Query{}, "",
			&keystore.RevokeAllOptions{All: true})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Zero(t, admitted(t, s, []*keystore.Issued{old, used, young}))
	})
}

func TestRevokeAllContinuesAfterAnInterruption(t *testing.T) {
	s := open(t, nil)
	const n = 1000 // more than are under way at once
	keys := fill(t, s, n, func(int) keystore.Spec { return keystore.Spec{} })
	ctx, cancel := context.WithCancel(t.Context())
	first, err := s.RevokeAll(ctx, keystore.Query{}, "", &keystore.RevokeAllOptions{
		All: true,
		Progress: func(_ *keystore.Key, done int) {
			if done == 100 {
				cancel()
			}
		},
	})
	require.ErrorIs(t, err, context.Canceled)
	require.GreaterOrEqual(t, first, 100)
	require.Less(t, first, n)
	require.LessOrEqual(t, admitted(t, s, keys), n-first)

	second, err := s.RevokeAll(t.Context(), keystore.Query{}, "",
		&keystore.RevokeAllOptions{All: true})
	require.NoError(t, err)
	require.LessOrEqual(t, first+second, n)
	require.Zero(t, admitted(t, s, keys))
}

// The ID of a key is older than the key. One whose Create is slow is found all the same, when
// others with later IDs have been read long since.
func TestRevokeAllFindsWhatIsBeingCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &stalling{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		for _, limit := range []int{0, 2, 1} {
			stall := make(chan struct{})
			b.stall = stall
			created := make(chan *keystore.Issued, 1)
			go func() {
				issued, _ := s.Create(context.Background(), keystore.Spec{Name: "slow"})
				created <- issued
			}()
			synctest.Wait() // it has its ID
			b.stall = nil
			fast := create(t, s, keystore.Spec{})
			var told []string
			revoked := make(chan error, 1)
			go func() {
				_, err := s.RevokeAll(context.Background(), keystore.Query{Limit: limit}, "",
					&keystore.RevokeAllOptions{
						All:      true,
						Progress: func(k *keystore.Key, _ int) { told = append(told, k.ID) },
					})
				revoked <- err
			}()
			synctest.Wait()
			require.Equal(t, []string{fast.Key.ID}, told)
			close(stall)
			slow := <-created
			require.Less(t, slow.Key.ID, fast.Key.ID)
			require.NoError(t, <-revoked)
			if limit == 1 {
				require.NoError(t, verify(t, s, slow.Secret.Reveal()))
				continue
			}
			require.Equal(t, []string{fast.Key.ID, slow.Key.ID}, told)
			require.ErrorIs(t, verify(t, s, slow.Secret.Reveal()), keystore.ErrRevoked)
		}
	})
}

func TestRevokeAllEndsLiveContexts(t *testing.T) {
	s := open(t, nil)
	acme, ajax := create(t, s, keystore.Spec{Owner: "acme"}), create(t, s,
		keystore.Spec{Owner: "ajax"})
	ends := bind(t, s, acme.Secret.Reveal())
	stays := bind(t, s, ajax.Secret.Reveal())
	_, err := s.RevokeAll(t.Context(), keystore.Query{Owner: "acme"}, "", nil)
	require.NoError(t, err)
	require.ErrorIs(t, context.Cause(ends), keystore.ErrRevoked)
	require.NoError(t, stays.Err())
}

// While keys are changed by others, RevokeAll's writes of many fail, and it takes them one by one.
func TestRevokeAllAmongOtherChanges(t *testing.T) {
	s := open(t, nil)
	keys := fill(t, s, 200, func(int) keystore.Spec { return keystore.Spec{} })
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := w; ; i = (i + 7) % len(keys) {
				select {
				case <-stop:
					return
				default:
				}
				_, err := s.Update(context.Background(), keys[i].Key.ID,
					func(spec *keystore.Spec) error {
						spec.Metadata["touched"] = fmt.Sprint(i, time.Now())
						return nil
					})
				if err != nil && !errors.Is(err, keystore.ErrKeyRevoked) {
					t.Error(err)
					return
				}
			}
		})
	}
	n, err := s.RevokeAll(t.Context(), keystore.Query{}, "", &keystore.RevokeAllOptions{All: true})
	none := admitted(t, s, keys)
	close(stop)
	wg.Wait()
	require.NoError(t, err)
	require.Equal(t, 200, n)
	require.Zero(t, none)
}

// A raced backend runs before ahead of the first Apply with a chosen change.
type raced struct {
	backend.Backend
	chooses func(backend.Change) bool
	before  func()
	once    sync.Once
}

func (b *raced) Apply(ctx context.Context, changes ...backend.Change) error {
	if slices.ContainsFunc(changes, b.chooses) {
		b.once.Do(b.before)
	}
	return b.Backend.Apply(ctx, changes...)
}

// A key that is changed after RevokeAll has read the key, and before RevokeAll writes the key, is
// read and evaluated again. The change makes the write of the whole batch fail.
func TestRevokeAllEvaluatesAChangedKeyAgain(t *testing.T) {
	var change func()
	b := &raced{
		Backend: backendtest.NewMemory(),
		chooses: func(c backend.Change) bool { return c.Restricts && c.Key[0] == 'k' },
		before:  func() { change() },
	}
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	defer s.Close()
	keys := fill(t, s, 8, func(i int) keystore.Spec { return keystore.Spec{Owner: "acme"} })
	update := func(n int, edit func(*keystore.Spec)) {
		_, err := s.Update(context.Background(), keys[n].Key.ID,
			func(spec *keystore.Spec) error { edit(spec); return nil })
		require.NoError(t, err)
	}
	change = func() {
		update(3, func(spec *keystore.Spec) { spec.Owner = "other" })
		update(5, func(spec *keystore.Spec) { spec.Name = "changed" })
	}
	revoked := make(map[string]string)
	n, err := s.RevokeAll(t.Context(), keystore.Query{Owner: "acme"}, "why",
		&keystore.RevokeAllOptions{Progress: func(k *keystore.Key, _ int) {
			require.False(t, k.RevokedAt.IsZero())
			revoked[k.ID] = k.Name
		}})
	require.NoError(t, err)
	require.Equal(t, 7, n)
	require.Len(t, revoked, 7)
	require.NotContains(t, revoked, keys[3].Key.ID)
	require.Equal(t, "changed", revoked[keys[5].Key.ID])
	for i, k := range keys {
		now, err := s.Get(t.Context(), k.Key.ID)
		require.NoError(t, err)
		want := uint64(2)
		if i == 5 {
			want = 3
		}
		require.Equal(t, want, now.Revision)
		require.Equal(t, i != 3, !now.RevokedAt.IsZero(), "key %d", i)
	}
	require.Equal(t, 1, admitted(t, s, keys))
}

// A damaged last use, of one key, is nothing to those who do not ask for it, and to others it is an
// error about that key.
func TestDamagedLastUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := backendtest.NewMemory()
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer s.Close()
		keys := fill(t, s, 5, func(int) keystore.Spec { return keystore.Spec{} })
		var ids [][]byte
		for e, err := range b.Scan(t.Context(), []byte("k"), []byte("l")) {
			require.NoError(t, err)
			ids = append(ids, e.Key[1:])
		}
		require.NoError(t, b.Apply(t.Context(), backend.Change{Key: append([]byte("u"), ids[1]...),
			Value: []byte{0xff}}))
		time.Sleep(time.Second)
		require.Equal(t, 5, admitted(t, s, keys))
		require.NoError(t, s.Backup(t.Context(), io.Discard),
			"the uses of the others can be written")

		listed, damaged := 0, 0
		for k, err := range s.List(t.Context(), keystore.Query{}) {
			if err != nil {
				require.ErrorIs(t, err, keystore.ErrCorrupt)
				damaged++
				continue
			}
			require.NotZero(t, k.LastUsedAt)
			listed++
		}
		require.Equal(t, []int{4, 1}, []int{listed, damaged})
		n, err := s.RevokeAll(t.Context(), keystore.Query{UnusedSince: time.Now()}, "", nil)
		require.ErrorIs(t, err, keystore.ErrCorrupt)
		require.Zero(t, n)
		n, err = s.RevokeAll(t.Context(), keystore.Query{}, "",
			&keystore.RevokeAllOptions{All: true})
		require.NoError(t, err)
		require.Equal(t, 5, n)
		require.Zero(t, admitted(t, s, keys))
	})
}

func TestPurgeRemovesTheLongDeadAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := backendtest.NewMemory()
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer s.Close()
		revoked := create(t, s, keystore.Spec{Owner: "acme"})
		expired := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Minute)})
		disabled, active := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
		later := create(t, s, keystore.Spec{})
		require.NoError(t, s.Revoke(t.Context(), revoked.Key.ID, ""))
		require.NoError(t, s.Disable(t.Context(), disabled.Key.ID, ""))
		time.Sleep(time.Hour)
		before := time.Now()
		time.Sleep(time.Hour)
		require.NoError(t, s.Revoke(t.Context(), later.Key.ID, ""))

		for _, bad := range []time.Time{{}, time.Now().Add(time.Second)} {
			_, err := s.Purge(t.Context(), bad)
			require.ErrorIs(t, err, keystore.ErrInvalid)
		}
		n, err := s.Purge(t.Context(), before)
		require.NoError(t, err)
		require.Equal(t, 2, n)
		for _, gone := range []*keystore.Issued{revoked, expired} {
			_, err = s.Get(t.Context(), gone.Key.ID)
			require.ErrorIs(t, err, keystore.ErrNotFound)
			_, err = s.Verify(t.Context(), gone.Secret.Reveal())
			require.ErrorIs(t, err, keystore.ErrUnknown)
			require.ErrorIs(t, s.Revoke(t.Context(), gone.Key.ID, ""), keystore.ErrNotFound)
		}
		var left []string
		for k, err := range s.List(t.Context(), keystore.Query{}) {
			require.NoError(t, err)
			left = append(left, k.ID)
		}
		require.Equal(t, []string{disabled.Key.ID, active.Key.ID, later.Key.ID}, left)
		for e, err := range b.Scan(t.Context(), []byte("k"), []byte("l")) {
			require.NoError(t, err)
			require.NotContains(t, string(e.Value), "acme")
		}
		n, err = s.Purge(t.Context(), before)
		require.NoError(t, err)
		require.Zero(t, n)
	})
}

// BenchmarkRevokeAll revokes half of 200,000 keys while the other half is used, and compares the
// time with that of creating as many through the same committer.
func BenchmarkRevokeAll(b *testing.B) {
	const n = 100_000
	for b.Loop() {
		s := open(b, nil)
		out := fill(b, s, n, func(int) keystore.Spec { return keystore.Spec{Owner: "ajax"} })
		began := time.Now()
		in := fill(b, s, n, func(int) keystore.Spec { return keystore.Spec{Owner: "acme"} })
		creating := time.Since(began)
		require.Equal(b, n, admitted(b, s, in))

		stop, uses := make(chan struct{}), 0
		var wg sync.WaitGroup
		wg.Go(func() {
			for i := 0; ; i = (i + 1) % n {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := s.Verify(context.Background(), out[i].Secret.Reveal()); err != nil {
					b.Error(err)
					return
				}
				if uses++; uses%16 == 0 {
					time.Sleep(time.Millisecond) // it is to be there, not to take a processor
				}
			}
		})
		began = time.Now()
		revoked, err := s.RevokeAll(b.Context(), keystore.Query{Owner: "acme"}, "", nil)
		revoking := time.Since(began)
		close(stop)
		wg.Wait()
		require.NoError(b, err)
		require.Equal(b, n, revoked)
		require.Zero(b, admitted(b, s, in))
		require.NotZero(b, uses)
		b.ReportMetric(n/creating.Seconds(), "creates/s")
		b.ReportMetric(n/revoking.Seconds(), "revokes/s")
		b.ReportMetric(revoking.Seconds()/creating.Seconds(), "x-creating")
		require.NoError(b, s.Close())
	}
}
