package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFind(t *testing.T) {
	root := t.TempDir()
	for path, content := range map[string]string{
		"go.mod":                 "module m",
		"a/a_test.go":            "package a\n\nfunc FuzzOne(f *testing.F) {}\n\nfunc TestA(",
		"a/a.go":                 "func FuzzNot(f *testing.F) {}\n",
		"b/c/c_test.go":          "func FuzzTwo(f *testing.F) {\n}\nfunc FuzzThree(g *testing.F) {",
		"d/go.mod":               "module d",
		"d/d_test.go":            "func FuzzOther(f *testing.F) {}\n",
		"a/testdata/x/x_test.go": "func FuzzData(f *testing.F) {}\n",
		".hidden/hidden_test.go": "func FuzzHidden(f *testing.F) {}\n",
	} {
		file := filepath.Join(root, path)
		require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o755))
		require.NoError(t, os.WriteFile(file, []byte(content), 0o644))
	}
	targets, err := find(root)
	require.NoError(t, err)
	require.Equal(t, []target{{"a", "FuzzOne"}, {"b/c", "FuzzTwo"}, {"b/c", "FuzzThree"}}, targets)
}

// The command finds the targets of this module. A new target appears without a list.
func TestFindOwnTargets(t *testing.T) {
	targets, err := find("../../..")
	require.NoError(t, err)
	require.Contains(t, targets, target{"internal/token", "FuzzParse"})
	require.Contains(t, targets, target{"interceptor", "FuzzCredential"})
}

func TestParse(t *testing.T) {
	for want, output := range map[string]string{
		"1,234,567 executions, no finding": `
fuzz: elapsed: 0s, gathering baseline coverage: 0/9 completed
fuzz: elapsed: 3s, execs: 12 (4/sec), new interesting: 3 (total: 20)
fuzz: elapsed: 6s, execs: 1234567 (0/sec), new interesting: 3 (total: 20)
PASS
`,
		"999 executions, finding: testdata/fuzz/FuzzParse/771e938e4458e983": `
fuzz: elapsed: 3s, execs: 999 (4/sec), new interesting: 3 (total: 20)
--- FAIL: FuzzParse (3.00s)
    Failing input written to testdata/fuzz/FuzzParse/771e938e4458e983
    To re-run:
FAIL
`,
		"0 executions, no finding": "",
	} {
		r, err := parse(strings.NewReader(output), func(string) {})
		require.NoError(t, err)
		require.Equal(t, want, r.String())
		require.False(t, r.late)
	}
	r, err := parse(strings.NewReader("fuzz: elapsed: 20s, execs: 7 (1/sec)\n"+
		"--- FAIL: FuzzParse (20.13s)\n    context deadline exceeded\nFAIL\n"),
		func(string) {})
	require.NoError(t, err)
	require.Equal(t, result{executions: 7, late: true}, r)
}
