package token

import (
	"encoding/binary"
	"math"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// allPrintable is the largest charset.
const allPrintable = "!\"#$%&'()*+,-./:;<=>?@[\\]^`{|}~" + ASCII62

func format(t testing.TB, prefix string, length int, charset string) *Format {
	t.Helper()
	f, err := NewFormat(prefix, length, charset)
	require.NoError(t, err)
	return f
}

func TestRoundTrip(t *testing.T) {
	require.Len(t, allPrintable, 93)
	for _, f := range []*Format{
		format(t, "oil", 64, ASCII62),
		format(t, "my_api", 22, ASCII62),
		format(t, "a__b", 64, ASCII50),
		format(t, "X9", 28, Hex),
		format(t, strings.Repeat("p", 32), 446, ASCII62),
		format(t, "p", 34, "0123456789"),
		format(t, "p", 477, allPrintable),
	} {
		for range 100 {
			id, text := f.New()
			require.Len(t, text, f.size)
			require.LessOrEqual(t, len(text), MaxLength)
			got, ok := Parse(text)
			require.True(t, ok)
			require.Equal(t, id, got)
			require.True(t, valid(text))

			head := f.Prefix() + "_" + id.String() + "_"
			require.True(t, strings.HasPrefix(text, head))
			secret := text[len(head) : len(text)-checksumLen]
			require.Empty(t, strings.Trim(secret, f.charset), "all characters are from the charset")

			again := f.Renew(id)
			require.False(t, text == again, "Renew returns a new secret")
			got, ok = Parse(again)
			require.True(t, ok)
			require.Equal(t, id, got)
		}
	}
}

func TestNewFormatRefuses(t *testing.T) {
	for _, tt := range []struct {
		prefix  string
		length  int
		charset string
		says    string
	}{
		{"", 64, ASCII62, "the prefix of 0 bytes is invalid: " +
			"use 1 to 32 ASCII letters, digits and inner underscores, such as my_api"},
		{"_a", 64, ASCII62, "the prefix of 2 bytes is invalid"},
		{"a_", 64, ASCII62, "the prefix"},
		{"a b", 64, ASCII62, "the prefix"},
		{"ä", 64, ASCII62, "the prefix"},
		{strings.Repeat("a", 33), 64, ASCII62, "the prefix of 33 bytes is invalid"},
		{"a", 64, "", "the charset has 0 characters: use 10 or more"},
		{"a", 64, "012345678", "the charset has 9 characters"},
		{"a", 64, "01234567890", "the charset contains '0' twice"},
		{"a", 64, "0123456789_", "the charset contains '_': use printable ASCII"},
		{"a", 64, "0123456789 ", "the charset contains ' '"},
		{"a", 64, "0123456789\n", `the charset contains '\n'`},
		{"a", 64, "0123456789é", "the charset contains 'é'"},
		{"a", 64, "0123456789\xff", "the charset contains '\uFFFD'"},
		{"a", 22, "0123456789", "a secret of 22 characters from a charset of 10 has " +
			"22 × log2(10) = 73.1 bits, and needs at least 112: use 34 characters or more"},
		{"a", 27, Hex, "27 × log2(16) = 108.0 bits, and needs at least 112: use 28"},
		{"a", 10, ASCII62, "10 × log2(62) = 59.5 bits, and needs at least 112: use 22"},
		{"a", 21, ASCII62, "a secret of 21 characters is too short: use 22 characters or more"},
		{"a", 0, ASCII62, "a secret of 0 characters is too short: use 22"},
		{"a", -5, Hex, "a secret of -5 characters is too short: use 28"},
		{"a", 478, ASCII62, "a secret of 478 characters makes the token longer than 512 bytes: " +
			"use 477 characters or fewer"},
		{"my_api", math.MaxInt, ASCII62, "use 472 characters or fewer"},
	} {
		f, err := NewFormat(tt.prefix, tt.length, tt.charset)
		require.ErrorContains(t, err, tt.says)
		require.Nil(t, f)
	}
}

// NewFormat accepts the length that an error advises, and refuses a length of one less.
func TestAdvisedLengthIsAccepted(t *testing.T) {
	for n := minCharset; n <= len(allPrintable); n++ {
		charset := allPrintable[:n]
		for length := range MaxLength {
			if _, err := NewFormat("a", length, charset); err == nil {
				_, err = NewFormat("a", length-1, charset)
				require.ErrorContains(t, err, "use ")
				require.Regexp(t, `use (\d+) characters or more$`, err.Error())
				require.GreaterOrEqual(t, float64(length)*math.Log2(float64(n)), 112.0)
				break
			}
		}
	}
}

func TestErrorDoesNotQuoteATokenGivenAsPrefix(t *testing.T) {
	_, text := format(t, "oil", 64, ASCII62).New()
	_, err := NewFormat(text, 64, ASCII62)
	require.Error(t, err)
	require.False(t, strings.Contains(err.Error(), text[31:]))
}

// writeSecret discards the bytes of the last, incomplete round. It does not map these bytes to the
// first characters.
func TestSamplingRejects(t *testing.T) {
	for _, tt := range []struct {
		charset string
		rounds  int
	}{
		{ASCII62, 248}, {ASCII50, 250}, {Hex, 256}, {"0123456789", 250}, {allPrintable, 186},
	} {
		// fill returns every byte once, from the highest to the lowest. The rejected bytes come
		// first, and must leave no trace.
		next := 256
		fill := func(b []byte) {
			for i := range b {
				next--
				b[i] = byte(next)
			}
		}
		var got, want strings.Builder
		writeSecret(&got, tt.rounds, tt.charset, fill)
		for c := tt.rounds - 1; c >= 0; c-- {
			want.WriteByte(tt.charset[c%len(tt.charset)])
		}
		require.Equal(t, want.String(), got.String())
		require.Zero(t, next, "writeSecret used every byte")
	}
}

func TestSamplingIsUniform(t *testing.T) {
	for _, charset := range []string{ASCII62, ASCII50, Hex, "0123456789", allPrintable} {
		const n = 200_000
		var b strings.Builder
		writeSecret(&b, n, charset, random)
		require.Equal(t, n, b.Len())

		expected := float64(n) / float64(len(charset))
		chi2 := 0.0
		for _, c := range charset {
			diff := float64(strings.Count(b.String(), string(c))) - expected
			chi2 += diff * diff / expected
		}
		// For k degrees of freedom the mean of chi2 is k, and the standard deviation is √(2k).
		// Chance does not reach ten deviations. Without rejection, chi2 is far higher: some 1500
		// for 62 characters.
		k := float64(len(charset) - 1)
		require.Less(t, chi2, k+10*math.Sqrt(2*k), "a charset of %d", len(charset))
	}
}

func TestFormatIsSafeForConcurrentUse(t *testing.T) {
	f := format(t, "oil", 64, ASCII62)
	var seen sync.Map
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 500 {
				id, text := f.New()
				if _, dup := seen.LoadOrStore(id, true); dup || !valid(text) {
					t.Error("an invalid token, or the same ID twice")
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkNew(b *testing.B) {
	f := format(b, "oil", 64, ASCII62)
	b.ReportAllocs()
	for b.Loop() {
		f.New()
	}
}

// Locate finds the ID of every token of its format. It refuses tokens with the ID at another
// position.
func TestLocate(t *testing.T) {
	for _, prefix := range []string{"o", "oil", "my_api", strings.Repeat("x", 31)} {
		f, err := NewFormat(prefix, 64, ASCII62)
		require.NoError(t, err)
		id, text := f.New()
		for n := range 128 {
			s := text[:min(n, len(text))]
			_, _, ok := f.Locate(s)
			require.Equal(t, len(s) == len(text), ok, s)
		}
		hi, lo, ok := f.Locate(text)
		require.True(t, ok)
		require.Equal(t, id[:],
			binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, hi), lo))
		_, _, ok = f.Locate(text + "x")
		require.False(t, ok)

		other, err := NewFormat(prefix+"x", 63, ASCII62)
		require.NoError(t, err)
		_, same := other.New()
		require.Len(t, same, len(text))
		_, _, ok = f.Locate(same)
		require.False(t, ok, "an underscore is at the start or at the end of the ID")
		require.Zero(t, testing.AllocsPerRun(100, func() { f.Locate(text) }))
	}
}
