package importer

import (
	"fmt"
	"io"
	"iter"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A System is a system that issues keys, such as Laravel Sanctum. The functions of this package
// return the systems. A System is safe for concurrent use.
type System struct {
	name    string
	formats []keystore.LegacyFormat
	rows    func(io.Reader) iter.Seq2[row, error]
	key     func(*row) keystore.Imported
}

// Systems returns all systems, in the order of their names.
func Systems() []System {
	return []System{AWS(), BetterAuth(), DRF(), FlaskAPIKey(), Kong(), Plain(), Sanctum(), Unkey()}
}

// Named returns the system with a Name. If no system has the Name, ok is false.
func Named(name string) (s System, ok bool) {
	all := Systems()
	i := slices.IndexFunc(all, func(s System) bool { return s.name == name })
	if i < 0 {
		return System{}, false
	}
	return all[i], true
}

// Name returns the name of the system, such as "sanctum".
func (s System) Name() string { return s.name }

// Formats returns the formats of the tokens, for [keystore.Options]. Append the results of several
// systems if a store has keys of several systems.
func (s System) Formats() []keystore.LegacyFormat { return slices.Clone(s.formats) }

// Options are the settings of Read. Nil and the zero value are valid.
type Options struct {
	// IgnoreCredits imports a key that the other system admits a limited number of times as a key
	// without this limit. Otherwise the key has as many credits as it had in the other system.
	IgnoreCredits bool
}

// Read reads an export. A row that cannot be used comes as an error that is a
// [keystore.ImportProblem], and the reading continues. Any other error ends the reading: an error
// of r, or a first line in CSV without a column that every key needs. No error contains a token or
// a digest. r is read once, during the iteration.
func (s System) Read(r io.Reader, opts *Options) iter.Seq2[keystore.Imported, error] {
	if opts == nil {
		opts = new(Options)
	}
	return func(yield func(keystore.Imported, error) bool) {
		now := time.Now()
		for row, err := range s.rows(r) {
			var key keystore.Imported
			if err == nil {
				row.opts, row.now = opts, now
				key = s.key(&row)
				key.Row = row.place
				if row.lacks != "" { // so does every other row
					yield(keystore.Imported{}, fmt.Errorf("the first line names no column %s, which "+
						"an export of %s has: is it the file of another system, or are the columns "+
						"not separated by commas?", row.lacks, s.name))
					return
				}
				if row.problem != nil {
					key, err = keystore.Imported{}, row.problem
				}
			}
			if !yield(key, err) {
				return
			}
		}
	}
}
