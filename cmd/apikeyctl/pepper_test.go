//go:build unix

package main

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A server with a pepper, and one that has changed its pepper, admit the keys that apikeyctl makes
// with their peppers in the directory. Without the right peppers, apikeyctl makes no key.
func TestPepperOfADirectory(t *testing.T) {
	w := newWorld(t)
	pepper := func(id string) ([]byte, hashing.Hasher) {
		secret := bytes.Repeat([]byte(id), 8)
		w.write(id, base64.StdEncoding.EncodeToString(secret)+"\n")
		w.write(id+".raw", string(secret))
		h, err := hashing.HMACSHA256(id, secret)
		require.NoError(t, err)
		return secret, h
	}
	_, old := pepper("2026")
	_, now := pepper("2027")
	both, err := hashing.Keyring(now, old)
	require.NoError(t, err)
	// admits requires that a server with the Hasher admits the keys in the files.
	admits := func(h hashing.Hasher, files ...string) {
		t.Helper()
		w.open(&keystore.Options{Hasher: h})
		for _, file := range files {
			_, err := w.store.Verify(t.Context(), strings.TrimSpace(w.read(file)))
			require.NoError(t, err, file)
		}
		require.NoError(t, w.store.Close())
	}
	ctl := func(args ...string) result { return w.ctl(append([]string{"--dir", "keys"}, args...)...) }
	made := func(r result) {
		t.Helper()
		require.Zero(t, r.code, r.stderr)
	}

	made(ctl("--pepper-file", "2026=2026", "create", "--name", "a", "--out", "a.key"))
	admits(old, "a.key")
	made(ctl("create", "--pepper-file", "2026=raw:2026.raw", "--name", "b", "--out", "b.key"))
	admits(old, "b.key")
	made(ctl("list"))

	// Another pepper, another ID, and no pepper. The server would not know the key.
	for _, args := range [][]string{
		{}, {"--pepper-file", "2027=2027"}, {"--pepper-file", "sha256"},
	} {
		for _, command := range [][]string{
			{"create", "--name", "c", "--out", "c.key"}, {"lookup", "--file", "a.key"},
			{"rotate", shownIDs[0], "--out", "c.key"},
		} {
			r := ctl(append(args, command...)...)
			require.Equal(t, exitUsage, r.code)
			require.Contains(t, r.stderr, "the store in keys has 2 digests of a pepper that is not given")
			require.NoFileExists(t, filepath.Join(w.dir, "c.key"))
		}
	}
	r := ctl("--pepper-file", "2026=2027", "list")
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.stderr, "were made with another pepper of the same ID")

	// The server changes its pepper.
	made(ctl("--pepper-file", "2027=2027", "--pepper-file", "2026=2026", "create", "--name", "c",
		"--out", "c.key"))
	w.env = append(w.env, "APIKEYCTL_PEPPER_FILE=2027=2027,2026=2026")
	made(ctl("create", "--name", "d", "--out", "d.key"))
	r = ctl("lookup", "--file", "a.key")
	made(r)
	require.Regexp(t, `Admitted +yes`, r.stdout)
	admits(both, "a.key", "b.key", "c.key", "d.key")
}

// The digests of other systems say nothing about the pepper of the server. Digests without a pepper
// do, so apikeyctl asks whether the server takes them.
func TestPepperAfterAnImport(t *testing.T) {
	for _, tt := range []struct{ system, file string }{
		{"drf", "drf-3.1.0.csv"}, {"drf", "drf-2.3.0.csv"}, {"flask-api-key", "flask-api-key.csv"},
		{"sanctum", "sanctum.csv"},
	} {
		t.Run(tt.file, func(t *testing.T) {
			w := newWorld(t)
			export, err := os.ReadFile("../../keystore/importer/testdata/" + tt.file)
			require.NoError(t, err)
			w.write("export", string(export))
			for _, id := range []string{"2026", "2027"} {
				w.write(id, base64.StdEncoding.EncodeToString(bytes.Repeat([]byte(id), 8)))
			}
			ctl := func(args ...string) result {
				return w.ctl(append([]string{"--dir", "keys"}, args...)...)
			}
			ctl("import", "--from", tt.system, "export")
			create := []string{"create", "--name", "a"}
			if tt.system == "sanctum" {
				r := ctl(append(create, "--pepper-file", "2026=2026")...)
				require.Equal(t, exitUsage, r.code)
				require.Contains(t, r.stderr, "the store in keys has 5 digests without a pepper")
				require.Contains(t, r.stderr, "--pepper-file sha256")
				create = append(create, "--pepper-file", "2026=2026", "--pepper-file", "sha256")
			} else {
				create = append(create, "--pepper-file", "2026=2026")
			}
			r := ctl(create...)
			require.Zero(t, r.code, r.stderr)
			for _, args := range [][]string{
				{}, {"--pepper-file", "2027=2027"},
				{"--pepper-file", "2027=2027", "--pepper-file", "sha256"},
			} {
				r := ctl(append(args, "create", "--name", "b")...)
				require.Equal(t, exitUsage, r.code)
				require.Contains(t, r.stderr, "1 digest of a pepper that is not given")
			}
		})
	}
}

// No failure repeats what may be the pepper.
func TestBadPepperFiles(t *testing.T) {
	w := newWorld(t)
	const secret = "c2VjcmV0IHNlY3JldCBzZWNyZXQ"
	w.write("text", secret+"!")
	w.write("short", "c2hvcnQ=")
	w.write("same", base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32)))
	w.write("other", base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{2}, 32)))
	for _, tt := range []struct {
		values []string
		text   string
	}{
		{[]string{secret}, "write ID=FILE"},
		{[]string{"2026="}, "write ID=FILE"},
		{[]string{"2026=" + secret}, "the file of the pepper 2026 cannot be read: no such file"},
		{[]string{"2026=."}, "the file of the pepper 2026 cannot be read: is a directory"},
		{[]string{secret + "/=" + secret}, "the ID before the = cannot be used"},
		{[]string{"2026=text"}, "the file of the pepper 2026 does not hold base64"},
		{[]string{"2026=short"}, "the pepper 2026 has 5 bytes"},
		{[]string{"2026=same", "2026=other"}, "two files with the same ID hold different peppers"},
	} {
		args := []string{"--dir", "keys", "create", "--name", "x"}
		for _, value := range tt.values {
			args = append(args, "--pepper-file", value)
		}
		r := w.ctl(args...)
		require.Equal(t, exitUsage, r.code)
		require.Contains(t, r.stderr, tt.text)
		require.NotContains(t, r.stdout+r.stderr, secret)
		require.NoDirExists(t, filepath.Join(w.dir, "keys"))
	}
	r := w.ctl("--socket", "x", "--pepper-file", "2026=same", "list")
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.stderr, "--pepper-file goes with --dir")
}
