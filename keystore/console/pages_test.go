package console_test

import (
	"bytes"
	"fmt"
	"html"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// Who may do what. The expected result is computed here from the words of the rule.
func TestRoles(t *testing.T) {
	for _, tt := range []struct {
		scopes      []string
		write, full bool
		readOnly    bool
	}{
		{scopes: []string{"keys:read"}},
		{scopes: []string{"keys:read", "keys:write"}, write: true},
		{scopes: []string{"keys:admin"}, write: true, full: true},
		{scopes: []string{"*"}, write: true, full: true},
		{scopes: []string{"keys:admin"}, full: true, readOnly: true},
	} {
		var opts []console.Option
		if tt.readOnly {
			opts = append(opts, console.ReadOnly())
		}
		r := newRig(t, opts...)
		b, _ := r.as(t, tt.scopes...)
		id := keystoretest.MustCreate(t, r.store, keystore.Spec{}).Key.ID
		for _, path := range []string{"", "keys", "keys/" + id, "audit"} {
			p := b.get(path)
			require.Equal(t, tt.full, strings.Contains(p.body, `href="`+root(path)+`backup"`), path)
			if path != "audit" {
				require.Equal(t, tt.write, strings.Contains(p.body, "/new\"") ||
					strings.Contains(p.body, "/revoke\""), "%v %s", tt, path)
			}
		}
		for path, form := range changes("ID") {
			if path == "logout" {
				continue
			}
			id = keystoretest.MustCreate(t, r.store, keystore.Spec{}).Key.ID
			path = strings.ReplaceAll(path, "ID", id)
			if form["id"] != nil {
				form.Set("id", id)
			}
			allowed := tt.write
			if path == "backup" {
				allowed = tt.full
			}
			p := b.post(path, form)
			if allowed {
				require.Equal(t, http.StatusOK, p.status, "%v %s: %s", tt, path, p.body)
			} else {
				require.Contains(t, []int{http.StatusForbidden, http.StatusNotFound}, p.status,
					"%v %s: %s", tt, path, p.body)
			}
			if !allowed && tt.readOnly {
				require.Equal(t, http.StatusNotFound, p.status)
				require.Equal(t, http.StatusNotFound, b.do(http.MethodGet, path, nil, nil).status)
			}
		}
	}
	r := newRig(t)
	for _, scopes := range [][]string{nil, {"orders:*"}, {"keys:write"}} {
		issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: scopes})
		p := r.browser(t).post("login", url.Values{"key": {issued.Secret.Reveal()}})
		require.Equal(t, http.StatusForbidden, p.status)
		require.Contains(t, p.body, "lacks the scope keys:read")
	}
	require.Zero(t, r.store.Stats().Live, "a refused login leaves no session")
}

func root(path string) string {
	if n := strings.Count(path, "/"); n > 0 {
		return strings.Repeat("../", n)
	}
	return "./"
}

// An operator without keys:admin cannot make more of a key than the operator's own key is. The
// matrix of the rules is in package interceptor/admin, which uses the same code.
func TestCeiling(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:read", "keys:write", "orders:*")
	admin := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"}}).Key.ID
	other := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"billing"}}).Key.ID
	for _, path := range []string{"/rotate", "/edit", "/credits", "/disable", "/enable", "/revoke"} {
		require.NotContains(t, b.get("keys/"+admin).body, path+`"`)
	}
	require.Contains(t, b.get("keys/"+admin).body, "You cannot do everything with this key")
	for path, form := range changes(admin) {
		if strings.HasPrefix(path, "keys/"+admin) {
			p := b.post(path, form)
			require.Contains(t, []int{http.StatusForbidden, 422}, p.status, "%s", path)
			require.Contains(t, p.body, "lacks these scopes")
		}
	}
	require.Contains(t, b.post("keys/act", url.Values{"do": {"revoke"}, "id": {admin, other}}).body,
		"Revoked 1 key: 0 live streams ended. 1 key did not change")
	key, err := r.store.Get(t.Context(), admin)
	require.NoError(t, err)
	require.EqualValues(t, 1, key.Revision)

	made := b.post("keys/new", b.fill("keys/new",
		url.Values{"name": {"x"}, "expires": {"never"}, "scopes": {"orders:read billing"}}))
	require.Equal(t, http.StatusUnprocessableEntity, made.status)
	require.Contains(t, made.body, `id="scopes-error">Your own key lacks these scopes: billing.`)
}

// Errors are beside their fields, and what the operator has written stays.
func TestErrorsBesideFields(t *testing.T) {
	r := newRigOver(t, keystoretest.New(t, &keystore.Options{MaxLifetime: 100 * 24 * time.Hour}))
	b, _ := r.as2(t)
	for field, tt := range map[string]struct{ value, error string }{
		"name":       {" ", "The name is empty"},
		"owner":      {strings.Repeat("o", 257), "The owner has 257 bytes"},
		"scopes":     {"orders:read b*d", "Scope 2 "},
		"expires":    {"365d", "The expiry"},
		"expires_at": {"tomorrow", "This is not a time"},
		"not_before": {"2026", "This is not a time"},
		"networks":   {"10.0.0.0/33", "is not a network"},
		"per_second": {"-1", "Write a number above 0"},
		"burst":      {"many", "Write a whole number"},
		"metadata":   {"novalue", "has no name and value"},
	} {
		form := b.fill("keys/new", url.Values{"name": {"kept"}, "owner": {"kept too"},
			"expires": {"30d"}, "scopes": {"kept:*"}})
		if field == "expires_at" {
			form.Set("expires", "at")
		}
		form.Set(field, tt.value)
		p := b.post("keys/new", form)
		require.Equal(t, http.StatusUnprocessableEntity, p.status, field)
		require.Contains(t, p.body, `id="`+field+`-error">`, field)
		_, after, _ := strings.Cut(p.body, `id="`+field+`-error">`)
		text, _, _ := strings.Cut(after, "</p>")
		require.Contains(t, text, tt.error, field)
		require.NotContains(t, text, "Spec.", field)
		require.NotContains(t, text, "Options.", field)
		if field != "name" {
			require.Contains(t, p.body, `value="kept"`, field)
		}
	}
	for _, form := range []url.Values{nil, {"grace": {"other"}}, {"grace": {"other"},
		"other": {"soon"}}, {"grace": {"other"}, "other": {"-1h"}}, {"grace": {"5h"}}} {
		id := keystoretest.MustCreate(t, r.store,
			keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)}).Key.ID
		p := b.post("keys/"+id+"/rotate", b.fill("keys/"+id+"/rotate", form))
		require.Equal(t, http.StatusUnprocessableEntity, p.status)
		require.Contains(t, p.body, `id="grace-error">`)
	}
	id := keystoretest.MustCreate(t, r.store,
		keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)}).Key.ID
	p := b.post("keys/"+id+"/revoke", url.Values{"reason": {strings.Repeat("r", 1025)}})
	require.Equal(t, http.StatusUnprocessableEntity, p.status)
	require.Contains(t, p.body, `id="reason-error">`)
	p = b.post("keys/act",
		url.Values{"do": {"disable"}, "id": {id}, "reason": {strings.Repeat("r", 1025)}})
	require.Equal(t, http.StatusUnprocessableEntity, p.status)
	require.Contains(t, p.body, `id="reason-error">`)
}

// as2 is as with keys:admin, for a store with a MaxLifetime.
func (r *rig) as2(t testing.TB) (*browser, *keystore.Issued) {
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{
		Name: "operator", Scopes: []string{"keys:admin"}, ExpiresAt: time.Now().Add(time.Hour)})
	return r.browser(t).logIn(issued.Secret.Reveal()), issued
}

// An operator who has seen another revision changes nothing.
func TestTwoOperatorsChangeOneKey(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:admin")
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{})
	path := "keys/" + issued.Key.ID
	edit := b.fill(path+"/edit", url.Values{"name": {"first"}, "expires": {"never"}})
	rotation := b.fill(path+"/rotate", url.Values{"grace": {"0"}})
	require.NoError(t, r.store.Disable(t.Context(), issued.Key.ID, ""))
	require.NoError(t, r.store.Enable(t.Context(), issued.Key.ID))
	for path, form := range map[string]url.Values{path + "/edit": edit, path + "/rotate": rotation} {
		p := b.post(path, form)
		require.Equal(t, http.StatusConflict, p.status)
		require.Contains(t, p.body, "The key has changed")
	}
	_, err := r.store.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
}

// An edit that changes one field leaves the others as they are, to the nanosecond.
func TestEditKeepsTheRest(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:admin")
	expires := time.Now().Add(time.Hour + 123456789)
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Name: "before", Owner: "o",
		ExpiresAt: expires, NotBefore: expires.Add(-2 * time.Hour),
		Metadata: map[string]string{"a": " x\ny\\n ", "b": "\tz"}})
	path := "keys/" + issued.Key.ID + "/edit"
	body := b.get(path).body
	form := b.fill(path, nil)
	for _, m := range regexp.MustCompile(`<input id="[a-z_]+" name="([a-z_]+)"[^>]* value="([^"]*)"`).
		FindAllStringSubmatch(body, -1) {
		form.Set(m[1], m[2])
	}
	metadata := regexp.MustCompile(`(?s)<textarea id="metadata"[^>]*>(.*?)</textarea>`).
		FindStringSubmatch(body)[1]
	form.Set("metadata", strings.ReplaceAll(metadata, "\n", "\r\n"))
	form.Set("expires", "at")
	form.Set("name", "after")
	require.Equal(t, http.StatusOK, b.post(path, form).status)
	key, err := r.store.Get(t.Context(), issued.Key.ID)
	require.NoError(t, err)
	require.Equal(t, "after", key.Name)
	require.True(t, key.ExpiresAt.Equal(expires))
	require.True(t, key.NotBefore.Equal(expires.Add(-2*time.Hour)))
	require.Equal(t, issued.Key.Metadata(), key.Metadata())
}

// The list of keys has pages, newest first, and filters.
func TestListOfKeys(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:admin")
	for i := range 2*console.PageSize + 5 {
		spec := keystore.Spec{Name: fmt.Sprintf("key %03d", i), Owner: []string{"odd", "even"}[i%2]}
		if i%10 == 0 {
			spec.Scopes = []string{"tenth:*"}
		}
		keystoretest.MustCreate(t, r.store, spec)
	}
	names := regexp.MustCompile(`<a id="k-[^>]*>(key \d+|operator)</a>`)
	read := func(path string) (all []string) {
		for path != "" {
			body := b.get(path).body
			for _, m := range names.FindAllStringSubmatch(body, -1) {
				all = append(all, m[1])
			}
			path = ""
			if m := regexp.MustCompile(`rel="next" href="\./([^"]*)"`).FindStringSubmatch(body); m != nil {
				path = html.UnescapeString(m[1])
			}
		}
		return all
	}
	all := read("keys")
	require.Len(t, all, 2*console.PageSize+6)
	require.Equal(t, "key 104", all[0])
	require.Equal(t, "operator", all[len(all)-1])
	require.Len(t, read("keys?owner=odd"), console.PageSize+3)
	require.Len(t, read("keys?scope=tenth:one"), 11)
	require.Equal(t, []string{"key 042"}, read("keys?text=KEY+042"))
	require.Empty(t, read("keys?state=revoked"))
	require.Contains(t, b.get("keys?state=revoked").body, "No key matches the filter.")
	require.Empty(t, read("keys?unused=30"))
	require.Empty(t, read("keys?expiring=7"))
	require.Len(t, read("keys?state=active&owner=even&text=key+00"), 5)

	// If the time is over, the page shows what it has found, and continues.
	console.SetPatience(r.console, -1)
	require.Contains(t, b.get("keys?text=KEY+042").body, "The search has come to the keys")
	require.Equal(t, []string{"key 042"}, read("keys?text=KEY+042"))
	require.Contains(t, b.get("keys?text=KEY+042&all=1").body, ">key 042</a>")
}

// Several keys are selected, and changed with one reason.
func TestBulk(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	form := url.Values{"do": {"disable"}}
	var sessions []*keystore.Session
	for range 3 {
		issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Owner: "acme"})
		session, err := r.store.Bind(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		defer session.Close()
		sessions = append(sessions, session)
		form.Add("id", issued.Key.ID)
	}
	p := b.get("keys/act?" + form.Encode())
	require.Contains(t, p.body, "3 live streams will end.")
	require.Contains(t, p.body, "Disable 3 keys</button>")
	form.Set("reason", "unpaid")
	p = b.post("keys/act", form)
	require.Equal(t, "/keys/keys", p.url.Path)
	require.Contains(t, p.body, "Disabled 3 keys: 3 live streams ended.")
	for i, session := range sessions {
		require.ErrorIs(t, session.Cause(), keystore.ErrDisabled)
		key, err := r.store.Get(t.Context(), form["id"][i])
		require.NoError(t, err)
		require.Equal(t, "unpaid", key.DisableReason)
	}
	require.NotContains(t, b.get("keys?note=DISABLED").body, `role="status">D`)

	// The operator's own key comes last.
	form.Set("do", "revoke")
	form["id"] = append([]string{operator.Key.ID}, form["id"]...)
	require.Contains(t, b.get("keys/act?"+form.Encode()).body, "your login ends")
	require.Equal(t, "/keys/login", b.post("keys/act", form).url.Path)
	n, err := r.store.Count(t.Context(), keystore.Query{Status: keystore.StatusRevoked})
	require.NoError(t, err)
	require.Equal(t, 4, n)
}

// The stream of events continues the page without a gap, and continues after a reconnect.
func TestTail(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:read")
	before := keystoretest.MustCreate(t, r.store, keystore.Spec{Name: "before"})
	p := b.get("audit")
	path := regexp.MustCompile(`data-tail="\./([^"]+)"`).FindStringSubmatch(p.body)
	require.NotNil(t, path)
	tail := b.tail(html.UnescapeString(path[1]))
	filtered := b.tail("audit/tail?action=revoke&key=" + before.Key.ID + "&after=0")
	keystoretest.MustCreate(t, r.store, keystore.Spec{Name: "afterwards"})
	require.NoError(t, r.store.Revoke(t.Context(), before.Key.ID, "stolen"))
	row := tail.next(t)
	require.Contains(t, row, "afterwards")
	require.Contains(t, row, `href="./keys/`)
	require.Contains(t, tail.next(t), "stolen")
	require.Contains(t, filtered.next(t), "stolen")

	var cursor string
	for event, err := range r.store.Events(t.Context(), keystore.EventQuery{}) {
		require.NoError(t, err)
		if cursor = fmt.Sprint(event.At.UnixNano()); event.KeyID == before.Key.ID {
			break
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet,
		b.base+"audit/tail?after=0", nil)
	require.NoError(t, err)
	req.Header.Set("Last-Event-ID", cursor)
	res, err := b.http.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	head := make([]byte, 1024)
	n := 0
	for !bytes.Contains(head[:n], []byte("data:")) {
		m, err := res.Body.Read(head[n:])
		require.NoError(t, err)
		n += m
	}
	require.Contains(t, string(head[:n]), "afterwards")

	// A stream is bounded in number.
	for range console.MaxActorStreams - 3 {
		b.tail("audit/tail?quiet=1")
	}
	require.Equal(t, http.StatusTooManyRequests,
		b.do(http.MethodGet, "audit/tail?quiet=1", nil, nil).status)
	// Close of the console ends all streams.
	r.console.Close()
	tail.rest(t)
	require.Equal(t, http.StatusServiceUnavailable, b.do(http.MethodGet, "", nil, nil).status)
}

// The login ends after 30 minutes without a request, and after 8 hours.
func TestLoginTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		c, err := console.New(store)
		require.NoError(t, err)
		defer c.Close()
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: []string{"keys:read"}})
		var cookie *http.Cookie
		send := func(method, path string, form url.Values, refresh bool) *http.Response {
			req := httptest.NewRequest(method, "https://console.example/"+path,
				strings.NewReader(form.Encode()))
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			req.Header.Set("Sec-Fetch-Site", "same-origin")
			if refresh {
				req.Header.Set("X-Console-Refresh", "1")
			}
			if cookie != nil {
				req.AddCookie(cookie)
			}
			w := httptest.NewRecorder()
			c.ServeHTTP(w, req)
			return w.Result()
		}
		logIn := func() {
			cookie = nil
			res := send("POST", "login", url.Values{"key": {issued.Secret.Reveal()}}, false)
			require.Equal(t, http.StatusSeeOther, res.StatusCode)
			cookie = res.Cookies()[0]
		}
		shows := func() bool { return send("GET", "audit", nil, false).StatusCode == http.StatusOK }

		logIn()
		for range 3 {
			time.Sleep(30*time.Minute - time.Second)
			require.True(t, shows())
		}
		time.Sleep(30 * time.Minute)
		synctest.Wait()
		require.Zero(t, console.Logins(c), "the login ends without a request")
		require.Zero(t, store.Stats().Live)
		require.False(t, shows())

		logIn()
		for range 6 { // a page that refreshes does not count
			time.Sleep(5*time.Minute - time.Second)
			send("GET", "audit", nil, true)
		}
		time.Sleep(6 * time.Second)
		require.Equal(t, http.StatusUnauthorized, send("GET", "audit", nil, true).StatusCode)

		logIn()
		began := time.Now()
		for time.Since(began) < 8*time.Hour-20*time.Minute {
			time.Sleep(20 * time.Minute)
			require.True(t, shows())
		}
		time.Sleep(20 * time.Minute)
		synctest.Wait()
		require.Zero(t, console.Logins(c))

		// The key has a bounded number of logins: the oldest ends.
		logIn()
		first := cookie
		for range console.MaxKeyLogins {
			time.Sleep(time.Second)
			logIn()
		}
		require.Equal(t, console.MaxKeyLogins, console.Logins(c))
		require.True(t, shows())
		cookie = first
		require.False(t, shows())
		require.NoError(t, store.Revoke(t.Context(), issued.Key.ID, ""))
		synctest.Wait()
		require.Zero(t, console.Logins(c))
	})
}

// The store knows the last use of a key to the minute, so no page invents the seconds.
func TestLastUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		c, err := console.New(store, console.WithUser(
			func(*http.Request) (string, []string, bool) { return "u", []string{"keys:read"}, true }))
		require.NoError(t, err)
		defer c.Close()
		time.Sleep(40 * time.Second) // into the minute
		issued := keystoretest.MustCreate(t, store, keystore.Spec{})
		_, err = store.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		shown := func() string {
			w := httptest.NewRecorder()
			c.ServeHTTP(w, httptest.NewRequest("GET", "https://console.example/keys/"+issued.Key.ID, nil))
			_, after, found := strings.Cut(w.Body.String(), "<dt>Last used</dt>")
			require.True(t, found)
			text, _, _ := strings.Cut(after, "</dd>")
			return text
		}
		require.Contains(t, shown(), "title=\"1 January 2000, 00:00 UTC\">just now<")
		time.Sleep(20 * time.Second)
		require.Contains(t, shown(), ">1 minute ago<")
	})
}

// The console accepts a key only over TLS, from this machine, or behind a proxy with TLS.
func TestConnections(t *testing.T) {
	store := keystoretest.New(t, nil)
	issued := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: []string{"keys:admin"}})
	for _, tt := range []struct {
		url, remote string
		header      http.Header
		behind, ok  bool
	}{
		{url: "https://console.example/", remote: "192.0.2.1:1", ok: true},
		{url: "http://console.example/", remote: "192.0.2.1:1"},
		{url: "http://console.example/", remote: "192.0.2.1:1", behind: true, ok: true},
		{url: "http://127.0.0.1:8080/", remote: "127.0.0.1:1", ok: true},
		{url: "http://localhost:8080/", remote: "[::1]:1", ok: true},
		{url: "http://[::1]:8080/", remote: "[::1]:1", ok: true},
		{url: "http://localhost/", remote: "192.0.2.1:1"},
		{url: "http://console.example/", remote: "127.0.0.1:1"}, // a name that leads to this machine
		{url: "http://localhost.example/", remote: "127.0.0.1:1"},
		{url: "http://localhost/", remote: "127.0.0.1:1",
			header: http.Header{"X-Forwarded-For": {"192.0.2.1"}}},
		{url: "http://localhost/", remote: "@"},
	} {
		var opts []console.Option
		if tt.behind {
			opts = append(opts, console.BehindTLS())
		}
		c, err := console.New(store, opts...)
		require.NoError(t, err)
		form := url.Values{"key": {issued.Secret.Reveal()}}
		req := httptest.NewRequest(http.MethodPost, tt.url+"login", strings.NewReader(form.Encode()))
		req.RemoteAddr = tt.remote
		for name, values := range tt.header {
			req.Header[name] = values
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		c.ServeHTTP(w, req)
		page := httptest.NewRecorder()
		req = req.Clone(t.Context())
		req.Method = http.MethodGet
		c.ServeHTTP(page, req)
		if tt.ok {
			require.Equal(t, http.StatusSeeOther, w.Code, "%v: %s", tt, w.Body)
			require.Contains(t, page.Body.String(), `name="key"`)
		} else {
			require.Equal(t, http.StatusForbidden, w.Code, "%v: %s", tt, w.Body)
			require.Empty(t, w.Result().Cookies())
			require.NotContains(t, page.Body.String(), `name="key"`, "nobody pastes a key there")
			require.Contains(t, page.Body.String(), "not encrypted")
		}
		c.Close()
	}
}

// An application with its own login decides who the operator is.
func TestWithUser(t *testing.T) {
	store := keystoretest.New(t, nil)
	c, err := console.New(store, console.WithUser(
		func(r *http.Request) (string, []string, bool) {
			name := r.Header.Get("X-User")
			return name, strings.Fields(r.Header.Get("X-Scopes")), name != ""
		}))
	require.NoError(t, err)
	defer c.Close()
	send := func(method, path, user, scopes, site string) *httptest.ResponseRecorder {
		req := httptest.NewRequest(method, "http://app.example/"+path, nil)
		req.Header.Set("X-User", user)
		req.Header.Set("X-Scopes", scopes)
		req.Header.Set("Sec-Fetch-Site", site)
		w := httptest.NewRecorder()
		c.ServeHTTP(w, req)
		require.Empty(t, w.Result().Cookies())
		return w
	}
	id := keystoretest.MustCreate(t, store, keystore.Spec{Name: "k"}).Key.ID
	require.Equal(t, http.StatusUnauthorized, send("GET", "", "", "", "").Code)
	require.Equal(t, http.StatusForbidden, send("GET", "keys", "ann", "orders", "").Code)
	page := send("GET", "keys/"+id, "ann", "keys:read", "")
	require.Equal(t, http.StatusOK, page.Code)
	require.Contains(t, page.Body.String(), "ann")
	require.NotContains(t, page.Body.String(), "Log out")
	require.Equal(t, http.StatusNotFound, send("GET", "login", "ann", "keys:admin", "").Code)
	revoke := "keys/" + id + "/revoke"
	for _, tt := range []struct {
		scopes, site string
		status       int
	}{
		{"keys:read", "same-origin", http.StatusForbidden},
		{"keys:admin", "", http.StatusForbidden}, // a POST that names no origin
		{"keys:admin", "cross-site", http.StatusForbidden},
		{"keys:admin", "same-origin", http.StatusSeeOther},
	} {
		require.Equal(t, tt.status, send("POST", revoke, "ann", tt.scopes, tt.site).Code, "%v", tt)
	}
	for event, err := range store.Events(t.Context(), keystore.EventQuery{Action: "revoke"}) {
		require.NoError(t, err)
		require.Equal(t, "console:ann", event.Actor)
	}
}

// A backup of the console is a backup.
func TestBackup(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	p := b.post("backup", nil)
	require.Regexp(t, `^attachment; filename="apikeys-[0-9-]+\.backup"$`,
		p.header.Get("Content-Disposition"))
	restored := keystoretest.New(t, nil)
	require.NoError(t, restored.Restore(t.Context(), strings.NewReader(p.body)))
	_, err := restored.Verify(t.Context(), operator.Secret.Reveal())
	require.NoError(t, err)
}

// The overview shows the calls of each minute, and the numbers of keys.
func TestOverview(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:read")
	for range 3 {
		_, err := r.store.Verify(t.Context(), operator.Secret.Reveal())
		require.NoError(t, err)
	}
	_, err := r.store.Verify(t.Context(), "x")
	require.Error(t, err)
	console.CompleteMinute(r.console)
	require.NoError(t, r.store.Revoke(t.Context(),
		keystoretest.MustCreate(t, r.store, keystore.Spec{}).Key.ID, ""))
	keystoretest.MustCreate(t, r.store, keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)})
	revoked := regexp.MustCompile(`(?s)state revoked">revoked</span></a></th><td class="number">1<`)
	var p string
	require.Eventually(t, func() bool { // a count stays for 20 times its own duration
		p = b.get("").body
		return revoked.MatchString(p)
	}, 20*time.Second, time.Millisecond)
	require.Contains(t, p, `<a href="./keys?expiring=7">1 key expiring within 7 days</a>`)
	require.Contains(t, p, `<a href="./keys?unused=90">0 keys unused for 90 days</a>`)
	require.Contains(t, p, "4 in all", "Bind of the login, and Verify")
	require.Regexp(t, `<title>\d\d:\d\d UTC: 1 refused</title>`, p)
	require.Contains(t, p, "<dt>Live streams</dt><dd>1</dd>")
	require.Contains(t, p, "serving")
	for range 200 { // the ring goes round
		console.CompleteMinute(r.console)
	}
	require.Equal(t, 120, strings.Count(b.get("").body, "<rect "))
}

// upward is a backend that cannot read downwards.
type upward struct{ backend.Backend }

// A backend that cannot read the newest first shows the oldest first.
func TestOldestFirst(t *testing.T) {
	store, err := keystore.New(upward{memory.New()}, nil)
	require.NoError(t, err)
	defer store.Close()
	r := newRigOver(t, store)
	b, _ := r.as(t, "keys:admin")
	for i := range console.PageSize {
		keystoretest.MustCreate(t, store, keystore.Spec{Name: fmt.Sprintf("key %02d", i)})
	}
	first := b.get("keys").body
	require.Contains(t, first, "Keys, oldest first")
	require.Contains(t, first, ">key 00</a>")
	for _, name := range []string{"keys", "audit"} {
		next := regexp.MustCompile(`rel="next" href="\./([^"]*)"`).FindStringSubmatch(b.get(name).body)
		require.NotNil(t, next)
		require.Contains(t, b.get(html.UnescapeString(next[1])).body, ">key 49</a>", name)
	}
}

// An address with a wrong ID does not turn the order of the lists, and finds nothing.
func TestWrongIDsDoNotTurnTheOrder(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:read")
	wrong := strings.Repeat("u", 26)
	require.Equal(t, http.StatusNotFound, b.do(http.MethodGet, "audit?key="+wrong, nil, nil).status)
	require.Equal(t, http.StatusBadRequest,
		b.do(http.MethodGet, "keys?cursor="+wrong, nil, nil).status)
	require.Contains(t, b.get("keys").body, "Keys, newest first")
	require.NotContains(t, b.get("keys").body, "oldest first")
	require.NotContains(t, b.get("audit").body, "oldest first")
}

// A search through a whole store that cannot read downwards waits for no other search.
func TestSearchOldestFirst(t *testing.T) {
	for _, path := range []string{"keys?all=1", "audit?all=1"} {
		store, err := keystore.New(upward{memory.New()}, nil)
		require.NoError(t, err)
		defer store.Close()
		r := newRigOver(t, store)
		b, _ := r.as(t, "keys:read")
		defer console.OccupySearches(r.console, console.MaxSearches-1)()
		require.Equal(t, http.StatusOK, b.get(path).status)
	}
}

// The assets have the hash of their content in their names, and browsers keep them.
func TestAssets(t *testing.T) {
	r := newRig(t)
	b := r.browser(t)
	names := regexp.MustCompile(`"\./(assets/console\.[0-9a-f]{16}\.(css|js))"`).
		FindAllStringSubmatch(b.get("login").body, -1)
	require.Len(t, names, 2)
	for _, m := range names {
		p := b.get(m[1])
		require.Equal(t, "public, max-age=31536000, immutable", p.header.Get("Cache-Control"))
		require.Contains(t, p.header.Get("Content-Type"), map[string]string{
			"css": "text/css", "js": "text/javascript"}[m[2]])
		if m[2] == "js" {
			require.LessOrEqual(t, strings.Count(p.body, "\n"), 150)
		}
		require.NotContains(t, p.body, "http://")
		require.NotContains(t, p.body, "https://")
	}
	require.Equal(t, http.StatusNotFound, b.do(http.MethodGet, "assets/console.css", nil, nil).status)
}

// A page is small, however long the texts of the keys and the events are.
func TestSizeOfPages(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	ctx := keystore.WithActor(t.Context(), strings.Repeat(`"`, 256))
	long := keystore.Spec{Name: strings.Repeat(`"`, 256), Owner: strings.Repeat(`'`, 256),
		Metadata: map[string]string{"m": strings.Repeat(`"`, 6000)}}
	for range 50 {
		long.Scopes = append(long.Scopes, strings.Repeat(`"`, 128))
	}
	var last string
	for range console.PageSize + 1 {
		issued, err := r.store.Create(ctx, long)
		require.NoError(t, err)
		last = issued.Key.ID
		for range 3 {
			require.NoError(t, r.store.Disable(ctx, last, strings.Repeat(`"`, 1024)))
			require.NoError(t, r.store.Enable(ctx, last))
		}
		require.NoError(t, r.store.Disable(ctx, last, strings.Repeat(`"`, 1024)))
	}
	selected := ""
	for key, err := range r.store.List(t.Context(), keystore.Query{Limit: console.PageSize}) {
		require.NoError(t, err)
		selected += "&id=" + key.ID
	}
	for _, path := range append(pages(last), pages(operator.Key.ID)...) {
		p := b.get(path)
		require.LessOrEqual(t, len(p.body), 100<<10, path)
	}
	require.LessOrEqual(t, len(b.get("keys/act?do=disable"+selected).body), 100<<10)
}

// The page of a key shows the credits of the key, and the audit shows their changes.
func TestCredits(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:admin")
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:read"},
		Credits: &keystore.Credits{Remaining: 1500}})
	id := issued.Key.ID
	require.Contains(t, b.get("keys/"+id).body, "1,500 left, not filled up")
	r.browser(t).logIn(issued.Secret.Reveal())
	require.Contains(t, b.get("keys/"+id).body, "1,500 left", "a login is free")
	require.NoError(t, r.store.SetCredits(t.Context(), id, &keystore.Credits{Remaining: 7,
		Refill: keystore.Refill{Amount: 1000, MonthDay: 3}}))
	p := b.get("keys/" + id).body
	require.Contains(t, p, "7 left, filled up to 1,000 on day 3 of each month at 00:00 UTC")
	require.Contains(t, p, "1,500 → 7")
	require.Contains(t, b.get("audit?action=credits").body, "1,500 → 7")
}

// A stream of events ends soon after the application has logged its user out, or has taken the
// scope from the user.
func TestStreamOfAUserWhoIsGone(t *testing.T) {
	for name, gone := range map[string]func() (string, []string, bool){
		"logged out":   func() (string, []string, bool) { return "", nil, false },
		"other user":   func() (string, []string, bool) { return "ben", []string{"keys:read"}, true },
		"other scopes": func() (string, []string, bool) { return "ann", nil, true },
	} {
		synctest.Test(t, func(t *testing.T) {
			store := keystoretest.New(t, nil)
			began := time.Now()
			c, err := console.New(store, console.WithUser(
				func(*http.Request) (string, []string, bool) {
					if time.Since(began) > time.Hour {
						return gone()
					}
					return "ann", []string{"keys:read"}, true
				}))
			require.NoError(t, err)
			defer c.Close()
			w := httptest.NewRecorder()
			c.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/audit/tail", nil))
			require.Equal(t, http.StatusOK, w.Code)
			require.Equal(t, time.Hour, time.Since(began).Truncate(time.Minute), name)
		})
	}
}
