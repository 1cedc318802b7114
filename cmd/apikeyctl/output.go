package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// The formats of -o.
const (
	formatTable = "table"
	formatJSON  = "json"
	formatJSONL = "jsonl"
	formatID    = "id"
)

// An output prints the results of a command to stdout, in the format of -o. What is no result goes
// to stderr.
type output struct {
	format         string
	stdout, stderr *os.File
}

// A record is one result: a key, an event, or what a command did. The JSON of a record is that of
// its type.
type record interface {
	ident() string  // for the format id
	row() []field   // for a table of several records
	whole() []field // for a table of one record
}

// A field is a cell of a table with its heading.
type field struct{ name, value string }

// one prints one record.
func (o *output) one(r record) error {
	switch o.format {
	case formatJSON:
		return o.writeJSON(r, "  ")
	case formatJSONL:
		return o.writeJSON(r, "")
	case formatID:
		return o.line(r.ident())
	default:
		return writeFields(o.stdout, r.whole())
	}
}

// said prints a record with a sentence about it, which is the table of the record.
func (o *output) said(r record, sentence string) error {
	if o.format == formatTable {
		return o.line(printable(sentence))
	}
	return o.one(r)
}

func (o *output) line(text string) error {
	_, err := fmt.Fprintln(o.stdout, text)
	return writeFailed(err)
}

func (o *output) writeJSON(v any, indent string) error {
	text, err := encode(v, "", indent)
	if err == nil {
		_, err = o.stdout.Write(append(text, '\n'))
	}
	return writeFailed(err)
}

func encode(v any, prefix, indent string) ([]byte, error) {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent(prefix, indent)
	err := e.Encode(v)
	return []byte(strings.TrimSuffix(b.String(), "\n")), err
}

// errGone means that the reader of stdout has had enough, as in "apikeyctl list | head".
var errGone = errors.New("the reader of the standard output has gone")

// writeFailed returns the failure for an error of a write to stdout.
func writeFailed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.EPIPE):
		return errGone
	default:
		return local("cannot write to the standard output: %v", err)
	}
}

// width returns the number of columns of stdout, or 0 if stdout is no terminal.
func (o *output) width() int {
	columns, _, err := term.GetSize(int(o.stdout.Fd()))
	if err != nil {
		return 0
	}
	return columns
}

// pageRows is the number of rows of a table that are aligned together. A longer table is printed in
// parts, so that a list of all keys needs little memory.
const pageRows = 1000

// A list prints records one by one. Close prints what remains.
type list struct {
	*output
	n    int      // records so far
	page []record // the rows of a table that are not printed yet
}

func (o *output) list() *list { return &list{output: o} }

func (l *list) add(r record) (err error) {
	l.n++
	switch l.format {
	case formatJSON:
		text, err := encode(r, "  ", "  ")
		if err != nil {
			return err
		}
		before := ",\n  "
		if l.n == 1 {
			before = "[\n  "
		}
		_, err = fmt.Fprintf(l.stdout, "%s%s", before, text)
		return writeFailed(err)
	case formatJSONL, formatID:
		return l.one(r)
	default:
		if l.page = append(l.page, r); len(l.page) == pageRows {
			return l.flush()
		}
		return nil
	}
}

// addBatch adds the keys of a batch.
func (l *list) addBatch(keys []*adminpb.Key) error {
	for _, m := range keys {
		if err := l.add(batchKey{key: keyOf(m)}); err != nil {
			return err
		}
	}
	return nil
}

// addSaid adds a record with the sentence about it.
func (l *list) addSaid(r record, sentence string) error {
	if l.format == formatTable {
		l.n++
		return l.said(r, sentence)
	}
	return l.add(r)
}

// flush prints the rows of a table that are not printed yet.
func (l *list) flush() error {
	rows := l.page
	l.page = l.page[:0]
	if len(rows) == 0 {
		return nil
	}
	return writeTable(l.stdout, rows, l.width())
}

func (l *list) close() error {
	switch {
	case l.format == formatTable:
		return l.flush()
	case l.format == formatJSON && l.n == 0:
		return l.line("[]")
	case l.format == formatJSON:
		return l.line("\n]")
	default:
		return nil
	}
}

// writeTable prints a table. If the table is wider than the window, the last columns are left out.
// If not even the first minColumns fit, each cell gets a line.
func writeTable(w io.Writer, rows []record, window int) error {
	table := make([][]string, len(rows)+1)
	for _, heading := range rows[0].row() {
		table[0] = append(table[0], heading.name)
	}
	for i, r := range rows {
		for _, cell := range r.row() {
			table[i+1] = append(table[i+1], printable(cell.value))
		}
	}
	columns := len(table[0])
	for columns > 0 && window > 0 && widthOf(table, columns) > window {
		columns--
	}
	if columns < min(minColumns, len(table[0])) {
		for i, r := range rows {
			if i > 0 {
				fmt.Fprintln(w)
			}
			if err := writeFields(w, r.row()); err != nil {
				return err
			}
		}
		return nil
	}
	aligned := tabwriter.NewWriter(w, 0, 0, gap, ' ', 0)
	for _, line := range table {
		fmt.Fprintln(aligned, strings.Join(line[:columns], "\t"))
	}
	return writeFailed(aligned.Flush())
}

// minColumns is how many columns a table has at least: with fewer, a key has no state.
const minColumns = 4

// gap is the number of spaces between two columns.
const gap = 2

func widthOf(table [][]string, columns int) (total int) {
	for i := range columns {
		widest := 0
		for _, line := range table {
			widest = max(widest, utf8.RuneCountInString(line[i]))
		}
		total += widest + gap
	}
	return total - gap
}

// writeFields prints the fields of a record, one on a line.
func writeFields(w io.Writer, fields []field) error {
	aligned := tabwriter.NewWriter(w, 0, 0, gap, ' ', 0)
	for _, f := range fields {
		fmt.Fprintf(aligned, "%s\t%s\n", f.name, printable(f.value))
	}
	return writeFailed(aligned.Flush())
}

// printable replaces the characters that would move the cursor, change the colours or reverse the
// direction of a terminal, and an empty text by a hyphen.
func printable(text string) string {
	if text == "" {
		return "-"
	}
	if strings.IndexFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 &&
		utf8.ValidString(text) {
		return text
	}
	quoted := strconv.Quote(text)
	return quoted[1 : len(quoted)-1]
}
