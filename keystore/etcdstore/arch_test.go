package etcdstore

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A user of the package links neither etcd's server nor another engine, and has no server in
// go.sum.
func TestImports(t *testing.T) {
	const own = "github.com/grpc-api-key/grpc-api-key/"
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	require.NoError(t, err)
	deps := strings.Fields(string(out))
	require.Contains(t, deps, "go.etcd.io/etcd/client/v3")
	for _, dep := range deps {
		for _, never := range []string{
			"go.etcd.io/etcd/server/", "go.etcd.io/raft/", "go.etcd.io/bbolt",
			"github.com/jackc/", "github.com/dgraph-io/", "github.com/stretchr/", "testing",
		} {
			require.False(t, strings.HasPrefix(dep, never), "it depends on %s", dep)
		}
		if pkg, ok := strings.CutPrefix(dep, own); ok {
			require.Contains(t, []string{"keystore/etcdstore", "keystore/backend",
				"internal/remote"}, pkg)
		}
	}
	sums, err := os.ReadFile("go.sum")
	require.NoError(t, err)
	require.Contains(t, string(sums), "go.etcd.io/etcd/client/v3")
	require.NotContains(t, string(sums), "go.etcd.io/etcd/server/")
}
