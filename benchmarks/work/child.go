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

// An opening contains the cost of one Open in a separate process. The figures of memory are
// differences to the memory of the process before Open.
type opening struct {
	Open, Checksum                          float64 // nanoseconds
	Goroutines                              float64
	Heap                                    float64 // bytes, after a garbage collection
	AnonOpen, AnonFull, AnonSettled, Mapped float64 // bytes
	Apparent                                float64 // bytes on disk
}

// childEnv is the environment variable that makes a process a child. The value is the name of the
// work of the child. dirEnv is the variable with the directory for the work.
const (
	childEnv = "GRPC_API_KEY_BENCHMARK_CHILD"
	dirEnv   = "GRPC_API_KEY_BENCHMARK_DIR"
)

// MaybeChild must be the first call in every program that runs the workloads. In a child process,
// MaybeChild does the work of the child and does not return.
func MaybeChild() {
	work := map[string]func(dir string) error{
		"open": open, "serve": serve, "etcd": runEtcd,
	}[os.Getenv(childEnv)]
	if work == nil {
		return
	}
	if err := work(os.Getenv(dirEnv)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// openInChild starts this program again as a child. The child opens the directory and verifies the
// tokens.
func openInChild(ctx context.Context, dir string, tokens []string) (*opening, error) {
	cmd, err := childCommand(ctx, "open", dir)
	if err != nil {
		return nil, err
	}
	cmd.Stdin = strings.NewReader(strings.Join(tokens, "\n"))
	var out, failure bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &failure
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("the child process failed: %w: %s", err, failure.String())
	}
	o := new(opening)
	return o, json.Unmarshal(out.Bytes(), o)
}

// childCommand returns the command that starts this program again, for the given work.
func childCommand(ctx context.Context, work, dir string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), childEnv+"="+work, dirEnv+"="+dir)
	return cmd, nil
}

// open opens a store and reports the costs.
func open(dir string) error {
	var tokens []string
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		tokens = append(tokens, in.Text())
	}
	var o opening
	for range 2 { // the first pass loads the files into the page cache
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
	now, _ := memory()
	o.AnonOpen = now - anon
	o.Heap = settledHeap() - heap
	// by now, the first work in the background has ended
	o.Goroutines = float64(runtime.NumGoroutine() - goroutines)
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

// settledHeap runs a garbage collection, returns free memory to the operating system, and returns
// the number of bytes in use on the heap.
func settledHeap() float64 {
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc)
}

// memory returns the resident memory of this process in bytes: the anonymous memory, and the memory
// that is mapped from files. memory returns 0 on systems that do not report these figures.
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

// checksumTables computes the checksums of all tables, with the algorithm of Badger.
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
				break // the end of the file
			}
		}
		f.Close()
	}
	return nil
}

// diskOf returns the sum of the sizes of all files in a directory, and the disk space that is
// allocated for the files.
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
