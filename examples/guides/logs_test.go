package guides_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The page on logs names the attributes of all lines, as the source has them.
func TestLogsNameEveryAttribute(t *testing.T) {
	page := read(t, "logs.md")
	found := make(map[string]bool)
	for _, dir := range []string{"keystore", "interceptor", "internal/cluster",
		"internal/badgerdb"} {
		root := filepath.Join("../..", dir)
		require.NoError(t, filepath.WalkDir(root, func(
			path string, _ fs.DirEntry, err error,
		) error {
			if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
				file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
				require.NoError(t, err)
				ast.Inspect(file, func(n ast.Node) bool {
					for _, key := range attributes(n) {
						found[key] = true
					}
					return true
				})
			}
			return err
		}))
	}
	require.Greater(t, len(found), 20)
	var missing []string
	for key := range found {
		if !strings.Contains(page, "`"+key+"`") {
			missing = append(missing, key)
		}
	}
	slices.Sort(missing)
	require.Empty(t, missing, "attributes that the page lacks")
}

// attributes returns the names of attributes in a call of a logger or of slog, and in a list of
// arguments for a logger.
func attributes(n ast.Node) (keys []string) {
	pairs := func(args []ast.Expr) {
		for i := 0; i < len(args); i += 2 {
			if literal, ok := args[i].(*ast.BasicLit); ok && literal.Kind == token.STRING {
				if key, err := strconv.Unquote(literal.Value); err == nil {
					keys = append(keys, key)
				}
			}
		}
	}
	switch n := n.(type) {
	case *ast.CompositeLit:
		if list, ok := n.Type.(*ast.ArrayType); ok {
			if element, ok := list.Elt.(*ast.Ident); ok && element.Name == "any" {
				pairs(n.Elts)
			}
		}
	case *ast.CallExpr:
		f, ok := n.Fun.(*ast.SelectorExpr)
		if !ok {
			return nil
		}
		receiver := ""
		switch x := f.X.(type) {
		case *ast.Ident:
			receiver = x.Name
		case *ast.SelectorExpr:
			receiver = x.Sel.Name
		}
		isLogger := slices.Contains([]string{"log", "logger", "Logger"}, receiver)
		switch f.Sel.Name {
		case "Info", "Warn", "Error":
			if isLogger && len(n.Args) > 1 {
				pairs(n.Args[1:])
			}
		case "logFault":
			pairs(n.Args[2:])
		case "String", "Uint64", "Int", "Any", "Duration", "Bool":
			if receiver == "slog" {
				pairs(n.Args[:1])
			}
		}
	}
	return keys
}
