package keystoretest_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestKit(t *testing.T) {
	var left *keystore.Store
	t.Run("a test", func(t *testing.T) {
		store := keystoretest.New(t, &keystore.Options{Prefix: "kit"})
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Owner: "o"})
		require.Equal(t, t.Name(), issued.Key.Name)
		key, err := store.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		require.Equal(t, "o", key.Owner)
		left = store
	})
	_, err := left.Verify(t.Context(), "x")
	require.ErrorIs(t, err, keystore.ErrClosed, "when the test was over")
}

// A failing is a test that writes down that it has failed.
type failing struct {
	testing.TB
	fatal string
}

func (f *failing) Helper() {}

func (f *failing) Fatalf(format string, args ...any) {
	f.fatal = fmt.Sprintf(format, args...)
	panic(f)
}

func TestKitFails(t *testing.T) {
	store := keystoretest.New(t, nil)
	for want, call := range map[string]func(*failing){
		"Prefix":         func(f *failing) { keystoretest.New(f, &keystore.Options{Prefix: "_"}) },
		"Spec.ExpiresAt": func(f *failing) { keystoretest.MustCreate(f, store, keystore.Spec{ExpiresAt: time.Unix(1, 0)}) },
	} {
		f := &failing{TB: t}
		require.PanicsWithValue(t, f, func() { call(f) })
		require.NotEmpty(t, f.fatal, want)
	}
}
