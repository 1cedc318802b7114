// Fuzz runs each fuzz target of the module for the same time, one after the other:
//
//	go run ./internal/figures/fuzz -time 1h -figures benchmarks/LONGRUNS.md
//
// Run fuzz in the root of the module. With -figures, fuzz writes a row for each target: the number
// of executions, and the failing input if there is one. The exit code is 1 if a target has failed.
package main

import (
	"bufio"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

// The package figures defines the flag -figures.
var (
	duration = flag.Duration("time", 30*time.Second, "the time for each target")
	only     = flag.String("only", "", "a regular expression: run only the targets that match")
)

func main() {
	flag.Parse()
	if err := run(flag.Lookup("figures").Value.String()); err != nil {
		fmt.Fprintln(os.Stderr, "fuzz:", err)
		os.Exit(1)
	}
}

func run(file string) error {
	match, err := regexp.Compile(*only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	targets, err := find(".")
	if err != nil {
		return err
	}
	var failed []string
	ran := 0
	for _, t := range targets {
		if !match.MatchString(t.name) {
			continue
		}
		ran++
		r, err := t.fuzz()
		if err != nil {
			failed = append(failed, t.pkg+" "+t.name)
			fmt.Fprintf(os.Stderr, "fuzz: %s %s: %v\n", t.pkg, t.name, err)
		}
		if file != "" && (err == nil || r.finding != "") {
			row := figures.NewRow(t.pkg+" "+t.name, t.command(), r.String())
			if err := figures.Write(file, row); err != nil {
				return err
			}
		}
	}
	switch {
	case ran == 0:
		return errors.New("no fuzz target was found: run the command in the root of the module")
	case len(failed) > 0:
		return fmt.Errorf("failed: %s", strings.Join(failed, ", "))
	}
	return nil
}

// A target is a fuzz test.
type target struct{ pkg, name string }

var declaration = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(\w+ \*testing\.F\)`)

// find returns the fuzz targets of the module in root, without those of the modules below.
func find(root string) (targets []target, err error) {
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			_, err := os.Stat(filepath.Join(path, "go.mod"))
			isModule := path != root && err == nil
			if name := d.Name(); isModule || name == "testdata" || path != root && name[0] == '.' {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		source, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		for _, d := range declaration.FindAllSubmatch(source, -1) {
			targets = append(targets, target{filepath.ToSlash(pkg), string(d[1])})
		}
		return nil
	})
	return targets, err
}

// args returns the arguments of the go command. Without a short time for the minimization of
// inputs, the large inputs of some targets are minimized for most of the time.
func (t target) args() []string {
	return []string{"test", "-run=^$", "-fuzz=^" + t.name + "$", "-fuzztime=" + duration.String(),
		"-fuzzminimizetime=5s", "./" + t.pkg}
}

// command returns the command for the row of the target.
func (t target) command() string {
	return fmt.Sprintf("go run ./internal/figures/fuzz -time %v -only '^%s$'", *duration, t.name)
}

// fuzz runs the target, and copies the output. The output of a run that was only late is left out,
// except for its progress: the output says FAIL.
func (t target) fuzz() (result, error) {
	cmd := exec.Command("go", t.args()...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return result{}, err
	}
	if err := cmd.Start(); err != nil {
		return result{}, err
	}
	var rest []string
	r, err := parse(out, func(line string) {
		if strings.HasPrefix(line, "fuzz: ") {
			fmt.Println(line)
		} else {
			rest = append(rest, line)
		}
	})
	failed := cmd.Wait()
	if failed != nil && r.late && r.finding == "" {
		fmt.Println("fuzz: the time has ended")
		return r, err
	}
	fmt.Println(strings.Join(rest, "\n"))
	return r, cmp.Or(failed, err)
}

// A result is what the output of go test says about a target.
type result struct {
	executions int
	finding    string // the file with the failing input; "" if no input fails
	// late says that go test ended with "context deadline exceeded". Before Go 1.27, go test may
	// report the end of the time so, as a failure without an input: golang/go#75804.
	late bool
}

func (r result) String() string {
	finding := "no finding"
	if r.finding != "" {
		finding = "finding: " + r.finding
	}
	return fmt.Sprintf("%s executions, %s", grouped(r.executions), finding)
}

var (
	progress = regexp.MustCompile(`^fuzz: elapsed: .*, execs: (\d+)`)
	failure  = regexp.MustCompile(`^\s*Failing input written to (\S+)`)
)

// parse reads the output of go test to its end, and gives each line to show.
func parse(output io.Reader, show func(line string)) (r result, err error) {
	lines := bufio.NewScanner(output)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		show(lines.Text())
		if m := progress.FindStringSubmatch(lines.Text()); m != nil {
			r.executions, _ = strconv.Atoi(m[1])
		}
		if m := failure.FindStringSubmatch(lines.Text()); m != nil {
			r.finding = m[1]
		}
		r.late = r.late || lines.Text() == "    context deadline exceeded"
	}
	return r, lines.Err()
}

// grouped returns n with a comma before each group of three digits.
func grouped(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
