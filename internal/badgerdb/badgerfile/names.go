package badgerfile

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
)

// The kinds of files that Badger makes.
const (
	ManifestFile = "MANIFEST"
	TableFiles   = ".sst"
	LogFiles     = ".mem"
	ValueLogs    = ".vlog"
	OtherFiles   = "other" // encryption keys, statistics, and files of an interrupted rewrite
)

// TableName returns the name of the table with a number.
func TableName(id uint64) string { return table.IDToFilename(id) }

// Kind returns the kind of the Badger file with the given name. The result is "" if Badger
// does not make files with this name: notes.mem is no log.
func Kind(name string) string {
	numbered := func(format string) bool {
		var n uint64
		_, err := fmt.Sscanf(name, format, &n)
		return err == nil && fmt.Sprintf(format, n) == name
	}
	switch name {
	case badger.ManifestFilename:
		return ManifestFile
	case "KEYREGISTRY", "REWRITE-KEYREGISTRY", "MANIFEST-REWRITE", "DISCARD":
		return OtherFiles
	}
	if id, ok := table.ParseFileID(name); ok && table.IDToFilename(id) == name {
		return TableFiles
	}
	switch {
	case numbered("%05d.mem"):
		return LogFiles
	case numbered("%06d.vlog"):
		return ValueLogs
	}
	return ""
}

// FilesOf returns the paths of Badger's files of one kind in dir, in the order of their names.
func FilesOf(dir, kind string) ([]string, error) {
	files, err := os.ReadDir(dir)
	var paths []string
	for _, f := range files {
		if Kind(f.Name()) == kind {
			paths = append(paths, filepath.Join(dir, f.Name()))
		}
	}
	return paths, err
}
