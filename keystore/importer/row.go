package importer

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A row is a row of an export. The methods note the first problem of the row.
type row struct {
	place   string            // such as "line 7"
	columns map[string]string // by the name in lower case; an object or a list is JSON
	header  []string          // the names of all columns in CSV, which every row has; otherwise nil
	lacks   string            // a column that each row needs, and that the header lacks
	opts    *Options
	now     time.Time
	problem *keystore.ImportProblem
}

func (r *row) refuse(reason, format string, args ...any) {
	if r.problem == nil {
		r.problem = &keystore.ImportProblem{Row: r.place, Reason: reason,
			Text: fmt.Sprintf(format, args...)}
	}
}

// text returns the first of some columns that has a value, or "".
func (r *row) text(names ...string) string {
	for _, name := range names {
		if v := r.columns[name]; v != "" {
			return v
		}
	}
	return ""
}

// need is text for a column that each row must have.
func (r *row) need(name string) string {
	v := r.text(name)
	if v == "" {
		r.refuse(keystore.ImportUnreadable, "the row has no %s", name)
		r.needOneOf(name)
	}
	return v
}

// needOneOf notes the first of some columns, of which each row needs one, if the header has none.
func (r *row) needOneOf(names ...string) {
	has := func(name string) bool { return slices.Contains(r.header, name) }
	if r.header != nil && !slices.ContainsFunc(names, has) {
		r.lacks = names[0]
	}
}

// time returns the time in the first of some columns that has a value, or the zero time.
func (r *row) time(names ...string) time.Time {
	for _, name := range names {
		if v := r.columns[name]; v != "" {
			t, ok := parseTime(v)
			if !ok {
				r.refuse(keystore.ImportUnreadable, "the column %s is no time", name)
			}
			return t
		}
	}
	return time.Time{}
}

// timeLayouts are how databases write times, apart from RFC 3339. Without a zone, the zone is UTC.
var timeLayouts = []string{time.RFC3339Nano, "2006-01-02 15:04:05.999999999Z07:00",
	"2006-01-02 15:04:05.999999999Z07", "2006-01-02 15:04:05.999999999",
	"2006-01-02T15:04:05.999999999", "2006-01-02"}

// parseTime parses a time. A number is seconds since 1970, or milliseconds if the time in seconds
// would be after the year 5000.
func parseTime(text string) (time.Time, bool) {
	if strings.HasPrefix(text, "0000-00-00") { // MySQL's word for no time
		return time.Time{}, true
	}
	if n, err := strconv.ParseFloat(text, 64); err == nil {
		switch {
		case n == 0:
			return time.Time{}, true
		case n < 0 || n > 1e16:
			return time.Time{}, false
		case n >= 1e11:
			n /= 1000
		}
		return time.UnixMilli(int64(n * 1000)).UTC(), true
	}
	for _, layout := range timeLayouts {
		if t, err := time.Parse(layout, text); err == nil {
			return t.UTC(), true
		}
	}
	return time.Time{}, false
}

// flag returns the truth in a column, or otherwise if the column has no value.
func (r *row) flag(name string, otherwise bool) bool {
	switch strings.ToLower(r.columns[name]) {
	case "":
		return otherwise
	case "1", "t", "true", "yes", "y", "\x01": // \x01 is how MySQL writes a bit
		return true
	case "0", "f", "false", "no", "n", "\x00":
		return false
	default:
		r.refuse(keystore.ImportUnreadable, "the column %s is neither true nor false", name)
		return otherwise
	}
}

// number returns the number in a column, or 0 if the column has no value.
func (r *row) number(name string) float64 {
	v := r.columns[name]
	if v == "" {
		return 0
	}
	n, err := strconv.ParseFloat(v, 64)
	if err != nil {
		r.refuse(keystore.ImportUnreadable, "the column %s is no number", name)
	}
	return n
}

// list returns the texts in a column: a list in JSON, or words.
func (r *row) list(name string) []string {
	v := r.columns[name]
	if !strings.HasPrefix(v, "[") {
		return strings.Fields(v)
	}
	var list []string
	if json.Unmarshal([]byte(v), &list) != nil {
		r.refuse(keystore.ImportUnreadable, "the column %s is no list of texts", name)
	}
	return list
}

// object decodes the JSON object in a column to v. Some systems write the JSON of a text that is
// the JSON of the object.
func (r *row) object(name string, v any) {
	text := r.columns[name]
	var inner string
	if json.Unmarshal([]byte(text), &inner) == nil {
		text = inner
	}
	if text != "" && json.Unmarshal([]byte(text), v) != nil {
		r.refuse(keystore.ImportUnreadable, "the column %s does not have the form of the export", name)
	}
}

// metadata returns the texts of the JSON object in a column, for Spec.Metadata. A value that is no
// text stays JSON. Values of extra columns are added under the names of the columns.
func (r *row) metadata(name string, extra ...string) map[string]string {
	m := make(map[string]string)
	var object map[string]json.RawMessage
	r.object(name, &object)
	for k, v := range object {
		var text string
		if json.Unmarshal(v, &text) != nil {
			text = string(v)
		}
		m[k] = text
	}
	for _, name := range extra {
		if v := r.text(name); v != "" {
			m[name] = v
		}
	}
	if id := r.text("id"); id != "" {
		m["imported_id"] = id
	}
	return m
}

// integer returns the whole number in a column, or 0 if the column has no value.
func (r *row) integer(name string) int64 {
	v := r.columns[name]
	if v == "" {
		return 0
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		r.refuse(keystore.ImportUnreadable, "the column %s is no whole number", name)
	}
	return n
}

// credits returns credits with the remaining uses in a column. If the column has no value, the use
// of the key is not limited, and the result is nil.
func (r *row) credits(remaining string) *keystore.Credits {
	if r.text(remaining) == "" || r.opts.IgnoreCredits {
		return nil
	}
	return &keystore.Credits{Remaining: r.integer(remaining)}
}

// problemAt is the problem of a row that has no columns.
func problemAt(line int, text string) error {
	return &keystore.ImportProblem{Row: fmt.Sprintf("line %d", line),
		Reason: keystore.ImportUnreadable, Text: text}
}

// table reads an export in CSV or with a JSON object on each line.
func table(r io.Reader) iter.Seq2[row, error] {
	return func(yield func(row, error) bool) {
		in := bufio.NewReader(r)
		if bom, _ := in.Peek(3); string(bom) == "\xef\xbb\xbf" {
			_, _ = in.Discard(3)
		}
		first, err := firstByte(in)
		switch {
		case err == io.EOF:
		case err != nil:
			yield(row{}, err)
		case first == '{':
			jsonLines(in, yield)
		default:
			csvLines(in, yield)
		}
	}
}

// firstByte returns the first byte that is no white space, and leaves it unread. Line numbers stay
// right, because only lines before the first line of an export are skipped.
func firstByte(in *bufio.Reader) (byte, error) {
	for n := 1; ; n++ {
		b, err := in.Peek(n)
		if len(b) < n {
			return 0, err
		}
		if c := b[n-1]; c != ' ' && c != '\t' && c != '\r' && c != '\n' {
			return c, nil
		}
	}
}

// A rowLimit is a reader that returns errLongRow after maxLine bytes of one row. Otherwise a quote
// without an end would take the rest of the export into memory.
type rowLimit struct {
	io.Reader
	left int
}

var errLongRow = fmt.Errorf("a row has more than %d bytes: a quote may have no end", maxLine)

func (l *rowLimit) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, errLongRow
	}
	n, err := l.Reader.Read(p[:min(len(p), l.left)])
	l.left -= n
	return n, err
}

func csvLines(in io.Reader, yield func(row, error) bool) {
	limit := &rowLimit{Reader: in}
	c := csv.NewReader(limit)
	c.ReuseRecord = true
	c.TrimLeadingSpace = true
	var names []string
	line := 0 // of the last row
	for {
		limit.left = maxLine
		fields, err := c.Read()
		if err == io.EOF {
			return
		}
		if parse := (*csv.ParseError)(nil); errors.As(err, &parse) {
			// The text of the error has no field.
			if !yield(row{}, problemAt(parse.StartLine, "the row is not CSV: "+parse.Err.Error())) {
				return
			}
			continue
		}
		if errors.Is(err, errLongRow) {
			err = fmt.Errorf("after line %d: %w", line, err)
		}
		if err != nil {
			yield(row{}, err)
			return
		}
		line, _ = c.FieldPos(0)
		if names == nil {
			for _, name := range fields {
				names = append(names, strings.ToLower(strings.TrimSpace(name)))
			}
			continue
		}
		columns := make(map[string]string, len(names))
		for i, v := range fields {
			if v != "NULL" && v != `\N` {
				columns[names[i]] = strings.Clone(v)
			}
		}
		next := row{place: fmt.Sprintf("line %d", line), columns: columns, header: names}
		if !yield(next, nil) {
			return
		}
	}
}

// maxLine is the longest row, in bytes.
const maxLine = 1 << 20

func jsonLines(in *bufio.Reader, yield func(row, error) bool) {
	s := bufio.NewScanner(in)
	s.Buffer(nil, maxLine)
	line := 0
	for s.Scan() {
		line++
		text := bytes.TrimSpace(s.Bytes())
		if len(text) == 0 {
			continue
		}
		columns, ok := jsonColumns(text)
		if !ok {
			if !yield(row{}, problemAt(line, "the line is not one JSON object")) {
				return
			}
			continue
		}
		if !yield(row{place: fmt.Sprintf("line %d", line), columns: columns}, nil) {
			return
		}
	}
	if err := s.Err(); errors.Is(err, bufio.ErrTooLong) {
		yield(row{}, fmt.Errorf("line %d has more than %d bytes", line+1, maxLine))
	} else if err != nil {
		yield(row{}, err)
	}
}

// jsonColumns returns the members of a JSON object. Texts are decoded, null is no value, and other
// values stay JSON.
func jsonColumns(text []byte) (map[string]string, bool) {
	var object map[string]json.RawMessage
	if json.Unmarshal(text, &object) != nil {
		return nil, false
	}
	columns := make(map[string]string, len(object))
	for name, v := range object {
		value := string(v)
		if v[0] == '"' && json.Unmarshal(v, &value) != nil {
			return nil, false
		}
		if string(v) != "null" {
			columns[strings.ToLower(name)] = value
		}
	}
	return columns, true
}

// firstOf returns the first text that is not empty.
func firstOf(texts ...string) string {
	if i := slices.IndexFunc(texts, func(s string) bool { return s != "" }); i >= 0 {
		return texts[i]
	}
	return ""
}
