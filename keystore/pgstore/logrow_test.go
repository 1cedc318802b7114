package pgstore

import (
	"bytes"
	"math"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestRowsOfTheLog(t *testing.T) {
	long := bytes.Repeat([]byte("x"), 300)
	row, deletes := appendRow([]backend.Change{
		{Key: []byte("b"), Value: long},
		{Key: []byte("guard"), Expect: 7, Check: true},
		{Key: []byte("a"), Expect: math.MaxUint64 - 1},
		{Key: long, Expect: 5, Revision: 9, Value: []byte("v")},
	})
	require.False(t, deletes)
	all := []backend.Entry{
		{Key: []byte("b"), Value: long, Revision: 1},
		{Key: []byte("a"), Value: []byte{}, Revision: math.MaxUint64},
		{Key: long, Value: []byte("v"), Revision: 9},
	}
	for _, tt := range []struct {
		from, to string
		want     []backend.Entry
	}{
		{"", "", all},
		{"a", "b", all[1:2]},
		{"b", "", []backend.Entry{all[0], all[2]}},
		{"c", "d", nil},
	} {
		to := []byte(tt.to)
		if tt.to == "" {
			to = nil
		}
		entries, err := parseRow(row, []byte(tt.from), to)
		require.NoError(t, err)
		require.Equal(t, tt.want, entries, "from %q to %q", tt.from, tt.to)
	}
	entries, err := parseRow(row, nil, []byte{})
	require.NoError(t, err)
	require.Empty(t, entries, "no key is below the empty key")

	removed, deletes := appendRow([]backend.Change{{Key: []byte("a"), Expect: 3, Delete: true}})
	require.True(t, deletes)
	entries, err = parseRow(removed, nil, nil)
	require.NoError(t, err)
	require.Equal(t, []backend.Entry{{Key: []byte("a"), Value: []byte{}}}, entries)

	for n := range row {
		if entries, err := parseRow(row[:n], nil, nil); err == nil {
			// The row ends after a whole entry.
			again, _ := appendRow([]backend.Change{
				{Key: []byte("b"), Value: long}, {Key: []byte("a"), Expect: math.MaxUint64 - 1},
			}[:len(entries)])
			require.Equal(t, again, row[:n])
		}
	}
	_, err = parseRow(bytes.Repeat([]byte{0xff}, 20), nil, nil)
	require.ErrorIs(t, err, errRow)
}

func FuzzParseRow(f *testing.F) {
	row, _ := appendRow([]backend.Change{{Key: []byte("k"), Value: []byte("v")}})
	f.Add(row)
	f.Add([]byte{1, 'k', 0, 0, 0, 0, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, row []byte) {
		entries, err := parseRow(row, nil, nil)
		if err != nil {
			require.ErrorIs(t, err, errRow)
			return
		}
		size := 0
		for _, e := range entries {
			size += len(e.Key) + len(e.Value) + 8 + 2
		}
		require.LessOrEqual(t, size, len(row))
	})
}
