// Package archtest checks that the import graph is the one that the design describes.
package archtest

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/grpc-api-key/grpc-api-key/"

// list runs go list, and returns the packages that it names.
func list(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, args...)...).Output()
	if exit, ok := err.(*exec.ExitError); ok {
		t.Log(string(exit.Stderr))
	}
	require.NoError(t, err)
	return strings.Fields(string(out))
}

func deps(t *testing.T, pkg string) []string { return list(t, "-deps", module+pkg) }

// rooms are the packages that internal/badgerdb consists of. A package that may depend on
// internal/badgerdb may depend on the rooms too.
var rooms = []string{"internal/fsys", "internal/badgerdb/layout", "internal/badgerdb/badgerfile",
	"internal/badgerdb/commitfile", "internal/badgerdb/survey"}

func TestImports(t *testing.T) {
	const (
		badger = "github.com/dgraph-io/"
		grpc   = "google.golang.org/grpc"
	)
	// The packages that keystore uses.
	below := []string{
		"hashing", "keystore/backend",
		"internal/backupfile", "internal/badgerdb", "internal/changequeue", "internal/clientaddr",
		"internal/cluster", "internal/credit", "internal/fence", "internal/intern", "internal/record", "internal/scope",
		"internal/sequencer", "internal/striped", "internal/token",
	}
	for _, tt := range []struct {
		pkg    string
		allows []string // of this module
		never  []string // of other modules
	}{
		{"hashing", nil, []string{badger, grpc, "google.golang.org/protobuf"}},
		{"interceptor/keycreds", nil, []string{badger, "google.golang.org/protobuf/testing"}},
		{"keystore/backend", nil, []string{badger, grpc}},
		{
			"keystore/backend/backendtest", []string{"keystore/backend", "internal/memory"},
			[]string{badger, grpc},
		},
		{"keystore", below, []string{grpc}},
		{"keystore/importer", append(below, "keystore"), []string{grpc}},
		{"keystore/keystoretest", append(below, "keystore", "internal/memory"),
			[]string{grpc, "github.com/stretchr/"}},
		{"internal/admission", append(below, "keystore", "internal/failures"), []string{grpc}},
		{
			"interceptor", append(below, "keystore", "internal/errinfo", "internal/failures",
				"internal/admission"), nil,
		},
		{
			"interceptor/httpkeys", append(below, "keystore", "internal/failures",
				"internal/admission"), []string{grpc},
		},
		{"interceptor/admin/adminpb", nil, []string{badger}},
		{
			"interceptor/admin", append(below, "keystore", "internal/errinfo", "internal/failures",
				"internal/admission", "interceptor", "internal/inventory", "internal/manage",
				"interceptor/admin/adminpb"), nil,
		},
		{
			"keystore/console", append(below, "keystore", "internal/failures", "internal/inventory",
				"internal/manage"),
			[]string{grpc},
		},
		{"internal/manage", append(below, "keystore"), []string{grpc}},
		{"internal/errinfo", nil, []string{badger}},
		{"internal/failures", nil, []string{badger, grpc}},
		{"interceptor/otelkeys",
			append(below, "keystore", "internal/errinfo", "internal/failures", "internal/admission",
				"interceptor", "internal/inventory", "internal/storemetrics"),
			[]string{"go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/contrib/"}},
		{"internal/inventory", append(below, "keystore"), []string{grpc}},
		{"internal/storemetrics", append(below, "keystore", "internal/inventory"),
			[]string{grpc, "github.com/prometheus/"}},
		{"internal/backupfile", []string{"internal/record", "keystore/backend"},
			[]string{badger, grpc}},
		{"internal/cluster", []string{"internal/record", "keystore/backend"},
			[]string{badger, grpc, "github.com/stretchr/"}},
		{"internal/badlink",
			[]string{"keystore/backend", "keystore/backend/backendtest", "internal/memory"},
			[]string{badger, grpc}},
		{"internal/remote", []string{"keystore/backend"}, []string{badger, grpc}},
		{"internal/changequeue", nil, []string{badger, grpc}},
		{"internal/intern", nil, []string{badger, grpc}},
		{"internal/sequencer", nil, []string{badger, grpc}},
		{"internal/badgerdb", []string{"keystore/backend"}, []string{grpc}},
		{"internal/fsys", nil, []string{badger, grpc, "google.golang.org/protobuf"}},
		{
			"internal/badgerdb/layout", []string{"keystore/backend"},
			[]string{badger, grpc, "google.golang.org/protobuf"},
		},
		{
			"internal/badgerdb/badgerfile",
			[]string{"internal/fsys", "internal/badgerdb/layout", "keystore/backend"},
			[]string{grpc},
		},
		{
			"internal/badgerdb/commitfile",
			[]string{"internal/fsys", "internal/badgerdb/layout", "keystore/backend"},
			[]string{badger, grpc, "google.golang.org/protobuf"},
		},
		{
			"internal/badgerdb/survey",
			[]string{"internal/fsys", "internal/badgerdb/layout", "internal/badgerdb/badgerfile",
				"internal/badgerdb/commitfile", "keystore/backend"}, []string{grpc},
		},
		{"internal/token", nil, []string{badger, grpc}},
		{"internal/scope", nil, []string{badger, grpc}},
		{"internal/fence", []string{"internal/striped"}, []string{badger, grpc}},
		{"internal/striped", nil, []string{badger, grpc}},
		{
			"internal/memory", []string{"keystore/backend"},
			[]string{badger, grpc, "github.com/stretchr/", "testing"},
		},
	} {
		if tt.pkg == "internal/badgerdb" || slices.Contains(tt.allows, "internal/badgerdb") {
			tt.allows = append(tt.allows, rooms...)
		}
		t.Run(tt.pkg, func(t *testing.T) {
			for _, dep := range deps(t, tt.pkg) {
				if own, ok := strings.CutPrefix(dep, module); ok && own != tt.pkg {
					require.Contains(t, tt.allows, own)
				}
				for _, never := range tt.never {
					require.False(t, strings.HasPrefix(dep, never), "it depends on %s", dep)
				}
			}
		})
	}
}

// A store on a server is a separate module. A user of a store in a directory links no client of a
// server, and has none in go.sum.
func TestADirectoryLinksNoServer(t *testing.T) {
	servers := []string{"go.etcd.io/", "github.com/jackc/"}
	for _, pkg := range []string{"keystore", "keystore/keystoretest", "interceptor"} {
		for _, dep := range deps(t, pkg) {
			for _, server := range servers {
				require.False(t, strings.HasPrefix(dep, server), "%s depends on %s", pkg, dep)
			}
		}
	}
	for _, server := range servers {
		require.NotContains(t, read(t, "go.sum"), server)
	}
}

// A user of keystore and interceptor links exactly these modules, and the admin service and the
// console add none.
// What only some users need stays in packages that the others do not import, or in modules of its
// own.
func TestModulesThatAUserLinks(t *testing.T) {
	modules := func(pkg string) []string {
		all := list(t, "-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", module+pkg)
		slices.Sort(all)
		return slices.Compact(all)
	}
	store := []string{
		"github.com/cespare/xxhash/v2",
		"github.com/dgraph-io/badger/v4",
		"github.com/dgraph-io/ristretto/v2",
		"github.com/dustin/go-humanize",
		"github.com/go-logr/logr",
		"github.com/go-logr/stdr",
		"github.com/google/flatbuffers",
		"github.com/google/uuid",
		"github.com/grpc-api-key/grpc-api-key",
		"github.com/hashicorp/golang-lru/v2",
		"github.com/klauspost/compress",
		"go.opentelemetry.io/auto/sdk",
		"go.opentelemetry.io/otel",
		"go.opentelemetry.io/otel/metric",
		"go.opentelemetry.io/otel/trace",
		"golang.org/x/sys",
		"golang.org/x/time",
		"google.golang.org/protobuf",
	}
	require.Equal(t, store, modules("keystore"))
	require.Equal(t, store, modules("keystore/console"))
	require.Equal(t, store, modules("interceptor/httpkeys"))
	server := append([]string{"golang.org/x/net", "golang.org/x/text",
		"google.golang.org/genproto/googleapis/rpc", "google.golang.org/grpc"}, store...)
	slices.Sort(server)
	require.Equal(t, server, modules("interceptor"))
	require.Equal(t, server, modules("interceptor/admin"))
}

// Badger links OpenTelemetry, but the packages of a server call nothing of it. Only a program
// imports what a command line needs.
func TestWhatThePackagesOfAServerImport(t *testing.T) {
	const format = `{{$p := .ImportPath}}{{range .Imports}}{{$p}}>{{.}}{{"\n"}}{{end}}`
	imports := list(t, "-f", format, module+"...")
	require.Contains(t, imports, module+"interceptor>"+module+"keystore")
	for _, line := range imports {
		importer, imported, _ := strings.Cut(line, ">")
		pkg := strings.TrimPrefix(importer, module)
		for _, cli := range []string{"github.com/urfave/", "golang.org/x/term",
			"github.com/schollz/"} {
			if strings.HasPrefix(imported, cli) {
				require.True(t, strings.HasPrefix(pkg, "cmd/"), "%s imports %s", pkg, imported)
			}
		}
		if strings.HasPrefix(imported, "go.opentelemetry.io/") {
			require.NotContains(t, []string{"keystore", "interceptor", "interceptor/admin"}, pkg,
				"imports %s", imported)
		}
	}
}

// Package expvar registers a handler on http.DefaultServeMux. Badger imports the package; that of
// this module must not.
func TestNobodyImportsExpvar(t *testing.T) {
	importers := list(t, "-f", `{{range .Imports}}`+
		`{{if eq . "expvar" "net/http/pprof" "golang.org/x/net/trace"}}{{$.ImportPath}}{{end}}`+
		`{{end}}`, module+"...")
	require.Empty(t, importers)
}

// Of the handlers on http.DefaultServeMux, the doc of package keystore names the only one that its
// import brings.
func TestHandlersThatAnImportBrings(t *testing.T) {
	source := t.TempDir() + "/main.go"
	require.NoError(t, os.WriteFile(source, []byte(`package main

import (
	"fmt"
	"net/http"

	_ "github.com/grpc-api-key/grpc-api-key/keystore"
)

func main() {
	for _, path := range []string{
		"/", "/debug/vars", "/debug/pprof/", "/debug/requests", "/debug/events", "/metrics",
	} {
		r, err := http.NewRequest("GET", "http://localhost"+path, nil)
		if err != nil {
			panic(err)
		}
		if _, pattern := http.DefaultServeMux.Handler(r); pattern != "" {
			fmt.Println(pattern)
		}
	}
}
`), 0o600))
	out, err := exec.Command("go", "run", source).Output()
	require.NoError(t, err)
	require.Equal(t, "GET /debug/vars\n", string(out))
}

// One package knows OpenTelemetry, which Badger imports too. No package of this module knows
// Prometheus: promkeys is a separate module.
func TestOnlyOtelkeysImportsOpenTelemetry(t *testing.T) {
	imports := list(t, "-f", `{{range .Imports}}{{$.ImportPath}}>{{.}}{{"\n"}}{{end}}`, module+"...")
	require.NotEmpty(t, imports)
	var importers []string
	for _, line := range imports {
		importer, imported, _ := strings.Cut(line, ">")
		require.False(t, strings.HasPrefix(imported, "github.com/prometheus/"), line)
		if strings.HasPrefix(imported, "go.opentelemetry.io/") {
			importers = append(importers, importer)
		}
	}
	require.Equal(t, []string{module + "interceptor/otelkeys"}, slices.Compact(importers))
}

// Two packages know Badger: internal/badgerdb, and badgerfile below internal/badgerdb.
func TestOnlyBadgerdbImportsBadger(t *testing.T) {
	importers := list(t, "-f", `{{range .Imports}}{{if ge (len .) 21}}{{if eq (slice . 0 21) `+
		`"github.com/dgraph-io/"}}{{$.ImportPath}}{{"\n"}}{{end}}{{end}}{{end}}`, module+"...")
	require.Equal(t,
		[]string{module + "internal/badgerdb", module + "internal/badgerdb/badgerfile"},
		slices.Compact(importers))
}
