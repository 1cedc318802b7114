package backend

import (
	"bytes"
	"fmt"
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// The errors say which rule the changes break. The conformance suite of package backendtest tests
// the rules.
func TestCheckChanges(t *testing.T) {
	key, long := []byte("k"), func(n int) []byte { return bytes.Repeat([]byte{'x'}, n) }
	many := func(n int, value []byte) (changes []Change) {
		for i := range n {
			changes = append(changes, Change{Key: fmt.Append(nil, i), Value: value})
		}
		return changes
	}
	write := Change{Key: []byte("w")}
	for _, tt := range []struct {
		changes []Change
		err     string // "" means that the changes are well-formed
		is      error
	}{
		{nil, "no changes to apply", nil},
		{many(MaxChanges, nil), "", nil},
		{many(MaxChanges+1, nil), "129 changes at once: at most 128 are allowed", ErrTooLarge},
		{many(5, long(MaxApplySize/5)), "changes of 131075 bytes at once", ErrTooLarge},
		{[]Change{{}}, "empty key", nil},
		{[]Change{{Key: long(MaxKeySize), Value: long(MaxValueSize)}}, "", nil},
		{[]Change{{Key: long(MaxKeySize + 1)}}, "a key of 257 bytes: at most 256", ErrTooLarge},
		{[]Change{{Key: key, Value: long(MaxValueSize + 1)}}, "a value of 32769 bytes",
			ErrTooLarge},
		{[]Change{{Key: key}, write, {Key: key}}, "two changes have the key 6b", nil},
		{append(many(100, nil), Change{Key: []byte("7")}), "two changes have the key 37", nil},
		{[]Change{{Key: key, Expect: 7}}, "", nil},
		{[]Change{{Key: key, Expect: 7, Revision: 8}}, "", nil},
		{[]Change{{Key: key, Expect: 7, Revision: 7}},
			"the revision of 6b is to become 7: it must be greater than 7", nil},
		{[]Change{{Key: key, Expect: math.MaxUint64}}, "the revision of 6b is to become 0", nil},
		{[]Change{{Key: key, Expect: 1, Delete: true}}, "", nil},
		{[]Change{{Key: key, Delete: true}}, "the deletion of 6b has", nil},
		{[]Change{{Key: key, Expect: 1, Revision: 2, Delete: true}}, "the deletion of 6b has", nil},
		{[]Change{{Key: key, Expect: 1, Value: key, Delete: true}}, "the deletion of 6b has", nil},
		{[]Change{{Key: key, Check: true}, write}, "", nil},
		{[]Change{write, {Key: key, Expect: math.MaxUint64, Check: true}}, "", nil},
		{[]Change{{Key: key, Check: true}}, "all changes have Check", nil},
		{[]Change{{Key: key, Expect: 1, Check: true}, {Key: long(2), Check: true}},
			"all changes have Check", nil},
		{[]Change{write, {Key: key, Check: true}, {Key: key}}, "two changes have the key 6b", nil},
		{[]Change{write, {Key: key, Check: true, Value: key}}, "the check of 6b has a value", nil},
		{[]Change{write, {Key: key, Check: true, Revision: 1}}, "the check of 6b has a value", nil},
		{[]Change{write, {Key: key, Check: true, Expect: 1, Delete: true}}, "the check of 6b has",
			nil},
	} {
		requireCheck(t, CheckChanges(tt.changes), tt.err, tt.is)
	}
}

func requireCheck(t *testing.T, err error, text string, is error) {
	t.Helper()
	if text == "" {
		require.NoError(t, err)
		return
	}
	require.ErrorContains(t, err, text)
	if is != nil {
		require.ErrorIs(t, err, is)
	} else {
		require.NotErrorIs(t, err, ErrTooLarge)
	}
}

func BenchmarkCheckChanges(b *testing.B) {
	for _, n := range []int{1, 4, 128} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			changes := make([]Change, n)
			for i := range changes {
				changes[i] = Change{Key: fmt.Appendf(nil, "k%016d", i), Value: make([]byte, 200)}
			}
			for b.Loop() {
				if err := CheckChanges(changes); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
