package token

import (
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// shape describes the texts that Parse accepts, independently of Parse.
var shape = regexp.MustCompile(`^([0-9A-Za-z](?:[0-9A-Za-z_]{0,30}[0-9A-Za-z])?)_` +
	`([0-7][0-9a-hjkmnp-tv-z]{25})_` +
	"([!-^`-~]{22,}[0-9A-Za-z]{6})$")

func hasShape(s string) bool { return len(s) <= MaxLength && shape.MatchString(s) }

// vectors were computed without this package: the checksums with zlib.crc32 of Python, and the
// texts of the IDs with shifts of integers in Python. The fourth ID is the UUIDv7 of RFC 9562, A.6.
var vectors = []struct{ id, prefix, rest string }{
	{
		"0198b1d3f8e27a4c9d0e1f2a3b4c5d6e", "oil_01k2rx7y72f969t3gz58xmrqbe",
		"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ010xsMAL",
	},
	{
		"00000000000000000000000000000001", "my_api_00000000000000000000000001",
		"zzzzzzzzzzzzzzzzzzzzzz3c4iSH",
	},
	{
		"ffffffffffffffffffffffffffffffff", "a__9_7zzzzzzzzzzzzzzzzzzzzzzzzz",
		"0123456789abcdef0123456789ab0DWHYc",
	},
	{
		"017f22e279b07cc398c4dc0c0c07398f", "X_01fwhe4ydgfk1shh6w1g60eecf",
		"!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~1yugn0",
	},
	{
		"0198b1d3f8e27a4c9d0e1f2a3b4c5d6e", "oil_01k2rx7y72f969t3gz58xmrqbe",
		"00000000000000000000910000Zn",
	},
}

func TestVectors(t *testing.T) {
	for _, v := range vectors {
		text := v.prefix + "_" + v.rest
		id, ok := Parse(text)
		require.True(t, ok)
		require.Equal(t, v.id, hex.EncodeToString(id[:]))
		require.True(t, strings.HasSuffix(v.prefix, "_"+id.String()))
		require.True(t, ChecksumOK(text))
		require.True(t, valid(text))
		require.True(t, hasShape(text))
		require.Equal(t, v.prefix+"_…", Hint(text))
	}
}

// For each byte at each position, Parse accepts what the regular expression accepts, and the
// checksum detects every change of one byte.
func TestOneByteChanged(t *testing.T) {
	for _, v := range vectors[:2] { // only two, because the regular expression is slow
		text := []byte(v.prefix + "_" + v.rest)
		for i, was := range text {
			for c := range 256 {
				text[i] = byte(c)
				s := string(text)
				_, ok := Parse(s)
				if ok != hasShape(s) || valid(s) != (text[i] == was) {
					t.Fatalf("byte %d of %q…, set to %#x: Parse returns %t, and valid returns %t",
						i, v.prefix, c, ok, valid(s))
				}
			}
			text[i] = was
		}
	}
}

func TestTruncatedAndConcatenatedTokens(t *testing.T) {
	for _, v := range vectors {
		text := v.prefix + "_" + v.rest
		for i := range text {
			require.False(t, valid(text[:i]), "the first %d bytes", i)
			require.False(t, valid(text[:i]+" "+text[i:]), "a space at %d", i)
			if i > 0 {
				require.False(t, valid(text[i:]), "without the first %d bytes", i)
			}
		}
		for _, s := range []string{text + text, text + "_" + text, "Bearer " + text, text + "\n"} {
			require.False(t, valid(s))
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const id = "01k9x3v7q2f8hr6m5w0c4tzbnd"
	rest := strings.Repeat("s", minSecret)
	withSum := func(s string) string {
		sum := checksum(s)
		return s + string(sum[:])
	}
	fits := strings.Repeat("s", MaxLength-len("oil_")-idLen-len("_")-checksumLen)
	for name, s := range map[string]string{
		"the shortest secret": "oil_" + id + "_" + rest,
		"the longest token":   "oil_" + id + "_" + fits,
		"the longest prefix":  strings.Repeat("x", maxPrefix) + "_" + id + "_" + rest,
		"an ID in the prefix": "x_" + id + "_" + id + "_" + rest,
	} {
		require.True(t, valid(withSum(s)), name)
	}
	for name, s := range map[string]string{
		"nothing":                     "",
		"underscores":                 strings.Repeat("_", 100),
		"no prefix":                   id + "_" + rest,
		"an empty prefix":             "_" + id + "_" + rest,
		"a prefix that begins in _":   "_x_" + id + "_" + rest,
		"a prefix that ends in _":     "x__" + id + "_" + rest,
		"a prefix that is too long":   strings.Repeat("x", maxPrefix+1) + "_" + id + "_" + rest,
		"a prefix with a hyphen":      "a-b_" + id + "_" + rest,
		"a prefix beyond ASCII":       "ä_" + id + "_" + rest,
		"an ID in upper case":         "oil_" + strings.ToUpper(id) + "_" + rest,
		"an ID with one upper case":   "oil_" + id[:25] + "D_" + rest,
		"an ID of more than 128 bits": "oil_8" + id[1:] + "_" + rest,
		"an ID that begins below 0":   "oil_/" + id[1:] + "_" + rest,
		"an ID with i":                "oil_" + id[:25] + "i_" + rest,
		"an ID with l":                "oil_" + id[:12] + "l" + id[13:] + "_" + rest,
		"an ID with o":                "oil_" + id[:13] + "o" + id[14:] + "_" + rest,
		"an ID with u":                "oil_" + id[:1] + "u" + id[2:] + "_" + rest,
		"a short ID":                  "oil_" + id[1:] + "_" + rest,
		"a long ID":                   "oil_0" + id + "_" + rest,
		"a short secret":              "oil_" + id + "_" + rest[1:],
		"a secret with a space":       "oil_" + id + "_ " + rest,
		"a secret with a tab":         "oil_" + id + "_" + rest + "\t" + rest,
		"a secret with a NUL":         "oil_" + id + "_\x00" + rest,
		"a secret with a DEL":         "oil_" + id + "_" + rest + "\x7f",
		"a secret beyond ASCII":       "oil_" + id + "_é" + rest,
		"a secret with an underscore": "oil_" + id + "_s_" + rest,
		"too long": "oil_" + id + "_" + fits +
			strings.Repeat("s", checksumLen+1),
	} {
		t.Run(name, func(t *testing.T) {
			for _, s := range []string{s, withSum(s)} { // a correct checksum must not help
				_, ok := Parse(s)
				require.False(t, ok)
				require.False(t, valid(s))
				require.Equal(t, "…", Hint(s))
			}
		})
	}
}

func TestChecksum(t *testing.T) {
	for _, s := range []string{"", "a", "123456789", strings.Repeat("\xff", 300)} {
		// Compare the value of the digits with the result of hash/crc32.
		var crc uint64
		for _, c := range checksum(s) {
			crc = crc*62 + uint64(strings.IndexByte(base62, c))
		}
		require.EqualValues(t, crc32.ChecksumIEEE([]byte(s)), crc)
	}
	require.True(t, ChecksumOK("000000"), "the checksum of nothing")
	require.False(t, ChecksumOK("00000"))
	require.False(t, ChecksumOK(""))
}

// Hint must not reveal any part of the secret to a log.
func TestHintHasNothingOfTheSecret(t *testing.T) {
	f := format(t, "my_api", 64, ASCII62)
	id, text := f.New()
	require.Equal(t, "my_api_"+id.String()+"_…", Hint(text))
	require.Equal(t, HintOf("my_api", id), Hint(text))
	require.Equal(t, Hint(text), Hint(f.Renew(id)), "the hint does not depend on the secret")
	require.Equal(t, "…", Hint(text[:len(text)-1]))
	require.Equal(t, "…", Hint(text[len("my_api_")+idLen+1:]), "the secret alone")
}

func TestNoAllocations(t *testing.T) {
	_, text := format(t, "oil", 64, ASCII62).New()
	broken := text[:40] + "ä" + text[40:]
	for name, f := range map[string]func(){
		"Parse":                  func() { Parse(text) },
		"Parse of no token":      func() { Parse(broken) },
		"ChecksumOK":             func() { ChecksumOK(text) },
		"ChecksumOK that is not": func() { ChecksumOK(broken) },
	} {
		require.Zero(t, testing.AllocsPerRun(100, f), name)
	}
}

// Parse accepts the texts that the regular expression accepts. Such a text is equal to its parts,
// put together again.
func FuzzParse(f *testing.F) {
	for _, v := range vectors {
		f.Add(v.prefix + "_" + v.rest)
	}
	f.Add("")
	f.Add("_")
	f.Add(strings.Repeat("_", MaxLength))
	f.Add("oil_01k9x3v7q2f8hr6m5w0c4tzbnd_" + strings.Repeat("s", 28))
	f.Fuzz(func(t *testing.T, s string) {
		id, ok := Parse(s)
		require.Equal(t, hasShape(s), ok)
		ChecksumOK(s)
		if !ok {
			require.Zero(t, id)
			require.False(t, valid(s))
			require.Equal(t, "…", Hint(s))
			return
		}
		parts := shape.FindStringSubmatch(s)
		require.Equal(t, s, fmt.Sprintf("%s_%s_%s", parts[1], id, parts[3]))
		back, ok := ParseID(id.String())
		require.True(t, ok)
		require.Equal(t, id, back)

		// Repeat the checks with the correct checksum, which the fuzzer would hardly find.
		s = s[:len(s)-checksumLen]
		sum := checksum(s)
		s += string(sum[:])
		require.True(t, valid(s))
		require.Equal(t, HintOf(parts[1], id), Hint(s))
	})
}

func BenchmarkParse(b *testing.B) {
	_, text := format(b, "oil", 64, ASCII62).New()
	b.ReportAllocs()
	for b.Loop() {
		Parse(text)
	}
}

func BenchmarkChecksumOK(b *testing.B) {
	_, text := format(b, "oil", 64, ASCII62).New()
	b.ReportAllocs()
	for b.Loop() {
		ChecksumOK(text)
	}
}

// For every length, checksum returns the CRC-32 (IEEE) of hash/crc32, both for whole words and for
// the bytes after the words.
func TestChecksumIsCRC32(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for n := range 130 {
		text := make([]byte, n)
		for range 20 {
			for i := range text {
				text[i] = byte(random.Uint32())
			}
			crc := crc32.ChecksumIEEE(text)
			var want [checksumLen]byte
			for i := range want {
				want[len(want)-1-i] = base62[crc%62]
				crc /= 62
			}
			require.Equal(t, want, checksum(string(text)))
		}
	}
}

func TestIDInHint(t *testing.T) {
	id := ID{0: 1, 15: 2}
	for _, prefix := range []string{"", "oil", "my_api"} {
		require.Equal(t, id.String(), IDInHint(HintOf(prefix, id)))
	}
}
