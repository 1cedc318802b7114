package hashing_test

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

// The digests were computed with Python's hashlib.
func TestDigestsOfOtherSystems(t *testing.T) {
	const token = "abcdefgh.0123456789ABCDEFGHIJKLMNOPQRSTUV"
	sum, err := hex.DecodeString("d9827f6e916664b1792f7e55c3f520b6aa102b9fb4429fac18a3169a7078d0ea" +
		"cb82bbc267067500bf42e2ffb0103cfd25bd251de121892bf354bf970f9bbfd3")
	require.NoError(t, err)
	const pbkdf2 = "pbkdf2_sha256$1000$saltsalt$1WzlT7+YYn3o2/AwP69tFdpb8l+yWOKZVvP7BNJ5tr8="
	keyring, err := hashing.Keyring(hashing.SHA256(), hashing.SHA512(), hashing.PBKDF2SHA256())
	require.NoError(t, err)
	type recognizer interface{ Recognizes(hashing.Digest) bool }
	for _, tt := range []struct {
		hasher hashing.Hasher
		digest hashing.Digest
	}{
		{hashing.SHA512(), hashing.Digest{Scheme: "sha512", Sum: sum}},
		{hashing.PBKDF2SHA256(), hashing.Digest{Scheme: "pbkdf2-sha256", Sum: []byte(pbkdf2)}},
	} {
		require.Equal(t, hashing.Match, tt.hasher.Match(tt.digest, token))
		require.Equal(t, hashing.MatchOutdated, keyring.Match(tt.digest, token))
		require.True(t, keyring.(recognizer).Recognizes(tt.digest))
		own := tt.hasher.Digest(token)
		require.Equal(t, tt.digest.Scheme, own.Scheme)
		require.Equal(t, hashing.Match, tt.hasher.Match(own, token))
		require.True(t, keyring.(recognizer).Recognizes(own))

		// The digest itself is no token, and neither is any other text.
		for _, wrong := range []string{"", token[1:], token + "x", strings.ToLower(token),
			string(tt.digest.Sum), hex.EncodeToString(tt.digest.Sum)} {
			require.Equal(t, hashing.Mismatch, keyring.Match(tt.digest, wrong))
		}
		for n := range tt.digest.Sum {
			short := hashing.Digest{Scheme: tt.digest.Scheme, Sum: tt.digest.Sum[:n]}
			require.Equal(t, hashing.Mismatch, keyring.Match(short, token))
			require.False(t, keyring.(recognizer).Recognizes(short))
		}
		other := hashing.Digest{Scheme: "sha256", Sum: tt.digest.Sum}
		require.Equal(t, hashing.Mismatch, tt.hasher.Match(other, token))
		require.False(t, keyring.(recognizer).Recognizes(hashing.Digest{Scheme: "other", Sum: sum}))
	}
	require.Equal(t, []string{"pbkdf2-sha256"},
		keyring.(interface{ SlowSchemes() []string }).SlowSchemes())
}

func TestMalformedPBKDF2(t *testing.T) {
	const end = "$saltsalt$1WzlT7+YYn3o2/AwP69tFdpb8l+yWOKZVvP7BNJ5tr8="
	for _, text := range []string{
		"", "pbkdf2_sha256", "pbkdf2_sha1$1000" + end, "pbkdf2_sha256$0" + end,
		"pbkdf2_sha256$-1" + end, "pbkdf2_sha256$10000001" + end, "pbkdf2_sha256$x" + end,
		"pbkdf2_sha256$1000$$1WzlT7+YYn3o2/AwP69tFdpb8l+yWOKZVvP7BNJ5tr8=",
		"pbkdf2_sha256$1000$saltsalt$AAAA", "pbkdf2_sha256$1000$saltsalt$", "1000" + end,
		"pbkdf2_sha256$1000" + end + "$", "pbkdf2_sha256$1000" + end + "\n",
	} {
		d := hashing.Digest{Scheme: "pbkdf2-sha256", Sum: []byte(text)}
		require.Equal(t, hashing.Mismatch, hashing.PBKDF2SHA256().Match(d, "token"), text)
	}
}

// A Sum of one method is no Sum of another method with the same length.
func TestSHA512IsNotSHA256(t *testing.T) {
	sum := sha256.Sum256([]byte("token"))
	long := sha512.Sum512([]byte("token"))
	require.Equal(t, hashing.Mismatch,
		hashing.SHA512().Match(hashing.Digest{Scheme: "sha512", Sum: sum[:]}, "token"))
	require.Equal(t, hashing.Mismatch,
		hashing.SHA256().Match(hashing.Digest{Scheme: "sha256", Sum: long[:32]}, "token"))
}
