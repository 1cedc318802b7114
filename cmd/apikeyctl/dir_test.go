//go:build unix

package main

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// A directory has no Options. The secrets that apikeyctl makes begin like the newest key of the
// server, or as --prefix says, and the server admits them.
func TestPrefixOfADirectory(t *testing.T) {
	w := newWorld(t)
	ctl := func(args ...string) string {
		t.Helper()
		r := w.ctl(append([]string{"--dir", "keys"}, args...)...)
		require.Zero(t, r.code, r.stderr)
		return strings.TrimSpace(r.stdout)
	}
	w.write("export", "token\n"+strings.Repeat("s", 40)+"\n")
	ctl("import", "--from", "plain", "export")
	require.Regexp(t, "^oil_", ctl("create", "--name", "a"), "the imported key tells nothing")
	w.open(&keystore.Options{Prefix: "acme_live"})
	keystoretest.MustCreate(t, w.store, keystore.Spec{})
	require.NoError(t, w.store.Close())
	b := ctl("create", "--name", "b")
	require.Regexp(t, "^acme_live_0", b)
	id := strings.Split(b, "_")[2]
	require.Regexp(t, "^acme_live_"+id, ctl("rotate", id))
	require.Regexp(t, "^corp_", ctl("create", "--name", "c", "--prefix", "corp"))
	require.Regexp(t, "^oil_", ctl("create", "--name", "d", "--prefix", "oil"))
	e := ctl("create", "--name", "e", "--prefix", "acme_live")
	w.open(nil)
	_, err := w.store.Verify(t.Context(), e)
	require.NoError(t, err)

	for _, args := range [][]string{
		{"--dir", "other", "--prefix", "_x", "create", "--name", "x"},
		{"--dir", "other", "--prefix", "", "create", "--name", "x"},
		{"--socket", "s", "--prefix", "x", "list"},
	} {
		r := w.ctl(args...)
		require.Equal(t, exitUsage, r.code)
		require.Contains(t, r.stderr, "--prefix")
		require.NoDirExists(t, filepath.Join(w.dir, "other"))
	}
}
