package work

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An opening is what it took to open a store once, in a process of its own. Memory is what the process has more than before
// the store was opened.
type opening struct {
	Open, Checksum                          float64 // nanoseconds
	Goroutines                              float64
	Heap                                    float64 // bytes, after a collection
	AnonOpen, AnonFull, AnonSettled, Mapped float64 // bytes
	Apparent                                float64 // bytes on disk
}

// childEnv makes a process a child: it names the directory.
const childEnv = "GRPC_API_KEY_BENCHMARK_OPEN"

// MaybeChild must be called first by every program that runs the workloads. In a child it does what a child has to, and does
// not return.
func MaybeChild() {
	dir := os.Getenv(childEnv)
	if dir == "" {
		return
	}
	if err := child(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// openInChild starts this program again, to open the directory and use the tokens.
func openInChild(ctx context.Context, dir string, tokens []string) (*opening, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	cmd.Stdin = strings.NewReader(strings.Join(tokens, "\n"))
	var out, told bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &told
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("a child: %w: %s", err, told.String())
	}
	o := new(opening)
	return o, json.Unmarshal(out.Bytes(), o)
}

func child(dir string) error {
	var tokens []string
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		tokens = append(tokens, in.Text())
	}
	var o opening
	for range 2 { // the first one brings the files into the page cache
		begin := time.Now()
		if err := checksumTables(dir); err != nil {
			return err
		}
		o.Checksum = float64(time.Since(begin).Nanoseconds())
	}
	goroutines, heap := runtime.NumGoroutine(), settledHeap()
	anon, mapped := memory()

	begin := time.Now()
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	o.Open = float64(time.Since(begin).Nanoseconds())
	o.Goroutines = float64(runtime.NumGoroutine() - goroutines)
	now, _ := memory()
	o.AnonOpen = now - anon
	o.Heap = settledHeap() - heap
	for _, text := range tokens {
		if _, err := store.Verify(context.Background(), text); err != nil {
			return err
		}
	}
	now, mappedNow := memory()
	o.AnonFull, o.Mapped = now-anon, mappedNow-mapped
	settledHeap()
	now, _ = memory()
	o.AnonSettled = now - anon
	apparent, _, err := diskOf(dir)
	if err != nil {
		return err
	}
	o.Apparent = float64(apparent)
	runtime.KeepAlive(tokens)
	if err := store.Close(); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(o)
}

// settledHeap returns the bytes of the heap that are in use, and gives the operating system back what is not.
func settledHeap() float64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// memory returns the bytes of this process that are in memory: anonymous ones, and those that are mapped from files. They are
// 0 where the system does not say.
func memory() (anonymous, mapped float64) {
	text, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		return 0, 0
	}
	field := func(name string) float64 {
		_, rest, _ := strings.Cut(string(text), "\n"+name+":")
		kilobytes, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		n, _ := strconv.ParseFloat(kilobytes, 64)
		return n * 1024
	}
	anonymous = field("Anonymous")
	return anonymous, field("Rss") - anonymous
}

// checksumTables computes the checksum that Badger uses over all that is in the tables.
func checksumTables(dir string) error {
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil {
		return err
	}
	castagnoli := crc32.MakeTable(crc32.Castagnoli)
	buf := make([]byte, 1<<20)
	for _, path := range tables {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		for {
			n, err := f.Read(buf)
			crc32.Checksum(buf[:n], castagnoli)
			if err != nil {
				break // the end
			}
		}
		f.Close()
	}
	return nil
}

// diskOf returns what the files of a directory seem to take, and what is allocated for them.
func diskOf(dir string) (apparent, allocated int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		apparent += info.Size()
		allocated += blocks(info)
		return nil
	})
	return apparent, allocated, err
}
