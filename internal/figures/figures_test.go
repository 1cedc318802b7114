package figures

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestRowsAreReplacedAndSorted(t *testing.T) {
	file := filepath.Join(t.TempDir(), "LONGRUNS.md")
	row := func(name, text string) Row {
		return Row{name, "go test ./" + name, "2026-11-25", "2 cores, linux/amd64", text}
	}
	for _, r := range []Row{row("b", "1"), row("c", "first"), row("a", "with | and\na line"),
		row("c", "second"), row("b b", "2")} {
		require.NoError(t, Write(file, r))
	}
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	want := preface + header + "" +
		"| a | `go test ./a` | 2026-11-25 | 2 cores, linux/amd64 | with \\| and a line |\n" +
		"| b | `go test ./b` | 2026-11-25 | 2 cores, linux/amd64 | 1 |\n" +
		"| b b | `go test ./b b` | 2026-11-25 | 2 cores, linux/amd64 | 2 |\n" +
		"| c | `go test ./c` | 2026-11-25 | 2 cores, linux/amd64 | second |\n"
	require.Equal(t, want, string(content))

	require.NoError(t, os.WriteFile(file, []byte(want+"\nText after the table.\n"), 0o644))
	require.NoError(t, Write(file, row("c", "second")))
	content, err = os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, want+"\nText after the table.\n", string(content))
	entries, err := os.ReadDir(filepath.Dir(file))
	require.NoError(t, err)
	require.Len(t, entries, 1, "no lock remains")
}

// Writers at the same time lose no row.
func TestConcurrentWriters(t *testing.T) {
	file := filepath.Join(t.TempDir(), "LONGRUNS.md")
	const writers, each = 8, 10
	var wg sync.WaitGroup
	errs := make(chan error, writers*each)
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				errs <- Write(file, Row{Name: fmt.Sprintf("run %d of %d", i, w)})
			}
		})
	}
	wg.Wait()
	for range writers * each {
		require.NoError(t, <-errs)
	}
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, writers*each, strings.Count(string(content), "| run ")-1)
}

// A file that is not the expected one stays as it is, and a failed write releases the lock.
func TestWriteRefusesAnotherFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "README.md")
	require.NoError(t, os.WriteFile(file, []byte("# Another file\n"), 0o644))
	for range 2 {
		require.ErrorContains(t, Write(file, Row{Name: "a"}), "the file has no table")
	}
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, "# Another file\n", string(content))
}

func TestCommand(t *testing.T) {
	for want, args := range map[string][]string{
		"go test ./keystore -run 'Linearizable$' -rounds 20000 -timeout 0": {
			"-test.paniconexit0", "-test.run=Linearizable$", "-rounds=20000", "-test.timeout=0s",
		},
		"go test ./keystore -count 20 -v": {
			"-test.testlogfile=/tmp/log", "-test.timeout=10m0s", "-test.count=20", "-test.v=true",
			"-figures=benchmarks/LONGRUNS.md",
		},
		"go test ./keystore -run Kill -cycles 1000": {
			"-test.run=Kill", "-figures", "benchmarks/LONGRUNS.md", "-cycles", "1000",
		},
	} {
		require.Equal(t, want, Command("keystore", args, false))
	}
	require.Equal(t, "go test -race ./keystore", Command("keystore", nil, true))
}

// A test records its figures in the file that the flag names, also if the package is of a module of
// its own.
func TestRecord(t *testing.T) {
	dir := t.TempDir()
	for _, file := range []string{"LICENSE", "go.mod", "some/package/x.go", "own/go.mod"} {
		file = filepath.Join(dir, file)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, nil, 0o644))
	}
	defer func(before string) { *path = before }(*path)
	*path = "LONGRUNS.md"
	t.Chdir(filepath.Join(dir, "some/package"))
	Record(t, "%d rounds", 7)
	t.Chdir(filepath.Join(dir, "own"))
	Record(t, "%d rounds", 8)
	content, err := os.ReadFile(filepath.Join(dir, "LONGRUNS.md"))
	require.NoError(t, err)
	require.Regexp(t, `(?m)^\| some/package TestRecord \| .go test .*\./some/package.* \| 7 rounds`,
		string(content))
	require.Regexp(t, `(?m)^\| own TestRecord \| .cd own && GOWORK=off go test.* \| 8 rounds`,
		string(content))
}

// The file of the repository has the form that Write expects, and sorted rows.
func TestFileOfTheRepository(t *testing.T) {
	content, err := os.ReadFile(filepath.Join("../..", File))
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "LONGRUNS.md")
	require.NoError(t, os.WriteFile(file, content, 0o644))
	last := Row{"zzz", "true", "2026-11-25", "2 cores, linux/amd64", "nothing"}
	require.NoError(t, Write(file, last))
	written, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(content)+
		"| zzz | `true` | 2026-11-25 | 2 cores, linux/amd64 | nothing |\n", string(written))
}
