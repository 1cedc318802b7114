package importer_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// earlier returns a Keyring with the hashers of this module for imported keys.
func earlier(t testing.TB) hashing.Hasher {
	t.Helper()
	h, err := hashing.Keyring(hashing.SHA256(), hashing.SHA512(), hashing.PBKDF2SHA256())
	require.NoError(t, err)
	return h
}

// openFor opens a store in memory that accepts the tokens of some systems.
func openFor(t testing.TB, systems ...string) *keystore.Store {
	t.Helper()
	opts := &keystore.Options{Hasher: earlier(t)}
	for _, name := range systems {
		s, ok := importer.Named(name)
		require.True(t, ok, name)
		opts.Legacy = append(opts.Legacy, s.Formats()...)
	}
	return keystoretest.New(t, opts)
}

// load imports an export, and returns the result with the problems.
func load(
	t testing.TB, s *keystore.Store, system, export string, opts *keystore.ImportOptions,
) (keystore.ImportResult, []*keystore.ImportProblem) {
	t.Helper()
	from, ok := importer.Named(system)
	require.True(t, ok, system)
	if opts == nil {
		opts = new(keystore.ImportOptions)
	}
	var problems []*keystore.ImportProblem
	opts.Problem = func(p *keystore.ImportProblem) { problems = append(problems, p) }
	result, err := s.Import(context.Background(), from.Read(strings.NewReader(export), nil), opts)
	require.NoError(t, err)
	return result, problems
}

// The vectors were computed with Python's hashlib, and the token of seam and that of GitGuardian
// are public.
const (
	commonToken  = "sk_test_0123456789abcdefghijklmnop"
	commonBase64 = "pQLNj+Ub9HE4pqjKKCj34Q9uHEbkTimK4Z6p3Sqvj9w="
	commonURL    = "pQLNj-Ub9HE4pqjKKCj34Q9uHEbkTimK4Z6p3Sqvj9w"
	commonHex    = "a502cd8fe51bf47138a6a8ca2828f7e10f6e1c46e44e298ae19ea9dd2aaf8fdc"
	seamToken    = "mycompany_BRTRKFsL_51FwqftsmMDHHbJAMEXXHCgG"
	seamDigest   = "d70d981d87b449c107327c2a2afbf00d4b58070d6ba571aac35d7ea3e7c79f37"
	sanctumToken = "67|foPpeJkEtftjB2uG565IkEwset7KeKCJ86NjwiaEfb9bfb39"
	sanctumSum   = "89bcd16e7d857201c82e35d1185f51ec3dd9909a4bd4ee94b42f712c3ebe069b"
	drfToken     = "abcdefgh.0123456789ABCDEFGHIJKLMNOPQRSTUV"
	drfDigest    = "sha512$$d9827f6e916664b1792f7e55c3f520b6aa102b9fb4429fac18a3169a7078d0ea" +
		"cb82bbc267067500bf42e2ffb0103cfd25bd251de121892bf354bf970f9bbfd3"
	drfOld = "pbkdf2_sha256$1000$saltsalt$1WzlT7+YYn3o2/AwP69tFdpb8l+yWOKZVvP7BNJ5tr8="
)

// A vector is a token, and the row that the system exports for the token.
type vector struct{ system, token, stored, export string }

var vectors = []vector{
	{"unkey", commonToken, commonBase64, "id,hash,name\nkey_1," + commonBase64 + ",n\n"},
	{"unkey", seamToken, seamDigest, "id,hash,name\nkey_1," + seamDigest + ",n\n"},
	{"better-auth", commonToken, commonURL, "id,key,name\n1," + commonURL + ",n\n"},
	{"plain", commonToken, commonHex, "digest,scheme,name\n" + commonHex + ",sha256,n\n"},
	{"sanctum", sanctumToken, sanctumSum, "id,token,name\n67," + sanctumSum + ",n\n"},
	{"drf", drfToken, drfDigest, "prefix,hashed_key,name\nabcdefgh," + drfDigest + ",n\n"},
	{"drf", drfToken, drfOld, "prefix,hashed_key,name\nabcdefgh," + drfOld + ",n\n"},
	{"kong", commonToken, "", "key,username\n" + commonToken + ",n\n"},
	{"aws", commonToken, "", "Name,key\nn," + commonToken + "\n"},
	{"plain", commonToken, "", "token,name\n" + commonToken + ",n\n"},
}

// A key of each system verifies after the import. A wrong secret is refused, and so is the stored
// digest in each of its forms.
func TestVectors(t *testing.T) {
	for _, v := range vectors {
		t.Run(v.system, func(t *testing.T) {
			s := openFor(t, v.system)
			result, problems := load(t, s, v.system, v.export, nil)
			require.Empty(t, problems)
			require.Equal(t, 1, result.Imported)

			key, err := s.Verify(t.Context(), v.token)
			require.NoError(t, err)
			session, err := s.Bind(t.Context(), v.token)
			require.NoError(t, err)
			session.Close()
			if v.token != seamToken { // which has both formats of unkey
				require.Equal(t, key.ID, keyID(t, s, v.token))
			}

			wrong := []byte(v.token)
			last := &wrong[len(wrong)-1]
			*last = map[bool]byte{true: 'B', false: 'A'}[*last == 'A']
			for _, bad := range append(forms(v), string(wrong), v.token+"A", v.token[:len(v.token)-1]) {
				_, err := s.Verify(t.Context(), bad)
				require.ErrorIs(t, err, keystore.ErrDenied, "form of %d bytes", len(bad))
				_, err = s.Bind(t.Context(), bad)
				require.ErrorIs(t, err, keystore.ErrDenied)
				i, err := s.Inspect(t.Context(), bad)
				require.NoError(t, err)
				require.Nil(t, i.Key)
			}
			_, err = s.Verify(t.Context(), v.token)
			require.NoError(t, err)
		})
	}
}

func keyID(t testing.TB, s *keystore.Store, token string) string {
	t.Helper()
	id, ok := s.KeyID(token)
	require.True(t, ok)
	return id
}

// forms returns texts that a reader of the database of the other system could present.
// If that system stores tokens as plain text, the digests are those that this store has.
func forms(v vector) []string {
	sum := sha256.Sum256([]byte(v.token))
	stored := []string{hex.EncodeToString(sum[:]), base64.StdEncoding.EncodeToString(sum[:]),
		base64.RawURLEncoding.EncodeToString(sum[:])}
	if v.stored != "" {
		stored = append(stored, v.stored, strings.TrimPrefix(v.stored, "sha512$$"))
	}
	texts := slices.Clone(stored)
	for _, prefix := range []string{"67|", "abcdefgh.", "mycompany_BRTRKFsL_", "sk_test_"} {
		for _, digest := range stored {
			texts = append(texts, prefix+digest)
		}
	}
	return texts
}
