package crashtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var corruptions = flag.Int("corruptions", 50, "the number of damaged directories to open")

// A file is the content of a file. Pages of zeros are omitted, because the files of Badger consist
// mostly of zeros.
type file struct {
	size  int64
	pages map[int64][]byte // the pages that are not zero, by number; the last page may be short
}

const page = 4096

func readFile(path string) (*file, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f := &file{size: int64(len(text)), pages: make(map[int64][]byte)}
	zero := make([]byte, page)
	n := int64(0)
	for p := range slices.Chunk(text, page) {
		if !bytes.Equal(p, zero[:len(p)]) {
			f.pages[n] = bytes.Clone(p)
		}
		n++
	}
	return f, nil
}

func (f *file) write(path string) (err error) {
	to, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	for n, p := range f.pages {
		if _, err := to.WriteAt(p, n*page); err != nil {
			return err
		}
	}
	return to.Truncate(f.size)
}

func (f *file) clone() *file {
	c := &file{size: f.size, pages: make(map[int64][]byte)}
	for n, p := range f.pages {
		c.pages[n] = bytes.Clone(p)
	}
	return c
}

func (f *file) equal(g *file) bool {
	if f == nil || g == nil || f.size != g.size || len(f.pages) != len(g.pages) {
		return false
	}
	for n, p := range f.pages {
		if !bytes.Equal(p, g.pages[n]) {
			return false
		}
	}
	return true
}

// clear sets the bytes in [from, to) to zero.
func (f *file) clear(from, to int64) {
	for n := from / page; n*page < to; n++ {
		p, ok := f.pages[n]
		if !ok {
			continue
		}
		clear(p[max(from-n*page, 0):min(to-n*page, int64(len(p)))])
		if bytes.Equal(p, make([]byte, len(p))) {
			delete(f.pages, n)
		}
	}
}

func (f *file) flip(bit int64) {
	n, at := bit/8/page, bit/8%page
	p, ok := f.pages[n]
	if !ok {
		p = make([]byte, min(page, f.size-n*page))
		f.pages[n] = p
	}
	p[at] ^= 1 << (bit % 8)
}

func (f *file) truncate(size int64) {
	f.clear(size, f.size)
	f.size = size
	if p, ok := f.pages[size/page]; ok {
		f.pages[size/page] = p[:size%page]
	}
}

// place returns a random offset: mostly in a page that is not zero, or just after such a page.
func (f *file) place(random *rand.Rand) int64 {
	if len(f.pages) == 0 || random.IntN(8) == 0 {
		return random.Int64N(max(f.size, 1))
	}
	numbers := make([]int64, 0, len(f.pages))
	for n := range f.pages {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	n := numbers[random.IntN(len(numbers))]
	return min(n*page+random.Int64N(page+64), f.size-1)
}

// A picture is the content of a directory at one point in time.
type picture map[string]*file

// photograph returns a picture of a directory. A process may work on the directory at the same
// time: photograph omits files that are deleted during the call.
func photograph(t *testing.T, dir string) picture {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	p := make(picture)
	for _, e := range entries {
		f, err := readFile(filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		require.NoError(t, err)
		p[e.Name()] = f
	}
	return p
}

func (p picture) names() []string {
	names := make([]string, 0, len(p))
	for name := range p {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (p picture) develop(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, f := range p {
		if err := f.write(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// A specimen is a directory to be damaged, with the expected content and earlier pictures of the
// directory.
type specimen struct {
	name    string
	now     picture
	earlier []picture
	oracle  string // the path of the oracle, for a judge
}

// specimens returns directories in several states: closed once; closed after several lives, each of
// which leaves a table; killed at rest; and killed in the middle of a change.
func specimens(t *testing.T) []*specimen {
	t.Helper()
	dir, notes := t.TempDir(), t.TempDir()
	o := newOracle()
	var all []*specimen
	var album []picture
	take := func(name string) {
		s := &specimen{name: name, now: photograph(t, dir), earlier: slices.Clone(album)}
		s.oracle = filepath.Join(notes, strconv.Itoa(len(all)))
		o.write(t, s.oracle)
		all = append(all, s)
		album = append(album, s.now)
	}
	live := func(changes int) *process {
		p := start(t, "worker", dir)
		p.order("%d", changes)
		for line, ok := p.line(); ; line, ok = p.line() {
			require.True(t, ok, "%s", p.stderr)
			if line == "idle" {
				return p
			}
			o.hear(line)
			if changes--; changes%40 == 0 {
				album = append(album, photograph(t, dir))
			}
		}
	}
	end := func(p *process) {
		p.order("close")
		line, _ := p.line()
		require.Equal(t, "closed", line, "%s", p.stderr)
		require.NoError(t, p.cmd.Wait())
	}
	end(live(60))
	take("closed once")
	for range 3 {
		end(live(80))
	}
	take("closed, several tables")
	live(120).kill(t, o)
	take("killed at rest")
	live(50).kill(t, o) // this process has recovered a log
	p := live(30)
	p.order("1000000")
	for range 60 {
		line, ok := p.line()
		require.True(t, ok, "%s", p.stderr)
		o.hear(line)
	}
	p.kill(t, o)
	take("killed at work")
	return all
}

// worker makes the ordered number of changes, and then reports "idle". After an order without a
// number, worker closes the store.
func worker(dir string) error {
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	var mine []keystore.Key
	for key, err := range store.List(context.Background(), keystore.Query{}) {
		if err != nil {
			return err
		}
		mine = append(mine, *key)
	}
	for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
		var left int
		if _, err := fmt.Sscan(orders.Text(), &left); err != nil {
			if err := store.Close(); err != nil {
				return err
			}
			report("closed")
			return nil
		}
		mine, err = write(store, mine, func() bool { left--; return left >= 0 })
		if err != nil {
			return err
		}
		report("idle")
	}
	return nil
}

// The outcomes of opening a damaged directory. The store guarantees one of the first two outcomes.
const (
	refused = "refused" // Open, or a read of damaged data, returns ErrCorrupt or another error
	intact  = "intact"  // all data is present
	silent  = "SILENT"  // the store gives a wrong answer
	died    = "DIED"    // the process dies
)

// judge opens the ordered directories, and reports the outcome in one line:
//
//	OUTCOME how the outcome was detected
//
// judge opens an intact directory twice, and writes to the store in between, because the store
// detects some damage only in the work that Open starts.
//
// If the order has a third word, judge recovers a refused directory instead; see salvage.
func judge(string) error {
	for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
		words := strings.Fields(orders.Text())
		o, err := readOracle(words[1])
		if err != nil {
			return err
		}
		if len(words) > 2 {
			outcome, how := salvage(words[0], o)
			report("%s %s", outcome, how)
			continue
		}
		outcome, how := examine(words[0], o)
		if outcome == intact {
			if outcome, how = examine(words[0], o); outcome != intact {
				how = "in the second examination: " + how
			}
		}
		report("%s %s", outcome, how)
	}
	return nil
}

func examine(dir string, o *oracle) (outcome, how string) {
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return refused, "Open: " + describe(err)
	}
	defer func() {
		if err := store.Close(); err != nil && outcome == intact {
			outcome, how = refused, "Close: "+describe(err)
		}
	}()
	ctx := context.Background()
	err, eventsErr := o.check(ctx, store, o.ids(), false), checkEvents(ctx, store)
	for _, err := range []error{err, eventsErr} { // a wrong answer is worse than any error
		if w := new(wrong); errors.As(err, &w) {
			return silent, err.Error()
		}
	}
	if err := errors.Join(err, eventsErr, store.CheckIntegrity(ctx)); err != nil {
		return refused, "read: " + describe(err)
	}
	issued, err := store.Create(ctx, keystore.Spec{Name: "a later one"})
	if err == nil {
		err = store.Revoke(ctx, issued.Key.ID, "")
	}
	if err != nil {
		return refused, "write: " + describe(err)
	}
	return intact, ""
}

// Further outcomes of a recovery. The store has reported all lost data, except if the outcome is
// silent.
const (
	whole = "whole" // all data is present
	part  = "part"  // some data is lost
)

// salvage opens a refused directory with Options.Recover.
func salvage(dir string, o *oracle) (outcome, how string) {
	var lost error
	store, err := keystore.Open(dir, &keystore.Options{Recover: func(err error) { lost = err }})
	if err != nil {
		return refused, "Open: " + describe(err)
	}
	defer func() {
		if err := store.Close(); err != nil {
			outcome, how = refused, "Close: "+describe(err)
		}
	}()
	ctx := context.Background()
	err = o.check(ctx, store, o.ids(), false)
	switch {
	case err == nil:
		outcome = whole
	case lost == nil:
		return silent, err.Error()
	default:
		outcome = part
	}
	if err := store.CheckIntegrity(ctx); err != nil {
		return refused, "CheckIntegrity: " + describe(err)
	}
	if _, err := store.Create(ctx, keystore.Spec{Name: "afterwards"}); err != nil {
		return refused, "write: " + describe(err)
	}
	return outcome, describe(lost)
}

var damages = []string{"flip", "page", "range", "truncate", "delete", "older"}

// harm returns a damaged copy of the file, or nil if the damage deletes the file. harm returns
// false if the damage would change nothing.
func harm(random *rand.Rand, s *specimen, name, kind string) (f *file, what string, ok bool) {
	was := s.now[name]
	f = was.clone()
	switch kind {
	case "flip":
		if f.size == 0 {
			return nil, "", false
		}
		bit := f.place(random)*8 + random.Int64N(8)
		f.flip(bit)
		what = fmt.Sprintf("bit %d of byte %d", bit%8, bit/8)
	case "page":
		n := f.place(random) / page
		f.clear(n*page, min((n+1)*page, f.size))
		what = fmt.Sprintf("page %d", n)
	case "range":
		from := f.place(random)
		to := min(from+1+random.Int64N(1<<random.IntN(16)), f.size)
		f.clear(from, to)
		what = fmt.Sprintf("bytes %d to %d", from, to)
	case "truncate":
		if f.size == 0 {
			return nil, "", false
		}
		to := f.place(random)
		if random.IntN(8) == 0 {
			to = 0
		}
		f.truncate(to)
		what = fmt.Sprintf("to %d bytes", to)
	case "delete":
		return nil, "", true
	case "older":
		n := random.IntN(len(s.earlier) + 1)
		if n == len(s.earlier) || s.earlier[n][name] == nil {
			return nil, "", false
		}
		f = s.earlier[n][name]
		what = fmt.Sprintf("of picture %d", n)
	}
	return f, what, !f.equal(was)
}

// kindOf returns the kind of a file: the extension of the name, or the whole name if there is no
// extension.
func kindOf(name string) string {
	if ext := filepath.Ext(name); ext != "" {
		return "*" + ext
	}
	return name
}

// Each case damages one file of a copy of a directory. Then the store must refuse the directory, or
// have every acknowledged change. The store must never give a wrong answer, and the process must
// never die. If the store refuses a directory, the store must not change the directory: once the
// original file is back, all data must be present. Options.Recover must open a refused directory
// and report lost data. The test finds the files of a directory with ReadDir, so the test also
// covers files that a later version of the store adds.
func TestCorruption(t *testing.T) {
	random := seeded(t)
	all := specimens(t)
	type cell struct{ file, damage string }
	table := make(map[cell]map[string]int)
	totals := make(map[string]int)
	spoiled := 0 // the number of refused directories that the original file does not repair
	recoveries := make(map[string]int)
	var bad []string
	court := new(court)
	bench := memoryDir(t)
	began := time.Now()
	try := func(s *specimen, name, kind string) bool {
		f, what, ok := harm(random, s, name, kind)
		if !ok {
			return false
		}
		dir := filepath.Join(bench, "store")
		damaged := make(picture)
		for n, f := range s.now {
			damaged[n] = f
		}
		if damaged[name] = f; f == nil {
			delete(damaged, name)
		}
		require.NoError(t, damaged.develop(dir))
		outcome, how := court.judge(t, dir, s.oracle, "")
		c := cell{kindOf(name), kind}
		if table[c] == nil {
			table[c] = make(map[string]int)
		}
		table[c][outcome]++
		totals[outcome]++
		story := fmt.Sprintf("%s: %s of %s %s: %s: %s", s.name, kind, name, what, outcome, how)
		switch {
		case outcome == silent, outcome == died:
			bad = append(bad, story)
		case outcome == refused && strings.HasPrefix(how, "Open:"):
			again := filepath.Join(bench, "again")
			require.NoError(t, damaged.develop(again))
			recovered, lost := court.judge(t, again, s.oracle, "recover")
			recoveries[recovered]++
			switch recovered {
			case silent, died, refused:
				bad = append(bad, fmt.Sprintf("%s; recovered: %s %s", story, recovered, lost))
			}
			require.NoError(t, s.now[name].write(filepath.Join(dir, name)))
			if again, why := court.judge(t, dir, s.oracle, ""); again != intact {
				spoiled++
				t.Logf("the original file does not repair the directory: %s; then %s %s",
					story, again, why)
			}
		}
		require.NoError(t, os.RemoveAll(dir))
		return true
	}
	done := 0
	// First the damage with few variants, in at most half of the cases: delete each file of each
	// specimen, and replace each file by an older version if there is one.
	for _, s := range all {
		for _, name := range s.now.names() {
			for _, kind := range []string{"delete", "older"} {
				for range 10 {
					if done < *corruptions/2 && try(s, name, kind) {
						done++
						break
					}
				}
			}
		}
	}
	for done < *corruptions {
		s := all[random.IntN(len(all))]
		names := s.now.names()
		if try(s, names[random.IntN(len(names))], damages[random.IntN(len(damages))]) {
			done++
		}
	}
	court.close(t)

	var text strings.Builder
	cells := make([]cell, 0, len(table))
	for c := range table {
		cells = append(cells, c)
	}
	slices.SortFunc(cells, func(a, b cell) int {
		return strings.Compare(a.file+"\x00"+a.damage, b.file+"\x00"+b.damage)
	})
	fmt.Fprintf(&text, "%-16s %-9s %8s %8s %8s %8s\n", "file", "damage", refused, intact, silent,
		died)
	for _, c := range cells {
		r := table[c]
		fmt.Fprintf(&text, "%-16s %-9s %8d %8d %8d %8d\n",
			c.file, c.damage, r[refused], r[intact], r[silent], r[died])
	}
	fmt.Fprintf(&text, "%-16s %-9s %8d %8d %8d %8d\n",
		"all", "", totals[refused], totals[intact], totals[silent], totals[died])
	t.Logf("%d refused directories that the original file does not repair; recovered: %v\n%s",
		spoiled, recoveries, &text)
	require.Positive(t, totals[refused], "the store has detected no damage")
	require.Zero(t, spoiled)
	slices.Sort(bad)
	require.Zero(t, len(bad), "%d of %d cases:\n%s",
		len(bad), done, strings.Join(bad[:min(len(bad), 40)], "\n"))
	figures.Record(t, "%d damaged directories: %d refused, %d intact, %d silent, %d dead; "+
		"%.0f ms for each", done, totals[refused], totals[intact], totals[silent], totals[died],
		float64(time.Since(began).Milliseconds())/float64(done))
}

// memoryDir returns a temporary directory, in memory if possible: these tests need no disk, and a
// sync of a disk is slow.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "crashtest")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// A court is a judge process. If the judge dies, the court starts a new judge.
type court struct{ sitting *process }

func (c *court) judge(t *testing.T, dir, oracle, how string) (outcome, text string) {
	t.Helper()
	if c.sitting == nil {
		c.sitting = start(t, "judge", dir)
	}
	c.sitting.order("%s %s %s", dir, oracle, how)
	line, ok := c.sitting.line()
	if !ok {
		err := c.sitting.cmd.Wait()
		reason, _, _ := strings.Cut(c.sitting.stderr.String(), "\n")
		c.sitting = nil
		return died, fmt.Sprintf("%v: %s", err, reason)
	}
	outcome, text, _ = strings.Cut(line, " ")
	return outcome, text
}

func (c *court) close(t *testing.T) {
	if c.sitting != nil {
		require.NoError(t, c.sitting.in.Close())
		require.NoError(t, c.sitting.cmd.Wait())
	}
}
