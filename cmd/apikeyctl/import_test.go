//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

// openImported opens the store of a world as the server of a team that has imported keys does.
func (w *world) openImported(system string) {
	w.t.Helper()
	from, ok := importer.Named(system)
	require.True(w.t, ok)
	h, err := hashing.Keyring(hashing.SHA256(), hashing.SHA512(), hashing.PBKDF2SHA256())
	require.NoError(w.t, err)
	w.open(&keystore.Options{Hasher: h, Legacy: from.Formats(), MustExist: true})
}

// Each export of the testdata of package importer is imported, and its tokens work. Nothing that
// apikeyctl prints has a token, or a digest.
func TestImport(t *testing.T) {
	for _, tt := range []struct {
		system, file string
		code         int
		say          string
	}{
		{"unkey", "unkey.csv", 0, "8 keys of 8 rows, 0 were there before, 0 refused"},
		{"better-auth", "better-auth.jsonl", 0, "5 keys of 5 rows, 0 were there before, 0 refused"},
		{"sanctum", "sanctum.csv", 1, "5 keys of 6 rows, 0 were there before, 1 refused (1 spec)"},
		{"drf", "drf-3.1.0.csv", 0, "5 keys of 5 rows, 0 were there before, 0 refused"},
		{"flask-api-key", "flask-api-key.csv", 0, "3 keys of 3 rows, 0 were there before, 0 refused"},
		{"kong", "kong.yaml", 1, "3 keys of 4 rows, 0 were there before, 1 refused (1 weak)"},
		{"plain", "plain.jsonl", 1,
			"3 keys of 6 rows, 0 were there before, 3 refused (1 digest, 2 unreadable)"},
	} {
		w := newWorld(t)
		data := "../../keystore/importer/testdata/"
		export, err := os.ReadFile(data + tt.file)
		require.NoError(t, err)
		w.write("export", string(export))
		run := func(args ...string) result {
			return w.ctl(append([]string{"--dir", "keys", "import", "--from", tt.system, "export"},
				args...)...)
		}
		dry := run("--dry-run")
		require.Equal(t, tt.code, dry.code, dry.stderr)
		require.Equal(t, "would import "+tt.say+"\n", dry.stdout)
		_, err = os.Stat(filepath.Join(w.dir, "keys"))
		require.ErrorIs(t, err, os.ErrNotExist, "a dry run makes no store")
		first := run()
		require.Equal(t, tt.code, first.code, first.stderr)
		require.Equal(t, "imported "+tt.say+"\n", first.stdout)
		for _, r := range []result{dry, first} { // the exports of two systems have one such key
			require.Equal(t, tt.system == "unkey" || tt.system == "better-auth",
				strings.Contains(r.stderr, "1 key with credits: "), r.stderr)
		}
		again := run("-o", "json")
		var got imported
		require.NoError(t, json.Unmarshal([]byte(again.stdout), &got), again.stdout)
		require.Zero(t, got.Imported)

		tokens, err := os.ReadFile(data + strings.TrimSuffix(tt.file, filepath.Ext(tt.file)) + ".tokens")
		require.NoError(t, err)
		line, _, _ := strings.Cut(string(tokens), "\n")
		_, oldToken, _ := strings.Cut(line, " ")
		looked := w.ctlIn(oldToken, "--dir", "keys", "lookup")
		if tt.system != "flask-api-key" {
			require.Zero(t, looked.code, looked.stderr)
			require.Regexp(t, "Admitted +yes", looked.stdout)
		} else {
			require.Contains(t, looked.stderr, "The text names the key 0000000000")
		}
		w.openImported(tt.system)
		for line := range strings.Lines(string(tokens)) {
			word, token, _ := strings.Cut(strings.TrimSpace(line), " ")
			for _, printed := range []string{dry.stderr, first.stderr, again.stderr} {
				require.NotContains(t, printed, token)
			}
			if tt.system != "flask-api-key" { // whose hasher is another module
				_, err := w.store.Verify(t.Context(), token)
				require.Equal(t, word == "admitted", err == nil, "%v", err)
			}
		}
		for _, stored := range strings.FieldsFunc(string(export),
			func(c rune) bool { return strings.ContainsRune(" \n,\"", c) }) {
			if len(stored) > 30 {
				require.NotContains(t, first.stdout+first.stderr+dry.stderr+again.stderr, stored)
			}
		}
		for e, err := range w.store.Events(t.Context(), keystore.EventQuery{Limit: 1}) {
			require.NoError(t, err)
			require.Equal(t, keystore.ActionImport, e.Action)
			require.Regexp(t, `^unix:.*\d`, e.Actor)
		}
	}
}

// The file of another system gets one line, which says what to do.
func TestImportOfAnotherSystem(t *testing.T) {
	w := newWorld(t)
	w.write("export", "prefix,hashed_key\nabcdefgh,x\nabcdefgi,x\n")
	r := w.ctl("--dir", "keys", "import", "--from", "sanctum", "export")
	require.Equal(t, exitUsage, r.code)
	require.Empty(t, r.stdout)
	require.Equal(t, "apikeyctl: cannot read the export: the first line names no column token, "+
		"which an export of sanctum has: is it the file of another system, or are the columns not "+
		"separated by commas?\n", r.stderr)
}

func TestImportRefusesArguments(t *testing.T) {
	w := newWorld(t)
	w.write("export", "token\n"+strings.Repeat("s", 40)+"\n")
	for _, args := range [][]string{
		{"--dir", "keys", "import", "export"},
		{"--dir", "keys", "import", "--from", "nobody", "export"},
		{"--dir", "keys", "import", "--from", "plain"},
		{"--dir", "keys", "import", "--from", "plain", "missing"},
		{"--socket", "s", "import", "--from", "plain", "export"},
	} {
		r := w.ctl(args...)
		require.Equal(t, exitUsage, r.code, r.stderr)
		_, err := os.Stat(filepath.Join(w.dir, "keys"))
		require.ErrorIs(t, err, os.ErrNotExist)
	}
}

// An import that is killed continues where it was: the rows of the first run are there, and the
// second run imports the others, although the order of the rows is another.
func TestKillInTheMiddleOfImport(t *testing.T) {
	w := newWorld(t)
	const rows = 140_000
	row := func(i int) string { return fmt.Sprintf("token-of-the-row-%08d,acme\n", i) }
	var all bytes.Buffer
	all.WriteString("token,owner\n")
	for i := range rows {
		all.WriteString(row(i))
	}
	cmd := w.command("--dir", "keys", "import", "--from", "plain", "-")
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	// A pipe holds 64 KiB, so most of this part is read when the write returns. Import writes
	// 65,536 rows while it reads as many, and then waits. So the first 65,536 rows are imported,
	// and the next are being imported.
	part := bytes.LastIndexByte(all.Bytes()[:all.Len()*39/40], '\n') + 1
	_, err = in.Write(all.Bytes()[:part])
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Kill())
	require.ErrorContains(t, cmd.Wait(), "signal: killed")

	w.openImported("plain")
	there, err := w.store.Count(t.Context(), keystore.Query{Owner: "acme"})
	require.NoError(t, err)
	require.NoError(t, w.store.CheckIntegrity(t.Context()))
	require.NoError(t, w.store.Close())
	require.GreaterOrEqual(t, there, 1<<16)
	require.Less(t, there, rows)

	all.Reset()
	all.WriteString("token,owner\n")
	for i := range rows {
		all.WriteString(row(rows - 1 - i))
	}
	r := w.ctlIn(all.String(), "--dir", "keys", "import", "--from", "plain", "-", "-o", "json")
	require.Zero(t, r.code, r.stderr)
	var got imported
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &got))
	require.Equal(t, imported{Rows: rows, Imported: rows - there, Unchanged: there,
		Problems: map[string]int{}}, got)
	w.openImported("plain")
	n, err := w.store.Count(t.Context(), keystore.Query{Owner: "acme"})
	require.NoError(t, err)
	require.Equal(t, rows, n)
	for i := 0; i < rows; i += 97 {
		_, err := w.store.Verify(t.Context(), strings.TrimSuffix(row(i), ",acme\n"))
		require.NoError(t, err)
	}
	require.NoError(t, w.store.CheckIntegrity(t.Context()))
}
