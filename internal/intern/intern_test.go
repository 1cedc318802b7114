package intern

import (
	"fmt"
	"math/rand/v2"
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
	often := n.Intern(strings.Clone("often"))
	early := n.Intern(strings.Clone("early"))
	for i := range 10 * Max {
		require.Equal(t, fmt.Sprint(i), n.Intern(fmt.Sprint(i)))
		require.LessOrEqual(t, n.shared.Len(), Max)
		if i%(Max/4) == 0 {
			require.True(t, same(often, n.Intern(strings.Clone("often"))), "used strings stay")
		}
	}
	require.Greater(t, n.shared.Len(), Max/2)
	late := n.Intern(strings.Clone("late"))
	require.True(t, same(late, n.Intern(strings.Clone("late"))), "new strings are shared")
	again := n.Intern(strings.Clone("early"))
	require.False(t, same(early, again), "the Interner has forgotten the string")
	require.True(t, same(again, n.Intern(strings.Clone("early"))))
}

// Random uses of a Recent: no entry is wrong, the number of entries is limited, and an entry is
// there if fewer than Max/2 other names were used since.
func TestRecent(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var r Recent[int]
	last := make(map[string]int) // the step of the last use of each name
	for step := range 20 * Max {
		n := random.IntN(Max)
		if random.IntN(2) == 0 {
			n = random.IntN(Max / 4)
		}
		name := fmt.Sprint(n)
		v, ok := r.Get(name)
		if ok {
			require.Equal(t, n, v)
		} else {
			r.Put(name, n)
		}
		if at, used := last[name]; used && step-at < Max/2 {
			require.True(t, ok)
		}
		last[name] = step
		require.LessOrEqual(t, r.Len(), Max)
		if v, ok = r.Get(name); !ok || v != n {
			require.FailNow(t, "the entry that was used last is gone")
		}
	}
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
