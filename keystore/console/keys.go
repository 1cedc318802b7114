package console

import (
	"cmp"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const (
	// pageSize is how many keys or events a page shows.
	pageSize = 50
	// pagePatience is how long a page looks for keys or events. If a filter selects few of many
	// keys, the page shows what was found, and a link to continue.
	pagePatience = 15 * time.Millisecond
	// searchPatience is how long a page looks if the operator has asked for the whole store.
	searchPatience = 20 * time.Second
	// maxSearches is how many pages may look through the whole store at the same time.
	maxSearches = 2
)

// A keyFilter selects keys. The filter is the query of the page.
type keyFilter struct {
	Text, Owner, State, Scope string
	Expiring, Unused          int // days; 0: no such filter
	Cursor                    string
	All                       bool // look through the whole store

	status keystore.Status
}

// keyFilterOf reads the filter of a query. A value that is not valid selects no filter.
func keyFilterOf(q url.Values) keyFilter {
	f := keyFilter{Text: strings.TrimSpace(q.Get("text")), Owner: q.Get("owner"),
		Scope: strings.TrimSpace(q.Get("scope")), All: q.Get("all") != ""}
	if f.status.UnmarshalText([]byte(q.Get("state"))) == nil && f.status != 0 {
		f.State = f.status.String()
	}
	f.Expiring, f.Unused = days(q.Get("expiring")), days(q.Get("unused"))
	if cursor := q.Get("cursor"); isID(cursor) {
		f.Cursor = cursor
	}
	return f
}

// days returns a number of days, or 0 if the text is no such number.
func days(text string) int {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > 3650 {
		return 0
	}
	return n
}

// query returns the query of a page with this filter.
func (f keyFilter) query() template.URL {
	q := url.Values{}
	set := func(name, value string) {
		if value != "" && value != "0" {
			q.Set(name, value)
		}
	}
	set("text", f.Text)
	set("owner", f.Owner)
	set("state", f.State)
	set("scope", f.Scope)
	set("expiring", strconv.Itoa(f.Expiring))
	set("unused", strconv.Itoa(f.Unused))
	set("cursor", f.Cursor)
	if f.All {
		q.Set("all", "1")
	}
	return template.URL(q.Encode()) // Encode escapes everything
}

// Filters reports whether the filter selects only some keys.
func (f keyFilter) Filters() bool {
	return f.Owner != "" || f.reads()
}

// reads reports whether keys must be read to find those that the filter selects. The store has an
// index by owner.
func (f keyFilter) reads() bool {
	return f.Text != "" || f.State != "" || f.Scope != "" || f.Expiring != 0 || f.Unused != 0
}

// selects reports whether the filter selects a key. The store does not evaluate these conditions,
// so that the page sees every key that the store reads, and can end after any key.
func (f keyFilter) selects(k *keystore.Key, now time.Time) bool {
	if f.status != 0 && k.Status() != f.status || f.Scope != "" && !k.HasScope(f.Scope) ||
		f.Text != "" && !hasText(k, f.Text) {
		return false
	}
	if f.Expiring != 0 && (k.Status() != keystore.StatusActive || k.ExpiresAt.IsZero() ||
		!k.ExpiresAt.Before(now.Add(time.Duration(f.Expiring)*day))) {
		return false
	}
	since := now.Add(-time.Duration(f.Unused) * day)
	return f.Unused == 0 || k.Status() == keystore.StatusActive && k.CreatedAt.Before(since) &&
		k.LastUsedAt.Before(since) && k.Live == 0
}

// hasText reports whether the name, the owner or the ID of a key contains a text, as
// keystore.Query.Text does.
func hasText(k *keystore.Key, text string) bool {
	text = strings.ToLower(text)
	return strings.Contains(strings.ToLower(k.Name), text) ||
		strings.Contains(strings.ToLower(k.Owner), text) ||
		len(text) >= 6 && strings.Contains(k.ID, text)
}

// A keyList is the content of the page with keys.
type keyList struct {
	Filter  keyFilter
	Keys    []keyRow
	Damaged int
	Oldest  bool         // the oldest key comes first, because the backend cannot do better
	First   bool         // this is the first page
	More    template.URL // the query of the next page; "" for the last page
	Partial time.Time    // where the search has ended early; zero: it has not
	All     template.URL // the query of a search through the whole store
	FirstQ  template.URL // the query of the first page

	// The choices of the filter.
	States                   []string
	ExpiringDays, UnusedDays []int
}

// A keyRow is a key as a list shows the key.
type keyRow struct {
	*keystore.Key
	State  string
	Few    []string // the first scopes
	Others int      // how many more scopes there are
}

func rowOf(k *keystore.Key) keyRow {
	scopes := k.Scopes()
	few := scopes[:min(2, len(scopes))]
	return keyRow{Key: k, State: k.Status().String(), Few: few, Others: len(scopes) - len(few)}
}

func (v *visit) showKeys() {
	f := keyFilterOf(v.r.URL.Query())
	l := &keyList{Filter: f, First: f.Cursor == "",
		States:       []string{"active", "pending", "expired", "disabled", "revoked"},
		ExpiringDays: []int{1, 7, 30}, UnusedDays: []int{30, 90, 365}}
	if err := v.findKeys(f, l); err != nil {
		v.fail(err)
		return
	}
	first := f
	first.Cursor = ""
	l.FirstQ = first.query()
	v.render(http.StatusOK, "keys", "Keys", l)
}

// beginSearch returns how long a search may take. If all is true, the search may look through the
// whole store, and beginSearch waits while too many others do. end must be called after the search.
func (v *visit) beginSearch(all bool) (limit time.Duration, end func(), err error) {
	if !all {
		return v.patience, func() {}, nil
	}
	select {
	case v.searching <- struct{}{}:
		return searchPatience, func() { <-v.searching }, nil
	case <-v.ctx().Done():
		return 0, nil, v.ctx().Err()
	}
}

// findKeys adds the keys of a page to a list.
func (v *visit) findKeys(f keyFilter, l *keyList) error {
	limit, end, err := v.beginSearch(f.All)
	if err != nil {
		return err
	}
	defer end()
	return v.inOrder(func(newest bool) error { return v.readKeys(f, l, limit, newest) })
}

// inOrder calls read with true, to read the newest first. If the backend cannot do this, the store
// returns ErrInvalid, and inOrder calls read with false. A query with a wrong ID gets ErrInvalid in
// both orders, and says nothing about the backend.
func (v *visit) inOrder(read func(newest bool) error) error {
	newest := !v.oldest.Load()
	err := read(newest)
	if newest && errors.Is(err, keystore.ErrInvalid) {
		if err = read(false); err == nil {
			v.oldest.Store(true)
		}
	}
	return err
}

// readKeys is findKeys in one of the two orders. ErrInvalid means that nothing was added.
func (v *visit) readKeys(f keyFilter, l *keyList, limit time.Duration, newest bool) error {
	l.Oldest = !newest
	q := keystore.Query{Owner: f.Owner, Cursor: f.Cursor, Newest: newest}
	if !f.reads() {
		q.Limit = pageSize + 1 // the store reads no more than this
	}
	begin := time.Now()
	last, lastSeen := "", time.Time{}
	for key, err := range v.store.List(v.ctx(), q) {
		switch {
		case errors.Is(err, keystore.ErrCorrupt):
			l.Damaged++
			continue
		case err != nil:
			return err
		}
		if f.selects(key, begin) {
			if len(l.Keys) == pageSize {
				l.More = f.next(last)
				return nil
			}
			l.Keys = append(l.Keys, rowOf(key))
		}
		last, lastSeen = key.ID, key.CreatedAt
		if f.reads() && time.Since(begin) > limit {
			l.Partial, l.More = lastSeen, f.next(last)
			all := f
			all.All = true
			l.All = all.query()
			return nil
		}
	}
	return nil
}

// next returns the query of the page after a key.
func (f keyFilter) next(id string) template.URL {
	f.Cursor = id
	return f.query()
}

// A keyPage is the content of the page of one key.
type keyPage struct {
	keyRow
	AllScopes   []string
	Metadata    []pair
	Networks    []string
	Previous    bool              // the previous secret is still valid
	Credits     *keystore.Credits // nil: the use of the key is not limited
	LostCredits bool              // the balance of the key is damaged
	Own         bool              // the operator is logged in with this key
	Events      *eventList
	Actions     []action
	Ceiling     string // why some actions are not there; "": all are there
}

type pair struct{ Name, Value string }

// An action is a link to a page that changes a key.
type action struct {
	Name, Label string
	Danger      bool
}

func (v *visit) showKey() {
	key, err := v.store.Get(v.ctx(), v.id)
	if err != nil {
		v.fail(keyError(err))
		return
	}
	p := &keyPage{keyRow: rowOf(key), AllScopes: key.Scopes(), Own: v.isOwn(key),
		Metadata: pairsOf(key), Previous: key.PreviousUntil.After(time.Now())}
	for _, network := range key.AllowedNetworks() {
		p.Networks = append(p.Networks, network.String())
	}
	if p.Credits, p.LostCredits, err = v.readCredits(v.id); err != nil {
		v.fail(keyError(err))
		return
	}
	p.Actions, p.Ceiling = v.actions(key)
	p.Events = &eventList{Few: true}
	if err := v.findEvents(eventFilter{Key: key.ID}, p.Events); err != nil {
		v.fail(err)
		return
	}
	v.render(http.StatusOK, "key", key.Name, p)
}

// keyError returns the error of a look-up by the ID in a path: a text that is no ID names no key.
func keyError(err error) error {
	if errors.Is(err, keystore.ErrInvalid) {
		return keystore.ErrNotFound
	}
	return err
}

func pairsOf(k *keystore.Key) []pair {
	var pairs []pair
	for name, value := range k.Metadata() {
		pairs = append(pairs, pair{name, value})
	}
	slices.SortFunc(pairs, func(a, b pair) int { return cmp.Compare(a.Name, b.Name) })
	return pairs
}

// isOwn reports whether the operator is logged in with the key.
func (v *visit) isOwn(k *keystore.Key) bool { return v.login != nil && v.login.key.ID == k.ID }

// actions returns what the operator may do with a key, and why the operator may not do the rest.
func (v *visit) actions(k *keystore.Key) (all []action, ceiling string) {
	if !v.mayWrite() || !k.RevokedAt.IsZero() {
		return nil, ""
	}
	o := v.operator(0)
	add := func(err error, a action) {
		if err == nil {
			all = append(all, a)
		} else if ceiling == "" {
			ceiling = sentence(errorText(err))
		}
	}
	add(o.MayRotate(k), action{"rotate", "Rotate", false})
	add(o.MayEnable(k), action{"edit", "Edit", false})
	add(o.MayEnable(k), action{"credits", "Credits", false})
	if k.DisabledAt.IsZero() {
		add(o.MayStop(k), action{"disable", "Disable", false})
	} else {
		add(o.MayEnable(k), action{"enable", "Enable", false})
	}
	add(o.MayStop(k), action{"revoke", "Revoke", true})
	return all, ceiling
}
