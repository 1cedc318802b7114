package pgstore

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A user of the package links neither another engine nor the laboratory, and has no other engine in
// go.sum.
func TestImports(t *testing.T) {
	const own = "github.com/grpc-api-key/grpc-api-key/"
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	deps := strings.Fields(string(out))
	require.Contains(t, deps, "github.com/jackc/pgx/v5/pgxpool")
	for _, dep := range deps {
		for _, never := range []string{
			"go.etcd.io/", "github.com/dgraph-io/", "github.com/stretchr/", "google.golang.org/",
			"testing",
		} {
			require.False(t, strings.HasPrefix(dep, never), "it depends on %s", dep)
		}
		if pkg, ok := strings.CutPrefix(dep, own); ok {
			require.Contains(t, []string{"keystore/pgstore", "keystore/backend",
				"internal/remote"}, pkg)
		}
	}
	sums, err := os.ReadFile("go.sum")
	require.NoError(t, err)
	require.Contains(t, string(sums), "github.com/jackc/pgx/v5")
	require.NotContains(t, string(sums), "go.etcd.io/")
}
