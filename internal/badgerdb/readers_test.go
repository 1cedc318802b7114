package badgerdb

import (
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// total returns how many readers are counted.
func (r *readers) total() int64 { return r.counts[0].n.Load() + r.counts[1].n.Load() }

// A world is the readers, and what the committer and two readers do with them, step by step.
type world struct {
	r       readers
	durable uint64
	discard uint64    // Badger's discard timestamp
	at      [2]uint64 // what each reader reads at
	epoch   [2]uint64
	ready   bool // drained has returned true
}

const notReading = math.MaxUint64

// The steps of a reader, of which each is atomic, and the steps of the committer; and wrong ones.
var (
	load  = func(w *world, i int) { w.epoch[i] = w.r.current.Load() }
	count = func(w *world, i int) { w.r.count(w.epoch[i]) }
	look  = func(w *world, i int) { w.at[i] = w.durable }
	leave = func(w *world, i int) { w.at[i] = notReading; w.r.leave(w.epoch[i]) }

	commit  = func(w *world, _ int) { w.durable++ }
	drained = func(w *world, _ int) { w.ready = w.r.drained() }
	begin   = func(w *world, _ int) {
		if w.ready {
			w.discard = w.r.begin(w.durable)
		}
	}
	beginAhead = func(w *world, _ int) {
		if w.ready {
			w.discard = w.durable
			w.r.begin(w.durable)
		}
	}
	beginAlways = func(w *world, _ int) { w.discard = w.r.begin(w.durable) }

	reader    = []func(*world, int){load, count, look, leave}
	committer = []func(*world, int){commit, drained, begin}
)

func repeat(steps []func(*world, int), times int) (all []func(*world, int)) {
	for range times {
		all = append(all, steps...)
	}
	return all
}

// explore takes every order of the steps of the readers, one or two, and the committer. It returns
// how many orders there are, how many drop a version that is being read, and how many move the
// discard timestamp.
func explore(
	readers [2][]func(*world, int), committer []func(*world, int),
) (orders, wrong, moved int) {
	actors := [][]func(*world, int){readers[0], readers[1], committer}
	var walk func(order []int, taken [3]int)
	walk = func(order []int, taken [3]int) {
		over := true
		for actor := range actors {
			if taken[actor] < len(actors[actor]) {
				over = false
				next := taken
				next[actor]++
				walk(append(order, actor), next)
			}
		}
		if !over {
			return
		}
		w := &world{at: [2]uint64{notReading, notReading}}
		var step [3]int
		dropped := false
		for _, actor := range order {
			actors[actor][step[actor]](w, actor)
			step[actor]++
			dropped = dropped || w.discard > slices.Min(w.at[:])
		}
		orders++
		if dropped {
			wrong++
		}
		if w.discard > 0 {
			moved++
		}
	}
	walk(make([]int, 0, 32), [3]int{})
	return orders, wrong, moved
}

// In every order of the steps of readers and the committer, the discard timestamp does not pass
// what a reader reads. Wrong steps are caught.
func TestReadersInterleavings(t *testing.T) {
	type steps = []func(*world, int)
	for _, c := range []struct {
		readers [2]steps
		turns   int
	}{{[2]steps{reader}, 6}, {[2]steps{reader, reader}, 2}} {
		orders, wrong, moved := explore(c.readers, repeat(committer, c.turns))
		t.Logf("%d orders, %d of them move the discard timestamp", orders, moved)
		require.Zero(t, wrong)
		require.Positive(t, moved)
	}
	for name, v := range map[string]struct{ reader, committer steps }{
		"a reader looks before it is counted": {steps{load, look, count, leave}, committer},
		"a reader is not counted": {
			steps{load, look, func(w *world, i int) { w.at[i] = notReading }}, committer,
		},
		"it moves to the floor of the new epoch":   {reader, steps{commit, drained, beginAhead}},
		"an epoch begins while readers are left":   {reader, steps{commit, drained, beginAlways}},
		"a commit comes between drained and begin": {reader, steps{drained, commit, begin}},
	} {
		_, wrong, _ := explore([2]steps{v.reader}, repeat(v.committer, 4))
		require.Positive(t, wrong, "not caught: %s", name)
	}
}

// Old versions are dropped though there is a reader at every moment: each reader ends only after
// the next has begun. What a snapshot shows is there until its end.
func TestOldVersionsAreDroppedUnderReaders(t *testing.T) {
	db, err := Open(t.TempDir(), Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	const keys = 16
	revision := uint64(0)
	write := func() {
		t.Helper()
		for range discardEvery {
			var changes []backend.Change
			for n := range keys {
				changes = append(changes, change(fmt.Sprintf("k%02d", n),
					strings.Repeat(fmt.Sprintf("%08d", revision+1), 64), revision))
			}
			require.NoError(t, db.Apply(t.Context(), changes...))
			revision++
		}
	}
	type snapshot struct {
		next func() (backend.Entry, error, bool)
		stop func()
		at   uint64
	}
	open := func() snapshot {
		t.Helper()
		next, stop := iter.Pull2(db.Snapshot(t.Context(), nil, nil))
		_, err, ok := next()
		require.True(t, ok)
		require.NoError(t, err)
		return snapshot{next, stop, revision}
	}
	end := func(s snapshot) {
		t.Helper()
		n := 1
		for e, err, ok := s.next(); ok; e, err, ok = s.next() {
			require.NoError(t, err)
			require.Equal(t, s.at, e.Revision, "what there was when the snapshot began")
			n++
		}
		require.Equal(t, keys, n)
		s.stop()
	}
	write()
	last := open()
	const rounds = 12
	for range rounds {
		write()
		next := open()
		end(last)
		last = next
		require.Positive(t, db.readers.total())
	}
	require.NoError(t, db.badger.Flatten(1))
	written := (rounds + 1) * discardEvery * keys
	t.Logf("%d versions of %d are there", versions(t, db), written)
	require.Less(t, versions(t, db), written/2)
	end(last)
}
