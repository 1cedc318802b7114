package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const root = "../.."

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, path))
	require.NoError(t, err)
	return string(text)
}

// trimmed returns the lines without their indentation.
func trimmed(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "\n")
}

// Every piece of Go in the README stands, line for line, in an example that the compiler has seen.
// The first two pieces are whole programs, a server and a client.
func TestREADMEIsCompiled(t *testing.T) {
	readme := read(t, "README.md")
	var sources strings.Builder
	for _, pattern := range []string{
		"*/example_test.go", "*/*/example_test.go", "examples/*/*.go", "examples/*/*/*.go",
	} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		require.NoError(t, err)
		for _, f := range files {
			text, err := os.ReadFile(f)
			require.NoError(t, err)
			sources.WriteString(trimmed(string(text)) + "\n")
		}
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(readme, -1)
	require.GreaterOrEqual(t, len(blocks), 2)
	for _, b := range blocks {
		require.Contains(t, sources.String(), trimmed(b[1]),
			"no example has this code of the README")
	}

	server, client := blocks[0][1], blocks[1][1]
	require.Equal(t, read(t, "examples/hello/server/main.go"), server,
		"the README has the whole server")
	require.Equal(t, read(t, "examples/hello/client/main.go"), client,
		"the README has the whole client")
	_, main, _ := strings.Cut(server, "func main() {\n")
	main, _, _ = strings.Cut(main, "\n}\n")
	require.LessOrEqual(t, strings.Count(main, "\n")+1, 20,
		"a protected server takes 20 lines at most")
	before, _, _ := strings.Cut(readme, server)
	require.LessOrEqual(t, strings.Count(before, "\n"), 10, "the first code begins by line 10")
	require.LessOrEqual(t, strings.Count(readme, "\n"), 180, "the README has 180 lines at most")
}

// What the documents point to is there.
func TestLinksInDocuments(t *testing.T) {
	links := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, doc := range []string{
		"README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md",
	} {
		for _, link := range links.FindAllStringSubmatch(read(t, doc), -1) {
			_, err := os.Stat(filepath.Join(root, link[1]))
			require.NoError(t, err, "%s points to %s", doc, link[1])
		}
	}
}
