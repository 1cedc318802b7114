package sha2crypt_test

import (
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/hashing/sha2crypt"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// Keys that flask-api-key itself has made: see testdata of package importer.
func TestFlaskAPIKey(t *testing.T) {
	const dir = "../../keystore/importer/testdata/"
	h, err := hashing.Keyring(hashing.SHA256(), sha2crypt.New())
	require.NoError(t, err)
	flask := importer.FlaskAPIKey()
	s := keystoretest.New(t, &keystore.Options{Hasher: h, Legacy: flask.Formats()})
	file, err := os.Open(dir + "flask-api-key.csv")
	require.NoError(t, err)
	defer file.Close()
	result, err := s.Import(t.Context(), flask.Read(file, nil), nil)
	require.NoError(t, err)
	require.Equal(t, keystore.ImportResult{Rows: 3, Imported: 3, Slow: 3,
		Problems: map[string]int{}}, result)
	text, err := os.ReadFile(dir + "flask-api-key.tokens")
	require.NoError(t, err)
	var tokens []string
	for line := range strings.Lines(string(text)) {
		_, token, _ := strings.Cut(strings.TrimSpace(line), " ")
		tokens = append(tokens, token)
	}
	for range 2 { // the second time, the digest was replaced or the result is remembered
		key, err := s.Verify(t.Context(), tokens[0])
		require.NoError(t, err)
		require.Equal(t, "ci", key.Name)
	}
	export, err := os.ReadFile(dir + "flask-api-key.csv")
	require.NoError(t, err)
	digest := strings.Split(strings.Split(string(export), "\n")[1], ",")[3]
	uuid := strings.Split(tokens[0], ".")[0]
	for _, bad := range []string{digest, uuid, uuid + "." + digest, tokens[0][:len(tokens[0])-1]} {
		_, err := s.Verify(t.Context(), bad)
		require.ErrorIs(t, err, keystore.ErrDenied)
	}
	if testing.Short() {
		return
	}
	_, err = s.Verify(t.Context(), tokens[2])
	require.ErrorIs(t, err, keystore.ErrRevoked)
	issued, err := s.Rotate(t.Context(), idOf(t, s, tokens[0]), 0)
	require.NoError(t, err)
	_, err = s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	_, err = s.Verify(t.Context(), tokens[0])
	require.ErrorIs(t, err, keystore.ErrUnknown)
}

func idOf(t *testing.T, s *keystore.Store, token string) string {
	id, ok := s.KeyID(token)
	require.True(t, ok)
	return id
}
