//go:build unix

package main

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var rewrite = flag.Bool("update", false, "write the transcripts in testdata anew")

// shownIDs are the IDs in transcripts. They stand for the keys of the store, in the order in which
// the test has made the keys, and then in the order in which commands print the IDs.
var shownIDs = []string{
	"01k9x3v7q2f8hr6m5w0c4tzbnd", "01k9x40q8nf7ksrv2ynfnwcjz6", "01k9x41c2tfmya8e0s2rjs5mqd",
	"01k9x42gdvfntbdbp1wcqhavnk", "01k9x43h5sf5grshjnxw90wqvd", "01k9x44mzbeyqr7m9y4q4rrkhn",
	"01k9x45pnpfpytzcc2kyt1r3vp", "01k9x46r3ef8y92pgg2gf6yt3s",
}

// What differs from run to run, and stands as a constant in transcripts.
var (
	anID     = regexp.MustCompile(`01[0-9a-hjkmnp-tv-z]{24}`)
	aSecret  = regexp.MustCompile(`oil_(01[0-9a-hjkmnp-tv-z]{24})_[0-9A-Za-z]{60,}`)
	constant = []struct {
		pattern *regexp.Regexp
		text    string
	}{
		{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`), "2026-12-01T09:00:00Z"},
		{regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\dZ`), "2026-12-01T09:00Z"},
		{regexp.MustCompile(`\b((\d+s|1m) ago|in \ds)\b`), "now"},
		{regexp.MustCompile(`\b1[789]\d{17}\b`), "1796115600000000000"},
		{regexp.MustCompile(`unix:[a-z]+\(\d+\)`), "unix:alice(1000)"},
		{regexp.MustCompile(`wrote \d+(\.\d)? (bytes|KiB)`), "wrote 1.5 KiB"},
		{regexp.MustCompile(`pid \d+ on host "[^"]+"`), `pid 4711 on host "db1"`},
		{regexp.MustCompile(`"bytes": ?\d+`), `"bytes": 1536`},
		{regexp.MustCompile(`(\S+), go1\.[0-9a-z.]+`), "v1.0.0, go1.26.0"},
	}
	spaces = regexp.MustCompile(` {2,}`)
)

// A transcript is what a person sees who types commands. Lines that begin with "$ " are commands;
// the lines after a command are its output, and "exit N" if the command does not succeed.
type transcript struct {
	world *world
	shell *shell
	ids   map[string]string // from the IDs that are shown to the IDs of the store
	shown map[string]string // the other way
}

func newTranscript(w *world) *transcript {
	tr := &transcript{w, newShell(w), make(map[string]string), make(map[string]string)}
	for _, id := range w.made {
		tr.masked(id)
	}
	return tr
}

// run runs the commands of a transcript, and returns the transcript with the true output.
func (tr *transcript) run(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		command, ok := strings.CutPrefix(strings.TrimSpace(line), "$ ")
		if !ok {
			continue
		}
		fmt.Fprintf(&out, "$ %s\n", command)
		if tr.open(command) {
			continue
		}
		for shown, id := range tr.ids {
			command = strings.ReplaceAll(command, shown, id)
		}
		output, code := tr.shell.run(command)
		out.WriteString(tr.masked(output))
		if code != 0 {
			fmt.Fprintf(&out, "exit %d\n", code)
		}
	}
	return out.String()
}

var clientLine = regexp.MustCompile(
	`^API_KEY=\$\(cat (\S+)\) go run \./examples/client -watch &$`)

// open opens a stream for a command that starts the client of the examples in the background. To
// build the client in a test would take long; the client makes the same call.
func (tr *transcript) open(command string) bool {
	m := clientLine.FindStringSubmatch(command)
	if m != nil {
		tr.world.stream(strings.TrimSpace(tr.world.read(m[1])))
	}
	return m != nil
}

// masked replaces what differs from run to run.
func (tr *transcript) masked(output string) string {
	output = anID.ReplaceAllStringFunc(output, func(id string) string {
		if slices.Contains(shownIDs, id) {
			return id // of no key
		}
		if tr.shown[id] == "" {
			require.Less(tr.world.t, len(tr.shown), len(shownIDs), "a transcript has many IDs")
			shown := shownIDs[len(tr.shown)]
			tr.ids[shown], tr.shown[id] = id, shown
		}
		return tr.shown[id]
	})
	output = aSecret.ReplaceAllString(output, "oil_${1}_8fKq…Zr0aB3xQ")
	for _, c := range constant {
		output = c.pattern.ReplaceAllString(output, c.text)
	}
	return strings.ReplaceAll(output, tr.world.dir, "…")
}

// same returns a transcript in a form in which the width of columns does not count.
func same(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		out.WriteString(strings.TrimRight(spaces.ReplaceAllString(line, "  "), " \n") + "\n")
	}
	return strings.TrimSpace(out.String())
}

// A shell is a shell that runs commands one by one.
type shell struct {
	t   *testing.T
	in  io.Writer
	out *bufio.Reader
}

func newShell(w *world) *shell {
	cmd := exec.CommandContext(w.t.Context(), "sh")
	cmd.Dir, cmd.Env = w.dir, w.env
	in, err := cmd.StdinPipe()
	require.NoError(w.t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(w.t, err)
	require.NoError(w.t, cmd.Start())
	w.t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	return &shell{w.t, in, bufio.NewReader(out)}
}

const endMark = "--end-of-output--"

// run runs a command, and returns its output and its exit code.
func (s *shell) run(command string) (string, int) {
	fmt.Fprintf(s.in, "{ %s\n} 2>&1 </dev/null; echo %s $?\n", command, endMark)
	var out strings.Builder
	for {
		line, err := s.out.ReadString('\n')
		require.NoError(s.t, err, "the shell has ended")
		if before, code, ok := strings.Cut(line, endMark); ok {
			n, err := strconv.Atoi(strings.TrimSpace(code))
			require.NoError(s.t, err)
			return out.String() + before, n
		}
		out.WriteString(line)
	}
}

// Each transcript in testdata is what its commands print. To write the transcripts anew, run
// go test ./cmd/apikeyctl -run Transcripts -update, and read the difference.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			got := newTranscript(startWorld(t)).run(string(text))
			if *rewrite {
				require.NoError(t, os.WriteFile(file, []byte(got), 0o644))
				return
			}
			require.Equal(t, same(string(text)), same(got))
		})
	}
}

// The transcripts of the README are what their commands print.
func TestREADME(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	blocks := transcripts(string(readme))
	if strings.Contains(string(readme), "apikeyctl") {
		require.NotEmpty(t, blocks, "the README shows apikeyctl")
	}
	tr := newTranscript(startWorld(t))
	for _, block := range blocks {
		require.Equal(t, same(block), same(tr.run(block)))
	}
}

var fenced = regexp.MustCompile("(?ms)^```\n(.*?)^```$")

// transcripts returns the blocks of a page that begin with a command.
func transcripts(page string) (blocks []string) {
	for _, block := range fenced.FindAllStringSubmatch(page, -1) {
		if strings.HasPrefix(block[1], "$ ") {
			blocks = append(blocks, block[1])
		}
	}
	return blocks
}
