package console

import (
	"bytes"
	"context"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An eventFilter selects events. The filter is the query of the page.
type eventFilter struct {
	Key, Actor, Action string
	From, Until        string // of the form of timeLayout, in UTC
	Cursor             int64  // the time of the last event before the page, in nanoseconds since 1970
	All                bool   // look through the whole store

	from, until time.Time
}

// timeLayout is the form of times in forms: what an input of the type datetime-local sends.
const timeLayout = "2006-01-02T15:04"

var actionNames = []keystore.Action{keystore.ActionCreate, keystore.ActionUpdate,
	keystore.ActionRotate, keystore.ActionDisable, keystore.ActionEnable, keystore.ActionRevoke,
	keystore.ActionCredits, keystore.ActionRehash, keystore.ActionImport, keystore.ActionRestore,
	keystore.ActionPurge}

// eventFilterOf reads the filter of a query. A value that is not valid selects no filter.
func eventFilterOf(q url.Values) eventFilter {
	f := eventFilter{Actor: strings.TrimSpace(q.Get("actor")), All: q.Get("all") != ""}
	key := strings.TrimSpace(q.Get("key"))
	if id, ok := keystore.ParseID(key); ok {
		key = id // of a hint, or of a whole key in the wrong place
	}
	if isID(key) {
		f.Key = key
	}
	if action := q.Get("action"); slices.Contains(actionNames, keystore.Action(action)) {
		f.Action = action
	}
	f.From, f.from = timeOf(q.Get("from"))
	f.Until, f.until = timeOf(q.Get("until"))
	f.Cursor, _ = strconv.ParseInt(q.Get("cursor"), 10, 64)
	f.Cursor = max(0, f.Cursor)
	return f
}

// timeOf parses a time of a form. For any other text, timeOf returns "" and the zero time.
func timeOf(text string) (string, time.Time) {
	t, err := parseTime(text)
	if err != nil {
		return "", time.Time{}
	}
	return text, t
}

func parseTime(text string) (time.Time, error) {
	t, err := time.Parse(timeLayout, text)
	if err != nil {
		t, err = time.Parse(timeLayout+":05", text)
	}
	return t, err
}

func (f eventFilter) query() template.URL {
	q := url.Values{}
	for _, p := range []pair{{"key", f.Key}, {"actor", f.Actor}, {"action", f.Action},
		{"from", f.From}, {"until", f.Until}} {
		if p.Value != "" {
			q.Set(p.Name, p.Value)
		}
	}
	if f.Cursor != 0 {
		q.Set("cursor", strconv.FormatInt(f.Cursor, 10))
	}
	if f.All {
		q.Set("all", "1")
	}
	return template.URL(q.Encode()) // Encode escapes everything
}

// Filters reports whether the filter selects only some events.
func (f eventFilter) Filters() bool {
	return f.Key != "" || f.From != "" || f.Until != "" || f.reads()
}

// reads reports whether events must be read to find those that the filter selects.
func (f eventFilter) reads() bool { return f.Actor != "" || f.Action != "" }

func (f eventFilter) selects(e keystore.Event) bool {
	return (f.Actor == "" || e.Actor == f.Actor) &&
		(f.Action == "" || e.Action == keystore.Action(f.Action))
}

// storeQuery returns the part of the filter that the store evaluates. The page evaluates the rest,
// for the same reason as keyFilter.selects.
func (f eventFilter) storeQuery(newest bool) keystore.EventQuery {
	q := keystore.EventQuery{KeyID: f.Key, Until: f.until, Newest: newest}
	if !f.from.IsZero() {
		q.After = f.from.Add(-1)
	}
	if !q.Until.IsZero() {
		q.Until = q.Until.Add(time.Minute - 1) // the form has no seconds: the whole minute
	}
	cursor := time.Unix(0, f.Cursor)
	switch {
	case f.Cursor == 0:
	case newest && (q.Until.IsZero() || cursor.Before(q.Until)):
		q.Until = cursor.Add(-1)
	case !newest && cursor.After(q.After):
		q.After = cursor
	}
	return q
}

// An eventList is the content of the page with events, and of the events on the page of a key.
type eventList struct {
	Filter  eventFilter
	Events  []eventView
	Few     bool // only the last events, for the page of a key
	Damaged int
	Oldest  bool
	First   bool
	More    template.URL // the query of the next page; "" for the last page
	FirstQ  template.URL // the query of the first page
	Partial time.Time    // the search has ended early, at this time; zero: it has not
	All     template.URL // the query of a search through the whole store
	Tail    string       // the query of the stream that continues the page; "" if no stream does
	Actions []keystore.Action
}

// An eventView is an event, with what the page of an event shows besides.
type eventView struct {
	keystore.Event
	Root    string // the URL of the overview, relative to the page
	KeyName string // "": not known
	Few     bool   // without the key
}

// The largest sums of the lengths of actors and reasons on a page of events, and on the page of a
// key. These texts may be long, and a page must not be.
const (
	maxEventText = 12 << 10
	maxFewText   = 4 << 10
)

// fewEvents is how many events the page of a key shows.
const fewEvents = 10

func (v *visit) showAudit() {
	f := eventFilterOf(v.r.URL.Query())
	l := &eventList{Filter: f, First: f.Cursor == 0, Actions: actionNames}
	if err := v.findEvents(f, l); err != nil {
		v.fail(keyError(err))
		return
	}
	first := f
	first.Cursor = 0
	l.FirstQ = first.query()
	if l.First && f.Until == "" && !l.Oldest {
		after := "0"
		if len(l.Events) > 0 {
			after = strconv.FormatInt(l.Events[0].At.UnixNano(), 10)
		} else if f.Filters() {
			after = strconv.FormatInt(time.Now().UnixNano(), 10)
		}
		l.Tail = strings.TrimPrefix(string(f.query())+"&after="+after, "&")
	}
	v.render(http.StatusOK, "audit", "Audit", l)
}

// findEvents adds the events of a page to a list.
func (v *visit) findEvents(f eventFilter, l *eventList) error {
	limit, end, err := v.beginSearch(f.All)
	if err != nil {
		return err
	}
	defer end()
	return v.inOrder(func(newest bool) error { return v.readEvents(f, l, limit, newest) })
}

// readEvents is findEvents in one of the two orders. ErrInvalid means that nothing was added.
func (v *visit) readEvents(
	f eventFilter, l *eventList, limit time.Duration, newest bool,
) error {
	size, most := pageSize, maxEventText
	if l.Few {
		size, most = fewEvents, maxFewText
	}
	q := f.storeQuery(newest)
	l.Oldest = !newest
	if !f.reads() {
		q.Limit = size + 1
	}
	begin := time.Now()
	names := v.keyNames()
	text := 0
	for e, err := range v.store.Events(v.ctx(), q) {
		switch {
		case errors.Is(err, keystore.ErrCorrupt):
			l.Damaged++
			continue
		case err != nil:
			return err
		}
		if f.selects(e) {
			text += len(e.Reason) + len(e.Actor)
			if n := len(l.Events); n == size || n > 0 && text > most {
				l.More = f.next(l.Events[n-1].At)
				return nil
			}
			row := eventView{Event: e, Root: v.root, Few: l.Few}
			if !l.Few {
				row.KeyName = names(e.KeyID)
			}
			l.Events = append(l.Events, row)
		}
		if f.reads() && time.Since(begin) > limit {
			l.Partial, l.More = e.At, f.next(e.At)
			all := f
			all.All = true
			l.All = all.query()
			return nil
		}
	}
	return nil
}

// next returns the query of the page that continues at an event.
func (f eventFilter) next(at time.Time) template.URL {
	f.Cursor = at.UnixNano()
	return f.query()
}

// keyNames returns a function that returns the name of a key, or "" if the name is not known.
func (v *visit) keyNames() func(id string) string {
	known := make(map[string]string)
	begin := time.Now()
	return func(id string) string {
		name, ok := known[id]
		if !ok && time.Since(begin) < v.patience {
			if key, err := v.store.Get(v.ctx(), id); err == nil {
				name = key.Name
			}
			known[id] = name
		}
		return name
	}
}

// streams counts the streams of events that are open.
type streams struct {
	mu  sync.Mutex // guards all below
	all map[string]int
	n   int
}

const (
	maxStreams      = 512 // of all operators
	maxActorStreams = 16  // of one operator
	// beat is the longest time without a line on a stream of events. A line shows that the browser
	// is still there.
	beat = 20 * time.Second
	// writePatience is how long a browser may take to read a line.
	writePatience = 10 * time.Second
	// maxAhead is how many events wait to be sent.
	maxAhead = 16
)

// enter reports whether an actor may open a further stream. The caller calls leave at its end.
func (s *streams) enter(actor string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n >= maxStreams || s.all[actor] >= maxActorStreams {
		return false
	}
	if s.all == nil {
		s.all = make(map[string]int)
	}
	s.n++
	s.all[actor]++
	return true
}

func (s *streams) leave(actor string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n--
	if s.all[actor]--; s.all[actor] == 0 {
		delete(s.all, actor)
	}
}

// tail sends the events that a filter selects from now on, as server-sent events, each as a row of
// the table. With the query quiet, tail sends no events. In both cases, the stream ends when the
// login ends, and so an open page notices the end of the login.
func (v *visit) tail() {
	actor := v.caller.Actor()
	if !v.streams.enter(actor) {
		v.w.WriteHeader(http.StatusTooManyRequests)
		return
	}
	defer v.streams.leave(actor)
	ctx, cancel := context.WithCancel(v.ctx())
	defer cancel()
	defer context.AfterFunc(v.Console.ctx, cancel)()
	if v.login != nil {
		defer context.AfterFunc(v.login.session.Context(), cancel)()
	}
	s := &sender{w: v.w, control: http.NewResponseController(v.w), login: v.login}
	_ = s.control.SetReadDeadline(time.Time{}) // a deadline of the server is for a short request
	v.w.Header().Set("Content-Type", "text/event-stream")
	if v.r.Method == http.MethodHead {
		return
	}
	if !s.send(": the events follow\n\n") {
		return
	}
	v.follow(ctx, s)
	if v.login != nil && (v.login.session.Cause() != nil || v.login.session.Context().Err() != nil) {
		s.login = nil
		s.send("event: end\ndata: login\n\n")
	}
}

// follow sends events until ctx or the store ends the stream. A goroutine reads the events, so that
// the stream can send a line without events. The goroutine is a few events ahead of the browser:
// the store keeps the events for a slow browser.
func (v *visit) follow(ctx context.Context, s *sender) {
	query := v.r.URL.Query()
	f := eventFilterOf(query)
	q := keystore.EventQuery{KeyID: f.Key, Actor: f.Actor, Action: keystore.Action(f.Action)}
	cursor := v.r.Header.Get("Last-Event-Id") // of a browser that connects again
	if all := query["after"]; cursor == "" && len(all) > 0 {
		cursor = all[len(all)-1]
	}
	after, _ := strconv.ParseInt(cursor, 10, 64)
	q.After = time.Unix(0, max(0, after))
	results := make(chan keystore.Event, maxAhead)
	var reader sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer reader.Wait()
	defer cancel()
	if query.Get("quiet") == "" {
		reader.Go(func() {
			defer cancel() // the store has closed
			for event, err := range v.store.Follow(ctx, q) {
				if errors.Is(err, keystore.ErrCorrupt) {
					continue
				}
				if err != nil {
					return
				}
				select {
				case results <- event:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	ticker := time.NewTicker(beat)
	defer ticker.Stop()
	for {
		sent := true
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			sent = v.stillUser() && s.send(": \n\n")
		case e := <-results:
			key, _ := v.store.Get(ctx, e.KeyID)
			row := eventView{Event: e, Root: "./"} // the page is above the stream
			if key != nil {
				row.KeyName = key.Name
			}
			sent = s.sendEvent(row)
		}
		if !sent {
			return
		}
	}
}

// stillUser reports whether the application still lets its user look at keys. With a login of the
// console, stillUser returns true.
func (v *visit) stillUser() bool {
	if v.user == nil {
		return true
	}
	actor, scopes, ok := v.user(v.r)
	return ok && userOf(actor, scopes).Has(manage.Read) && "console:"+actor == v.caller.Actor()
}

// A sender writes a stream of events.
type sender struct {
	w       http.ResponseWriter
	control *http.ResponseController
	login   *login // nothing is sent after the end of the login; may be nil
}

// send reports whether the browser is there.
func (s *sender) send(text string) bool {
	if s.login != nil && s.login.session.Cause() != nil {
		return false
	}
	_ = s.control.SetWriteDeadline(time.Now().Add(writePatience))
	if _, err := s.w.Write([]byte(text)); err != nil {
		return false
	}
	return s.control.Flush() == nil
}

// sendEvent sends a row of the table of events.
func (s *sender) sendEvent(row eventView) bool {
	var b bytes.Buffer
	if err := eventRow.Execute(&b, row); err != nil {
		return false
	}
	html := strings.Join(strings.Fields(b.String()), " ")
	return s.send("id: " + strconv.FormatInt(row.At.UnixNano(), 10) + "\ndata: " + html + "\n\n")
}
