package intern

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// same reports whether two strings are one copy in memory.
func same(a, b string) bool { return a == b && unsafe.StringData(a) == unsafe.StringData(b) }

func TestEqualStringsBecomeOne(t *testing.T) {
	var n Interner
	owner := n.Intern(strings.Clone("team"))
	require.True(t, same(owner, n.Intern(strings.Clone("team"))))
	require.False(t, same(owner, strings.Clone("team")), "the test can tell two copies apart")

	a := []string{strings.Clone("read"), strings.Clone("write"), strings.Clone("team")}
	b := []string{strings.Clone("write"), strings.Clone("read")}
	n.InternAll(a)
	n.InternAll(b)
	require.Equal(t, []string{"read", "write", "team"}, a)
	require.True(t, same(a[0], b[1]))
	require.True(t, same(a[1], b[0]))
	require.True(t, same(a[2], owner))

	n.InternAll(nil)
	require.Empty(t, n.Intern(""))
}

// No number of strings makes an Interner grow beyond the limit.
func TestTheNumberOfStringsIsLimited(t *testing.T) {
	var n Interner
	early := n.Intern(strings.Clone("early"))
	for i := range 2 * maxStrings {
		require.Equal(t, fmt.Sprint(i), n.Intern(fmt.Sprint(i)))
	}
	require.Len(t, n.shared, maxStrings)
	require.Equal(t, "late", n.Intern("late"))
	require.NotContains(t, n.shared, "late")
	require.True(t, same(early, n.Intern(strings.Clone("early"))), "kept strings stay")
}

func TestAStringThatIsKeptCostsNoAllocation(t *testing.T) {
	var n Interner
	all := []string{"read", "write"}
	n.InternAll(all)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		n.InternAll(all)
		n.Intern("read")
	}))
}

func TestManyCallersAtTheSameTime(t *testing.T) {
	var n Interner
	const callers = 8
	var all [callers][]string
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range 1000 {
				all[c] = append(all[c], fmt.Sprint(i))
			}
			n.InternAll(all[c])
		})
	}
	wg.Wait()
	for c := range callers {
		for i := range 1000 {
			require.True(t, same(all[0][i], all[c][i]))
		}
	}
}
