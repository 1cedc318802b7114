package keystoretest_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var openers = map[string]func(testing.TB, *keystore.Options) *keystore.Store{
	"in memory": keystoretest.New,
	"in a directory": func(tb testing.TB, opts *keystore.Options) *keystore.Store {
		return keystoretest.Open(tb, tb.TempDir(), opts)
	},
}

func TestStoreIsClosedAfterTest(t *testing.T) {
	for name, open := range openers {
		t.Run(name, func(t *testing.T) { testClosedAfterTest(t, open) })
	}
}

func testClosedAfterTest(t *testing.T, open func(testing.TB, *keystore.Options) *keystore.Store) {
	var left *keystore.Store
	t.Run("a test", func(t *testing.T) {
		store := open(t, &keystore.Options{Prefix: "kit"})
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Owner: "o"})
		require.Equal(t, t.Name(), issued.Key.Name)
		key, err := store.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		require.Equal(t, "o", key.Owner)
		left = store
	})
	_, err := left.Verify(t.Context(), "x")
	require.ErrorIs(t, err, keystore.ErrClosed, "closed when the test ended")
}

// A failing is a test that records the text of Fatalf.
type failing struct {
	testing.TB
	fatal string
}

func (f *failing) Helper() {}

func (f *failing) Fatalf(format string, args ...any) {
	f.fatal = fmt.Sprintf(format, args...)
	panic(f)
}

func TestFailureFailsTheTest(t *testing.T) {
	store := keystoretest.New(t, nil)
	dir := t.TempDir()
	keystoretest.Open(t, dir, nil)
	for _, tt := range []struct {
		wantText string
		call     func(*failing)
	}{
		{"prefix", func(f *failing) { keystoretest.New(f, &keystore.Options{Prefix: "_"}) }},
		{"prefix", func(f *failing) {
			keystoretest.Open(f, t.TempDir(), &keystore.Options{Prefix: "_"})
		}},
		{"open elsewhere", func(f *failing) { keystoretest.Open(f, dir, nil) }},
		{"Spec.ExpiresAt", func(f *failing) {
			keystoretest.MustCreate(f, store, keystore.Spec{ExpiresAt: time.Unix(1, 0)})
		}},
	} {
		f := &failing{TB: t}
		require.PanicsWithValue(t, f, func() { tt.call(f) })
		require.Contains(t, f.fatal, tt.wantText)
	}
}

// In a bubble, ten days pass immediately. A goroutine that does I/O, or waits for a goroutine
// outside the bubble, would stop the clock of the bubble. A store in a directory has such
// goroutines.
func TestNewWorksInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		const life = 10 * 24 * time.Hour
		issued := keystoretest.MustCreate(t, store, keystore.Spec{ExpiresAt: time.Now().Add(life)})
		session, err := store.Bind(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		defer session.Close()
		began := time.Now()
		<-session.Context().Done()
		require.ErrorIs(t, session.Cause(), keystore.ErrExpired)
		require.Equal(t, life, time.Since(began))
		_, err = store.Verify(t.Context(), issued.Secret.Reveal())
		require.ErrorIs(t, err, keystore.ErrExpired)
		key, err := store.Get(t.Context(), issued.Key.ID)
		require.NoError(t, err)
		require.WithinRange(t, key.LastUsedAt, time.Now().Add(-time.Minute), time.Now(),
			"a live context counts as a use, and the use is written")
	})
}

// A store from Open has the keys of the directory. A store from New is empty.
func TestOpenReopensADirectory(t *testing.T) {
	dir := t.TempDir()
	store := keystoretest.Open(t, dir, nil)
	token := keystoretest.MustCreate(t, store, keystore.Spec{}).Secret.Reveal()
	require.NoError(t, store.Close())
	_, err := keystoretest.Open(t, dir, nil).Verify(t.Context(), token)
	require.NoError(t, err)
	_, err = keystoretest.New(t, nil).Verify(t.Context(), token)
	require.ErrorIs(t, err, keystore.ErrUnknown)
}

// BenchmarkOpen compares New with Open.
func BenchmarkOpen(b *testing.B) {
	for name, open := range openers {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				require.NoError(b, open(b, nil).Close())
			}
		})
	}
}
