package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/work"
)

// A fact is one property of the machine or of the software that the figures depend on.
type fact struct{ what, is string }

// describe returns the properties of the machine and the versions of the software. describe omits
// properties that the system does not report.
func describe(dir string) (facts []fact) {
	add := func(what, is string) {
		if is = strings.TrimSpace(is); is != "" {
			facts = append(facts, fact{what, is})
		}
	}
	add("processor", fieldOf("/proc/cpuinfo", "model name"))
	add("cores", fmt.Sprintf("%d, GOMAXPROCS %d", runtime.NumCPU(), runtime.GOMAXPROCS(0)))
	add("memory", memoryOf())
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	add("system", fmt.Sprintf("%s/%s %s",
		runtime.GOOS, runtime.GOARCH, strings.TrimSpace(string(release))))
	add("load before", loadOf())
	add("file system", fileSystemOf(dir))
	add("sync of 4 KiB", syncOf(dir))
	add("Go", runtime.Version())
	add("grpc-api-key", commitOf())
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, path := range []string{
			"google.golang.org/grpc", "github.com/dgraph-io/badger/v4", "github.com/hashicorp/golang-lru/v2",
			"github.com/golang-jwt/jwt/v5", "github.com/grpc-ecosystem/go-grpc-middleware/v2",
			"github.com/redis/go-redis/v9", "github.com/jackc/pgx/v5", "go.etcd.io/etcd/server/v3",
		} {
			for _, m := range info.Deps {
				if m.Path == path {
					add(path, m.Version)
				}
			}
		}
	}
	add("Redis", peers.RedisVersion())
	add("PostgreSQL", peers.PostgreSQLVersion())
	return facts
}

// fieldOf returns the value of the first line "name: value" of a file in /proc.
func fieldOf(path, name string) string {
	text, _ := os.ReadFile(path)
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return value
		}
	}
	return ""
}

func memoryOf() string {
	var kilobytes float64
	if _, err := fmt.Sscan(fieldOf("/proc/meminfo", "MemTotal"), &kilobytes); err != nil {
		return ""
	}
	return work.Bytes.Format(kilobytes * 1024)
}

// loadOf returns the load average, which shows whether other programs were running.
func loadOf() string {
	text, _ := os.ReadFile("/proc/loadavg")
	if fields := strings.Fields(string(text)); len(fields) > 0 {
		return fields[0] + " (average of a minute)"
	}
	return ""
}

// fileSystemOf returns the type of the file system of dir. The file system is the one with the
// longest mount point above dir.
func fileSystemOf(dir string) string {
	text, _ := os.ReadFile("/proc/self/mounts")
	longest, kind := "", ""
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		rel, err := filepath.Rel(f[1], dir)
		if err == nil && rel != ".." && !strings.HasPrefix(rel, "../") && len(f[1]) >= len(longest) {
			longest, kind = f[1], f[2]
		}
	}
	return kind
}

// syncOf measures the duration of a sync, which every durable write waits for.
func syncOf(dir string) string {
	f, err := os.Create(filepath.Join(dir, "sync"))
	if err != nil {
		return ""
	}
	defer f.Close()
	var took []float64
	for range 50 {
		begin := time.Now()
		if _, err := f.Write(make([]byte, 4096)); err != nil {
			return ""
		}
		if err := f.Sync(); err != nil {
			return ""
		}
		took = append(took, float64(time.Since(begin).Nanoseconds()))
	}
	return fmt.Sprintf("%s (median of %d)", work.Nanos.Format(measure.Median(took)), len(took))
}

// commitOf returns the commit of the measured source, or "" outside of a git repository.
func commitOf() string {
	git := func(args ...string) string {
		out, err := exec.Command("git", args...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	commit := git("rev-parse", "--short=12", "HEAD")
	if commit == "" {
		return ""
	}
	// The files that this command writes do not count as changes.
	written := regexp.MustCompile(`benchmarks/(etcd/)?(RESULTS\.md|charts/)`)
	lines := strings.Split(git("status", "--porcelain"), "\n")
	changed := slices.DeleteFunc(lines, func(line string) bool {
		return line == "" || written.MatchString(line)
	})
	if len(changed) > 0 {
		commit += ", with changes"
	}
	return "commit " + commit
}
