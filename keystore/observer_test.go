package keystore_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A witness writes down what it is told, and calls the store each time: it would hang if that held
// a lock.
type witness struct {
	store *keystore.Store

	mu   sync.Mutex
	told []any
}

func (w *witness) tell(what any) {
	if w.store != nil {
		w.store.Stats()
		for range w.store.List(context.Background(), keystore.Query{}) {
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.told = append(w.told, what)
}

func (w *witness) take() (told []any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	told, w.told = w.told, nil
	return told
}

func (w *witness) Verified(v keystore.Verification) { w.tell(v) }
func (w *witness) Refused(r keystore.Refusal)       { w.tell(r) }
func (w *witness) Changed(e keystore.Event)         { w.tell(e) }
func (w *witness) Ended(e keystore.BindEnd)         { w.tell(e) }

func TestObserver(t *testing.T) {
	w := new(witness)
	s := open(t, &keystore.Options{Observer: w})
	w.store = s
	ctx := keystore.WithActor(t.Context(), "alice")
	issued, err := s.Create(ctx, keystore.Spec{Name: "n"})
	require.NoError(t, err)
	id, token := issued.Key.ID, issued.Secret.Reveal()
	created := w.take()
	require.Len(t, created, 1)
	require.Equal(t, keystore.ActionCreate, created[0].(keystore.Event).Action)
	require.Equal(t, "alice", created[0].(keystore.Event).Actor)

	require.NoError(t, verify(t, s, token))
	live := bind(t, s, token)
	require.Equal(t, []any{keystore.Verification{Key: issued.Key},
		keystore.Verification{Key: issued.Key, Bound: true}}, w.take())

	wrong := create(t, open(t, nil), keystore.Spec{})
	require.ErrorIs(t, verify(t, s, wrong.Secret.Reveal()), keystore.ErrUnknown)
	require.ErrorIs(t, verify(t, s, "nonsense"), keystore.ErrMalformed)
	refused := w.take()
	require.Len(t, refused, 2)
	require.Equal(t, wrong.Key.ID, refused[0].(keystore.Refusal).KeyID)
	require.ErrorIs(t, refused[0].(keystore.Refusal).Err, keystore.ErrUnknown)
	require.Empty(t, refused[1].(keystore.Refusal).KeyID)
	require.ErrorIs(t, refused[1].(keystore.Refusal).Err, keystore.ErrMalformed)

	require.NoError(t, s.Revoke(ctx, id, "leaked"))
	require.Error(t, live.Err())
	var ended, changed int
	for _, told := range w.take() {
		switch e := told.(type) {
		case keystore.BindEnd:
			ended++
			require.Equal(t, id, e.KeyID)
			require.ErrorIs(t, e.Cause, keystore.ErrRevoked)
			require.GreaterOrEqual(t, e.After, time.Duration(0))
		case keystore.Event:
			changed++
			require.Equal(t, "leaked", e.Reason)
		}
	}
	require.Equal(t, 1, ended)
	require.Equal(t, 1, changed)
	require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked)
	told := w.take()
	require.ErrorIs(t, told[0].(keystore.Refusal).Err, keystore.ErrRevoked)
	for _, text := range []string{fmt.Sprintf("%+v %#v", told, created),
		fmt.Sprintf("%+v", refused)} {
		require.NotContains(t, text, token[len(token)-40:])
		require.NotContains(t, text, wrong.Secret.Reveal()[40:])
	}
}

// told is an Observer of functions.
type told struct {
	changed func(keystore.Event)
	ended   func(keystore.BindEnd)
}

func (o *told) Verified(keystore.Verification) {}
func (o *told) Refused(keystore.Refusal)       {}
func (o *told) Changed(e keystore.Event) {
	if o.changed != nil {
		o.changed(e)
	}
}
func (o *told) Ended(e keystore.BindEnd) {
	if o.ended != nil {
		o.ended(e)
	}
}

// An Observer may call the store, even for what waits for changes that are under way: its own is
// not.
func TestAnObserverCallsTheStore(t *testing.T) {
	readAll := func(t *testing.T, s *keystore.Store) {
		require.NotEmpty(t, events(t, s, keystore.EventQuery{}))
	}
	for name, play := range map[string]func(t *testing.T, s *keystore.Store, b *unlucky, o *told){
		"Ended reads the events": func(t *testing.T, s *keystore.Store, _ *unlucky, o *told) {
			o.ended = func(keystore.BindEnd) { readAll(t, s) }
			issued := create(t, s, keystore.Spec{})
			bind(t, s, issued.Secret.Reveal())
			require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
		},
		"Changed reads the events, while many keys are changed at once": func(t *testing.T,
			s *keystore.Store, _ *unlucky, o *told) {
			o.changed = func(keystore.Event) { readAll(t, s) }
			fill(t, s, 3, func(int) keystore.Spec { return keystore.Spec{} })
			saved := backup(t, s)
			n, err := s.RevokeAll(t.Context(), keystore.Query{}, "",
				&keystore.RevokeAllOptions{All: true})
			require.NoError(t, err)
			require.Equal(t, 3, n)
			there := new(told)
			other, err := keystore.New(backendtest.NewMemory(), &keystore.Options{Observer: there})
			require.NoError(t, err)
			there.changed = func(keystore.Event) { readAll(t, other) }
			restore(t, other, saved)
			require.NoError(t, other.Close())
		},
		"Changed revokes the key, whose line the change stands in": func(t *testing.T,
			s *keystore.Store, b *unlucky, o *told) {
			issued := create(t, s, keystore.Spec{})
			id := issued.Key.ID
			o.changed = func(e keystore.Event) {
				if e.Revision == 3 {
					require.NoError(t, s.Revoke(context.Background(), id, ""))
				}
			}
			b.between = func() { // another update comes first, once
				b.between = func() {}
				require.NoError(t, touch(context.Background(), s, id))
			}
			require.NoError(t, touch(context.WithValue(t.Context(), marked{}, true), s, id))
			require.ErrorIs(t, verify(t, s, issued.Secret.Reveal()), keystore.ErrRevoked)
		},
		"Changed updates the key, whose other changes wait for this one": func(t *testing.T,
			s *keystore.Store, _ *unlucky, o *told) {
			id := create(t, s, keystore.Spec{}).Key.ID
			o.changed = func(e keystore.Event) {
				if e.Action == keystore.ActionDisable {
					require.NoError(t, touch(context.Background(), s, id))
				}
			}
			require.NoError(t, s.Disable(t.Context(), id, ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			// whoever waits for itself would end by the timeout
			synctest.Test(t, func(t *testing.T) {
				o, b := new(told), &unlucky{Backend: backendtest.NewMemory()}
				s, err := keystore.New(b, &keystore.Options{Observer: o})
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				began := time.Now()
				play(t, s, b, o)
				require.Zero(t, time.Since(began))
			})
		})
	}
}

// A late backend makes a change of a key, and then waits until free is closed before it returns.
type late struct {
	backend.Backend
	free chan struct{}
}

func (b *late) Apply(ctx context.Context, changes ...backend.Change) error {
	err := b.Backend.Apply(ctx, changes...)
	if b.free != nil && changes[0].Key[0] == 'k' {
		<-b.free
	}
	return err
}

// A revocation finds that another one has been committed, and ends the contexts that live. Their
// observer changes the key, and does not wait for the revocation that it is called by.
func TestAnObserverChangesAKeyThatWasRevokedTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, b := new(told), &late{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, &keystore.Options{Observer: o})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued := create(t, s, keystore.Spec{})
		bind(t, s, issued.Secret.Reveal())
		began, updated := time.Now(), make(chan error, 1)
		o.ended = func(keystore.BindEnd) {
			updated <- touch(context.Background(), s, issued.Key.ID)
		}
		b.free = make(chan struct{})
		var revocations sync.WaitGroup
		for range 2 {
			revocations.Go(func() { _ = s.Revoke(context.Background(), issued.Key.ID, "") })
			synctest.Wait()
		}
		close(b.free)
		require.ErrorIs(t, <-updated, keystore.ErrKeyRevoked)
		revocations.Wait()
		require.Zero(t, time.Since(began))
	})
}

func TestStats(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{})
	require.NoError(t, verify(t, s, issued.Secret.Reveal()))
	require.NoError(t, verify(t, s, issued.Secret.Reveal()))
	bind(t, s, issued.Secret.Reveal())
	require.Error(t, verify(t, s, "nonsense"))
	st := s.Stats()
	require.EqualValues(t, 3, st.Hits+st.Misses)
	require.EqualValues(t, 1, st.Refused)
	require.Equal(t, 1, st.Cached)
	require.Equal(t, 1, st.Live)
}
