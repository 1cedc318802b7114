package sha2crypt_test

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/hashing/sha2crypt"
)

func digest(text string) hashing.Digest {
	return hashing.Digest{Scheme: sha2crypt.Scheme, Sum: []byte(text)}
}

// The digests were computed with crypt(3) of glibc. The first and the third are in the
// specification too.
func TestVectors(t *testing.T) {
	flask := "oil_00112233445566778899aabbccddeeff." + strings.Repeat("A", 64)
	for _, tt := range []struct{ token, sum string }{
		{"Hello world!", "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68" +
			"u4OTLiBFdcbYEdFCoEOfaS35inz1"},
		{"Hello world!", "$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5"},
		{"Hello world!", "$6$rounds=10000$saltstringsaltst$OW1/O6BYHV6BcXZu8QVeXbDWra3Oeqh0sbHbbMC" +
			"VNSnCM/UrjmM0Dp8vOuZeHBy/YTBmSK6H9qs/y3RnOaw5v."},
		{flask, "$6$rounds=5000$saltstring$T7b7arRmIVpud9PuLfBJK9RMddCmGp5W0RFL/Fb402vNTtDdHrzBQpL" +
			"b68t3uoaeQSbSMrw0dBtbJGzt27ZnK1"},
		{flask, "$6$rounds=656000$abcdefghijklmnop$gQLaJPHD0F3fj1rhE4GpYbAdzIQzU857tTc/PeWKD4sQDz." +
			"/bQmjeIDsNoKHTmBU7TsKdTHdqauOdOwYJOAOY."},
	} {
		if testing.Short() && strings.Contains(tt.sum, "656000") {
			continue
		}
		h := sha2crypt.New()
		require.Equal(t, hashing.Match, h.Match(digest(tt.sum), tt.token), tt.sum)
		if !strings.Contains(tt.sum, "656000") {
			for _, wrong := range []string{"", tt.token + "x", tt.token[1:], tt.sum} {
				require.Equal(t, hashing.Mismatch, h.Match(digest(tt.sum), wrong))
			}
		}
		other := hashing.Digest{Scheme: "sha256", Sum: []byte(tt.sum)}
		require.Equal(t, hashing.Mismatch, h.Match(other, tt.token))
	}
}

func TestMalformed(t *testing.T) {
	const sum = "$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68" +
		"u4OTLiBFdcbYEdFCoEOfaS35inz1"
	h := sha2crypt.New().(interface{ WellFormed([]byte) bool })
	require.True(t, h.WellFormed([]byte("$6$saltstring"+sum)))
	for _, text := range []string{
		"", "$", "$6$", "$6$saltstring", "$6$saltstring$", "$1$saltstring" + sum, "$5$saltstring" + sum,
		"$6$rounds=999$saltstring" + sum, "$6$rounds=5000001$saltstring" + sum,
		"$6$rounds=$saltstring" + sum, "$6$rounds=x$saltstring" + sum, "$6$rounds=-5000$s" + sum,
		"$6$saltstringsaltstr" + sum, "$6$salt:string" + sum, "x$6$saltstring" + sum,
		"$6$saltstring" + sum + "$", "$6$saltstring" + sum[:86], "$6$saltstring" + sum + "A",
	} {
		require.False(t, h.WellFormed([]byte(text)), text)
		require.Equal(t, hashing.Mismatch, sha2crypt.New().Match(digest(text), "Hello world!"), text)
	}
}

// In a Keyring with SHA256, a digest of the scheme is outdated, and slow.
func TestKeyring(t *testing.T) {
	h, err := hashing.Keyring(hashing.SHA256(), sha2crypt.New())
	require.NoError(t, err)
	d := sha2crypt.New().Digest("token")
	require.Equal(t, hashing.MatchOutdated, h.Match(d, "token"))
	require.Equal(t, []string{sha2crypt.Scheme},
		h.(interface{ SlowSchemes() []string }).SlowSchemes())
	require.True(t, h.(interface{ Recognizes(hashing.Digest) bool }).Recognizes(d))
}

// Digests of passlib itself, as flask-api-key makes them.
func TestPasslib(t *testing.T) {
	python := "/usr/bin/python3" // Debian's, which has Debian's packages
	if exec.Command(python, "-c", "import passlib").Run() != nil {
		t.Skip("NOT RUN: passlib is not installed. Install Debian's package python3-passlib.")
	}
	const token = "oil_00112233445566778899aabbccddeeff.0123456789abcdefghij"
	out, err := exec.CommandContext(t.Context(), python, "-c", `
import sys
from passlib.hash import sha256_crypt, sha512_crypt
for h in sha256_crypt, sha512_crypt:
    for rounds in 1000, 5000, 20000:
        print(h.using(rounds=rounds).hash(sys.argv[1]))
`, token).Output()
	require.NoError(t, err)
	lines := strings.Fields(string(out))
	require.Len(t, lines, 6)
	for _, line := range lines {
		require.Equal(t, hashing.Match, sha2crypt.New().Match(digest(line), token), line)
		require.Equal(t, hashing.Mismatch, sha2crypt.New().Match(digest(line), token+"x"), line)
	}
}
