// Package figures writes the results of long test runs into one Markdown file. A test calls
// [Record] at its end. Give the test binary the flag -figures to choose the file:
//
//	go test ./internal/crashtest -run Kill -cycles 1000 -timeout 0 -figures benchmarks/LONGRUNS.md
//
// Only tests, and the command internal/figures/fuzz, import this package.
package figures

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// File is the file of the repository that holds the figures, relative to the root, which is the
// directory with the file LICENSE.
const File = "benchmarks/LONGRUNS.md"

var path = flag.String("figures", "",
	"the Markdown file that gets the figures of this run, relative to the root of the repository, "+
		"such as "+File+"; if empty, the figures are only logged")

// A Row is the last run of one test.
type Row struct {
	Name    string // what was run; each name has one row
	Command string // the command that repeats the run
	Date    string // of the end of the run, such as 2026-11-25
	Machine string // the machine of the run, such as "2 cores, linux/amd64"
	Figures string // what the run found
}

// Record logs the figures of a test. If the flag -figures is set, Record also writes the row of the
// test into the file. A row that the file already has for the test is replaced. Call Record when
// the test has passed: a test that has failed writes nothing. If a test calls Record several times
// in one process, as with -count, the last call counts.
func Record(t testing.TB, format string, args ...any) {
	t.Helper()
	RecordAs(t, t.Name(), format, args...)
}

// RecordAs is Record for a row that several tests or subtests share.
func RecordAs(t testing.TB, name, format string, args ...any) {
	t.Helper()
	text := fmt.Sprintf(format, args...)
	t.Log(text)
	if *path == "" || t.Failed() {
		return
	}
	if err := record(name, text); err != nil {
		t.Errorf("the figures of the run are not written: %v", err)
	}
}

// record writes a row for the package in the working directory. The package may be of a module of
// its own inside the repository.
func record(test, text string) error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	module, err := findUp(dir, "go.mod")
	if err != nil {
		return err
	}
	root, err := findUp(module, "LICENSE")
	if err != nil {
		return err
	}
	file := *path
	if !filepath.IsAbs(file) {
		file = filepath.Join(root, file)
	}
	within := func(base string) string {
		rel, err := filepath.Rel(base, dir)
		if err != nil {
			return dir // impossible: dir is below base
		}
		return filepath.ToSlash(rel)
	}
	command := Command(within(module), os.Args[1:], raceEnabled())
	if own, err := filepath.Rel(root, module); err == nil && own != "." {
		command = "cd " + filepath.ToSlash(own) + " && GOWORK=off " + command
	}
	return Write(file, NewRow(within(root)+" "+test, command, text))
}

// NewRow returns a row with the present date and machine.
func NewRow(name, command, text string) Row {
	return Row{
		Name:    name,
		Command: command,
		Date:    time.Now().UTC().Format(time.DateOnly),
		Machine: fmt.Sprintf("%d cores, %s/%s", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH),
		Figures: text,
	}
}

// findUp returns the first directory that has a file with the name: dir, or one above it.
func findUp(dir, name string) (string, error) {
	for at := dir; ; at = filepath.Dir(at) {
		_, err := os.Stat(filepath.Join(at, name))
		if err == nil {
			return at, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if at == filepath.Dir(at) {
			return "", fmt.Errorf("neither %s nor a directory above it has a file %s", dir, name)
		}
	}
}

// raceEnabled reports whether the test was built with -race.
func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// Command returns the go command that started a test binary with the arguments.
func Command(pkg string, args []string, race bool) string {
	words := []string{"go", "test"}
	if race {
		words = append(words, "-race")
	}
	if pkg != "." {
		words = append(words, "./"+pkg)
	}
	for i := 0; i < len(args); i++ {
		name, value, hasValue := strings.Cut(strings.TrimLeft(args[i], "-"), "=")
		if test, ok := strings.CutPrefix(name, "test."); ok {
			switch name = test; name {
			case "paniconexit0", "testlogfile":
				continue // internal flags of the go command
			case "timeout":
				if value == (10 * time.Minute).String() {
					continue // the default
				}
				value = strings.TrimSuffix(value, "s")
			}
		}
		if name == "figures" {
			if !hasValue {
				i++ // the next argument is the value
			}
			continue
		}
		switch {
		case !strings.HasPrefix(args[i], "-"):
			words = append(words, quote(args[i]))
		case hasValue && value != "true":
			words = append(words, "-"+name, quote(value))
		default:
			words = append(words, "-"+name)
		}
	}
	return strings.Join(words, " ")
}

// quote quotes a word for a shell, if the word needs quotes.
func quote(word string) string {
	if word != "" && strings.Trim(word, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"+
		"0123456789-_./,:=+%@") == "" {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

const (
	preface = `# Long runs

The tests that prove the guarantees also run for hours. This file has the last long run of each. The
command in a row repeats the run. With ` + "`-figures " + File + "`" + `, the command also
replaces its row. So do not edit the rows. [CONTRIBUTING](../CONTRIBUTING.md) says which guarantee
each test proves.

`
	header = "| run | command | date | machine | figures |\n|---|---|---|---|---|\n"
)

// Write writes a row into the file, in place of the row with the same name. The rows stay sorted by
// name, and the text around the table stays unchanged. If the file does not exist, Write creates
// the file. Several processes may write at the same time.
func Write(file string, row Row) (err error) {
	next, err := lock(file)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(next.Name())
		}
	}()
	defer next.Close()
	content, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		content, err = []byte(preface+header), nil
	}
	if err != nil {
		return err
	}
	text, err := replace(string(content), row)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if _, err := next.WriteString(text); err != nil {
		return err
	}
	if err := next.Close(); err != nil {
		return err
	}
	return os.Rename(next.Name(), file) // also releases the lock
}

const (
	maxWait  = 10 * time.Second
	interval = 5 * time.Millisecond
)

var writers sync.Mutex // lets the writers of one process wait without polling

// lock creates the file with the next content. This file is also the lock: only one writer can
// create the file, and a rename or a removal releases the lock.
func lock(file string) (next *os.File, err error) {
	writers.Lock()
	defer writers.Unlock()
	name := file + ".next"
	for deadline := time.Now().Add(maxWait); ; time.Sleep(interval) {
		next, err = os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if !errors.Is(err, fs.ErrExist) {
			return next, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("%s exists for %v: "+
				"remove the file if no other run is writing: %w", name, maxWait, err)
		}
	}
}

// replace returns the text with the row in its table.
func replace(text string, row Row) (string, error) {
	before, table, ok := strings.Cut(text, header)
	if !ok {
		return "", fmt.Errorf("the file has no table with the header %q", header)
	}
	var rows []string
	for strings.HasPrefix(table, "|") {
		line, rest, _ := strings.Cut(table, "\n")
		table = rest
		if !strings.HasPrefix(line, "| "+cell(row.Name)+" |") {
			rows = append(rows, line)
		}
	}
	rows = append(rows, fmt.Sprintf("| %s | `%s` | %s | %s | %s |", cell(row.Name),
		cell(row.Command), cell(row.Date), cell(row.Machine), cell(row.Figures)))
	slices.SortFunc(rows, func(a, b string) int { return strings.Compare(name(a), name(b)) })
	return before + header + strings.Join(rows, "\n") + "\n" + table, nil
}

// name returns the first cell of a row.
func name(row string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(row, "| "), " |")
	return name
}

// cell returns a text for a cell of a table: on one line, with escaped bars.
func cell(text string) string {
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", `\|`)
}
