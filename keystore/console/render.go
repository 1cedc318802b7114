package console

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"io/fs"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

//go:embed pages/*.html
var pageFiles embed.FS

//go:embed assets/console.css assets/console.js
var assetFiles embed.FS

// assetDir is the folder of the assets, below the console.
const assetDir = "assets/"

// An asset is a file whose name has a hash of its content. So browsers may keep the file for ever.
type asset struct {
	kind string // the Content-Type
	data []byte
}

var (
	assets            = make(map[string]asset) // by the name with the hash
	styleName, jsName string
	pageTemplates     = make(map[string]*template.Template)
	eventRow          *template.Template // a row of the table of events
)

func init() {
	styleName = addAsset("assets/console.css", "text/css; charset=utf-8")
	jsName = addAsset("assets/console.js", "text/javascript; charset=utf-8")
	layout := template.Must(template.New("layout.html").Funcs(functions).
		ParseFS(pageFiles, "pages/layout.html", "pages/parts.html"))
	files, err := fs.Glob(pageFiles, "pages/*.html")
	if err != nil {
		panic(err) // the pattern is bad
	}
	for _, file := range files {
		name := strings.TrimSuffix(path.Base(file), ".html")
		if name == "layout" || name == "parts" {
			continue
		}
		page := template.Must(layout.Clone())
		pageTemplates[name] = template.Must(page.ParseFS(pageFiles, file))
	}
	eventRow = template.Must(layout.Clone()).Lookup("event")
}

func addAsset(file, kind string) (name string) {
	data, err := assetFiles.ReadFile(file)
	if err != nil {
		panic(err) // the file is embedded
	}
	sum := sha256.Sum256(data)
	ext := path.Ext(file)
	name = strings.TrimSuffix(path.Base(file), ext) + "." + hex.EncodeToString(sum[:8]) + ext
	assets[name] = asset{kind, data}
	return name
}

func (v *visit) serveAsset(name string) {
	a, ok := assets[name]
	if !ok || v.r.Method != http.MethodGet && v.r.Method != http.MethodHead {
		http.NotFound(v.w, v.r)
		return
	}
	h := v.w.Header()
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	h.Set("Content-Type", a.kind)
	h.Set("Content-Length", strconv.Itoa(len(a.data)))
	_, _ = v.w.Write(a.data)
}

// A view is what a page shows.
type view struct {
	Root  string // the URL of the overview, relative to the page
	Brand string
	Title string
	Page  string // the name of the page
	CSS   string
	JS    string
	// Operator is the name of the operator; "" if no operator is logged in.
	Operator string
	// OperatorKey is the ID of the operator's own key, or "".
	OperatorKey string
	CanLogOut   bool
	MayWrite    bool
	MayAdmin    bool
	InKeys      bool   // the page is below the page with the keys
	Note        string // what the operator has just done
	Data        any
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// maxKeptBuffer is the size of the largest buffer that is kept for the next page.
const maxKeptBuffer = 128 << 10

// render sends a page. If the login has ended since the request began, render sends no page that
// was read from the store. After a change, the page says what the operator has done, and may have
// the only copy of a secret.
func (v *visit) render(status int, page, title string, data any) {
	if v.r.Method != http.MethodPost && v.hasEnded() {
		v.leadToLogin()
		return
	}
	w := &view{Root: v.root, Brand: v.title, Title: title, Page: page, CSS: styleName, JS: jsName,
		InKeys: strings.HasPrefix(v.path, "keys/"), Data: data}
	if key := v.caller.Key(); key != nil {
		w.Operator, w.OperatorKey, w.CanLogOut = key.Name, key.ID, v.login != nil
		w.MayWrite = v.mayWrite()
		w.MayAdmin = v.caller.Has(manage.Admin)
		w.Note = v.notes.take(v.r.URL.Query().Get(noteParam), v.caller.Actor())
	}
	b := buffers.Get().(*bytes.Buffer)
	b.Reset()
	defer func() {
		if b.Cap() <= maxKeptBuffer {
			buffers.Put(b)
		}
	}()
	if err := pageTemplates[page].Execute(b, w); err != nil {
		v.warn("console could not render a page", "page", page, "error", err)
		http.Error(v.w, "The page cannot be shown.", http.StatusInternalServerError)
		return
	}
	h := v.w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Length", strconv.Itoa(b.Len()))
	v.w.WriteHeader(status)
	_, _ = v.w.Write(b.Bytes())
}

var functions = template.FuncMap{
	"when":        when,
	"used":        used,
	"num":         number,
	"cut":         cut,
	"plural":      plural,
	"refill":      refill,
	"stamp":       func(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) },
	"icon":        func() template.URL { return icon },
	"lifetimes":   lifetimeNames,
	"refilltimes": func() []pair { return refillTimes },
	"graces":      func() []pair { return graces },
	"verbs":       func() []*verb { return verbs },
}

// icon is the picture of a tab: a key.
const icon = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E" +
	"%3Cg fill='none' stroke='%23587aa6' stroke-width='2'%3E%3Ccircle cx='5' cy='11' r='3.500'/%3E" +
	"%3Cpath d='M7.500 8.500L14 2m-3 3l2.500 2.500'/%3E%3C/g%3E%3C/svg%3E"

// A moment is a time as a page shows the time: relative, and exact when the pointer is over it.
type moment struct{ Machine, Exact, Relative string }

// when returns the moment for a time, or nil for the zero time.
func when(t time.Time) *moment {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &moment{t.Format(time.RFC3339), t.Format("2 January 2006, 15:04:05 UTC"),
		relative(time.Since(t))}
}

// used returns the moment for the minute of a last use, or nil for the zero time. Seconds are not
// known.
func used(t time.Time) *moment {
	m := when(t)
	if m == nil {
		return nil
	}
	m.Exact = t.UTC().Format("2 January 2006, 15:04 UTC")
	if time.Since(t) < time.Minute {
		m.Relative = relative(0)
	}
	return m
}

// relative returns how long ago something was, or how far in the future it is if ago is negative.
func relative(ago time.Duration) string {
	in, d := ago < 0, ago.Abs()
	text := ""
	switch {
	case d < 10*time.Second && in:
		return "now"
	case d < 10*time.Second:
		return "just now"
	case d < time.Minute:
		text = plural(int(d/time.Second), "second")
	case d < time.Hour:
		text = plural(int(d/time.Minute), "minute")
	case d < 48*time.Hour:
		text = plural(int(d/time.Hour), "hour")
	case d < 60*24*time.Hour:
		text = plural(int(d/(24*time.Hour)), "day")
	case d < 2*365*24*time.Hour:
		text = plural(int(d/(30*24*time.Hour)), "month")
	default:
		text = plural(int(d/(365*24*time.Hour)), "year")
	}
	if in {
		return "in " + text
	}
	return text + " ago"
}

// number returns a number with a comma between thousands.
func number(n any) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// plural returns a number and a noun.
func plural(n any, noun string) string {
	text := number(n)
	if text == "1" {
		return text + " " + noun
	}
	return text + " " + noun + "s"
}

// refill returns when the credits of a key are filled up.
func refill(r keystore.Refill) string {
	when := "every " + r.Every.String()
	switch {
	case r.Amount == 0:
		return "not filled up"
	case r.Daily:
		when = "each day at 00:00 UTC"
	case r.MonthDay != 0:
		when = fmt.Sprintf("on day %d of each month at 00:00 UTC", r.MonthDay)
	}
	return "filled up to " + number(r.Amount) + " " + when
}

// cut returns a text with at most n characters.
func cut(n int, text string) string {
	i := 0
	for at := range text {
		if i++; i == n && at < len(text) {
			rest := text[at:]
			if len([]rune(rest)) > 1 {
				return text[:at] + "…"
			}
			return text
		}
	}
	return text
}

// sentence returns a text that begins with a capital letter and ends with a full stop.
func sentence(text string) string {
	if text == "" {
		return ""
	}
	return strings.ToUpper(text[:1]) + text[1:] + "."
}
