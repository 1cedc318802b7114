package work

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
)

// BeforeIndexes is the last commit in which the store had no index. Env.Before has this commit by
// default.
const BeforeIndexes = "c4e38afccd0d"

// The before workload compares the creates of this version with the creates of an earlier version.
// The workload builds the program benchmarks/before with both versions: the go command adds the
// program to the source of each version, with the option -overlay. git keeps the source of the
// earlier version. The two processes take turns.
var beforeWork = Workload{
	Name:  "before",
	Title: "Creates before and after the indexes",
	About: "One process with this version and one process with the last version without indexes " +
		"(option `-before`) take turns. 64 writers write as fast as possible. The processor time " +
		"is the user and system time of the whole process.",
	Goals: []Goal{
		{
			ID: "creates-before", Work: "creates a second with indexes / before",
			Bound: atLeast(0.85, Times),
		},
		{
			ID: "creates-cpu-before", Work: "processor time of a create with indexes / before",
			Bound: atMost(0.75, Times),
		},
	},
}

func init() { beforeWork.Run = runBefore }

// errNoSource means that the source of the earlier version is not available.
var errNoSource = errors.New("the source of the earlier version is not available")

// A version is a running process of benchmarks/before.
type version struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	cpu []float64 // nanoseconds of processor time of each create
}

// startVersion builds benchmarks/before in a copy of the root module, and starts the program.
func startVersion(ctx context.Context, dir, module, program, name string) (*version, error) {
	overlay, err := json.Marshal(map[string]map[string]string{
		"Replace": {filepath.Join(module, "benchmark_before", "main.go"): program},
	})
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, name+".json")
	if err := os.WriteFile(config, overlay, 0o600); err != nil {
		return nil, err
	}
	binary := filepath.Join(dir, name)
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-overlay", config,
		"-o", binary, "./benchmark_before")
	build.Dir = module
	build.Env = append(os.Environ(), "GOWORK=off")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the version %s: %w: %s", name, err, out)
	}
	v := &version{cmd: exec.CommandContext(ctx, binary, filepath.Join(dir, name+".store"))}
	v.cmd.Stderr = os.Stderr
	if v.in, err = v.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	v.out = bufio.NewReader(out)
	return v, v.cmd.Start()
}

// create runs one turn, and returns the creates per second.
func (v *version) create(turn time.Duration) (float64, error) {
	if _, err := fmt.Fprintln(v.in, durableWriters, turn.Milliseconds()); err != nil {
		return 0, err
	}
	text, err := v.out.ReadString('\n')
	if err != nil {
		return 0, err
	}
	var keys, seconds, cpu float64
	if _, err := fmt.Sscan(text, &keys, &seconds, &cpu); err != nil {
		return 0, err
	}
	v.cpu = append(v.cpu, cpu/keys)
	return keys / seconds, nil
}

// Close ends the process.
func (v *version) Close() error { return errors.Join(v.in.Close(), v.cmd.Wait()) }

// earlier writes the source of a commit to a directory.
func earlier(ctx context.Context, module, commit, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	archive := to + ".tar"
	for _, args := range [][]string{
		{"git", "-C", module, "archive", "--format=tar", "-o", archive, commit},
		{"tar", "-xf", archive, "-C", to},
	} {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s %s: %w: %s", errNoSource, args[0], commit, err,
				strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// sources returns the directory of the root module, and the path of the program benchmarks/before.
func sources(ctx context.Context) (module, program string, err error) {
	list := exec.CommandContext(ctx, "go", "list", "-f", "{{.Module.Dir}}",
		"github.com/grpc-api-key/grpc-api-key/keystore",
		"github.com/grpc-api-key/grpc-api-key/benchmarks/before")
	list.Env = append(os.Environ(), "GOWORK=off")
	out, err := list.Output()
	if err != nil {
		return "", "", fmt.Errorf("%w: go list: %w", errNoSource, err)
	}
	lines := strings.Fields(string(out))
	if len(lines) != 2 {
		return "", "", fmt.Errorf("%w: go list returned %d directories", errNoSource, len(lines))
	}
	return lines[0], filepath.Join(lines[1], "before", "main.go"), nil
}

func runBefore(ctx context.Context, e *Env) (o *Outcome, err error) {
	const now, before = "with indexes", "before"
	o = &Outcome{}
	skip := func(err error) (*Outcome, error) {
		for _, g := range beforeWork.Goals {
			o.skip(&beforeWork, g.ID, err.Error())
		}
		return o, nil
	}
	if _, err := processCPU(); err != nil {
		return skip(err)
	}
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	commit := e.Before
	if commit == "" {
		commit = BeforeIndexes
	}
	old := filepath.Join(dir, "source")
	module, program, err := sources(ctx)
	if err == nil {
		err = earlier(ctx, module, commit, old)
	}
	if errors.Is(err, errNoSource) {
		return skip(err)
	}
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	versions := make(map[string]*version)
	var contestants []measure.Contestant
	turn := e.turn(500 * time.Millisecond)
	for name, source := range map[string]string{now: module, before: old} {
		v, err := startVersion(ctx, dir, source, program, strings.ReplaceAll(name, " ", "-"))
		if err != nil {
			return nil, err
		}
		end.add(v.Close)
		versions[name] = v
		contestants = append(contestants, measure.Contestant{
			Name: name, Sample: func(context.Context) (float64, error) { return v.create(turn) },
		})
	}
	s, err := measure.Rounds(ctx, e.rounds(60), e.progress("creating before and after"),
		contestants...)
	if err != nil {
		return nil, err
	}
	after, earlier := versions[now].cpu[1:], versions[before].cpu[1:] // without the warm-up
	o.judge(&beforeWork, "creates-before", measure.Ratios(s[now], s[before]))
	o.judge(&beforeWork, "creates-cpu-before", measure.Ratios(after, earlier))
	for _, name := range []string{now, before} {
		o.figure("creates, "+name, Rate, s[name])
		o.figure("processor time of a create, "+name, Nanos, versions[name].cpu[1:])
	}
	o.note("The version before is commit %s.", commit)
	return o, nil
}
