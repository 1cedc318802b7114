package keystore_test

import (
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Cached keys with the same owner and scopes share one copy of each text.
func TestCachedKeysShareTheirTexts(t *testing.T) {
	s := inMemory(t)
	var owners, scopes []*byte
	for range 2 {
		issued := create(t, s, keystore.Spec{Owner: "team", Scopes: []string{"orders:*"}})
		key, err := s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		owners = append(owners, unsafe.StringData(key.Owner))
		scopes = append(scopes, unsafe.StringData(key.Scopes()[0]))
	}
	require.Same(t, owners[0], owners[1])
	require.Same(t, scopes[0], scopes[1])
}
