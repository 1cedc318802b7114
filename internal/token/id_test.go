package token

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
)

func TestIDText(t *testing.T) {
	for text, id := range map[string]ID{
		"00000000000000000000000000": {},
		"00000000000000000000000001": {15: 1},
		"00000000000008000000000000": {8: 0x80}, // the bits at the border of the halves
		"0000000000000g000000000000": {7: 1},
		"00000000000010000000000000": {7: 2},
		"40000000000000000000000000": {0: 0x80},
		"7zzzzzzzzzzzzzzzzzzzzzzzzz": ID(bytes.Repeat([]byte{0xff}, 16)),
	} {
		require.Equal(t, text, id.String())
		got, ok := ParseID(text)
		require.True(t, ok)
		require.Equal(t, id, got)
	}

	random := rand.NewChaCha8([32]byte{})
	var last string
	for range 1000 {
		var id ID
		_, _ = random.Read(id[:])
		got, ok := ParseID(id.String())
		require.True(t, ok)
		require.Equal(t, id, got)
		require.NotEqual(t, last, id.String())
		last = id.String()
	}
}

func TestParseIDRefuses(t *testing.T) {
	const good = "01k9x3v7q2f8hr6m5w0c4tzbnd"
	_, ok := ParseID(good)
	require.True(t, ok)
	for _, s := range []string{
		"", good[1:], good + "0", "8" + good[1:], "z" + good[1:], strings.ToUpper(good),
	} {
		id, ok := ParseID(s)
		require.False(t, ok)
		require.Zero(t, id)
	}
	for i := range good {
		for c := range 256 {
			s := good[:i] + string([]byte{byte(c)}) + good[i+1:]
			_, ok := ParseID(s)
			canonical := strings.IndexByte(alphabet, byte(c)) >= 0 && (i > 0 || c <= '7')
			require.Equal(t, canonical, ok, "%#x at %d", c, i)
		}
	}
}

func TestIDsSortByCreation(t *testing.T) {
	f := format(t, "oil", 22, ASCII62)
	before := time.Now().UnixMilli()
	var ids []ID
	var texts []string
	for range 10_000 {
		id, _ := f.New()
		ids = append(ids, id)
		texts = append(texts, id.String())
	}
	require.True(t, slices.IsSorted(texts))
	require.True(t,
		slices.IsSortedFunc(ids, func(a, b ID) int { return bytes.Compare(a[:], b[:]) }))
	require.Len(t, slices.Compact(texts), len(ids), "all IDs are different")

	first := uuid.UUID(ids[0])
	require.EqualValues(t, 7, first.Version())
	require.Equal(t, uuid.RFC4122, first.Variant())
	sec, nsec := first.Time().UnixTime()
	require.InDelta(t, before, time.Unix(sec, nsec).UnixMilli(), 1000)
}

func TestFirst(t *testing.T) {
	format, err := NewFormat("oil", 64, ASCII62)
	require.NoError(t, err)
	before := time.Now()
	id, _ := format.New()
	require.False(t, id.Time().Before(before.Truncate(time.Millisecond)))
	require.Equal(t, id.Time(), First(id.Time()).Time())
	first, next := First(id.Time()), First(id.Time().Add(time.Millisecond))
	require.LessOrEqual(t, string(first[:]), string(id[:]))
	require.Less(t, string(id[:]), string(next[:]))
	require.Equal(t, first, First(id.Time().Add(time.Millisecond-1)))
	require.Equal(t, ID{}, First(time.Time{}))
	require.Equal(t, ID{}, First(time.Unix(-1, 0)))
	require.Equal(t, ID{}, First(time.Unix(0, 0)))
	last := ID(bytes.Repeat([]byte{0xff}, 16))
	for _, beyond := range []time.Time{
		time.UnixMilli(1 << 48), time.Date(20_000, 1, 1, 0, 0, 0, 0, time.UTC),
		time.Unix(1<<62, 0),
	} {
		require.Equal(t, last, First(beyond))
	}
	require.Equal(t, byte(0xff), First(time.UnixMilli(1<<48 - 1))[5])
}
