package keystore_test

import (
	"bytes"
	"context"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A key in a log line shows what identifies the key, and nothing of the application's own data.
func TestKeyLogValue(t *testing.T) {
	s := open(t, nil)
	issued, err := s.Create(context.Background(), keystore.Spec{
		Name: "CI", Owner: "acme", Scopes: []string{"orders:read"},
		Metadata: map[string]string{"password": "hunter2"},
	})
	require.NoError(t, err)
	key := issued.Key
	line := func(key any) string {
		var b bytes.Buffer
		drop := func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey {
				return slog.Attr{}
			}
			return a
		}
		slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{ReplaceAttr: drop})).Info("", "key",
			key)
		return b.String()
	}
	want := "key.id=" + key.ID + " key.name=CI key.owner=acme key.hint=" + key.Hint +
		" key.status=active\n"
	require.Equal(t, want, line(key))
	require.Equal(t, want, line(*key), "a copy of the key")

	crafted := keystore.NewKey(keystore.Spec{Name: "a\nb", Owner: "\u202ec"})
	want = `key.id="" key.name=a\nb key.owner=\u202ec key.hint="" key.status=active` + "\n"
	require.Equal(t, want, line(crafted), "hidden characters are escaped")
}
