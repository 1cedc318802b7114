package console_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/html"

	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// pages returns the path of each page of a key.
func pages(id string) []string {
	return []string{"", "keys", "keys/new", "keys/" + id, "keys/" + id + "/edit",
		"keys/" + id + "/credits",
		"keys/" + id + "/rotate", "keys/" + id + "/disable", "keys/" + id + "/enable",
		"keys/" + id + "/revoke", "keys/act?do=revoke&id=" + id, "audit", "backup", "login"}
}

// changes returns the POST requests that change a key.
func changes(id string) map[string]url.Values {
	request := "0188e1c2-9a3b-4c5d-8e7f-0123456789ab"
	return map[string]url.Values{
		"keys/new":                {"name": {"forged"}, "expires": {"never"}, "request_id": {request}},
		"keys/act":                {"do": {"revoke"}, "id": {id}},
		"keys/" + id + "/edit":    {"name": {"forged"}, "expires": {"never"}},
		"keys/" + id + "/credits": {"credits": {"1"}},
		"keys/" + id + "/rotate":  {"grace": {"0"}, "request_id": {request}},
		"keys/" + id + "/disable": nil, "keys/" + id + "/enable": nil,
		"keys/" + id + "/revoke": nil, "backup": nil, "logout": nil,
	}
}

// Requests that a page of another site makes in the browser of an operator.
func TestCrossSiteRequests(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	victim := keystoretest.MustCreate(t, r.store, keystore.Spec{}).Key.ID
	const attacker = "https://attacker.example"
	for name, header := range map[string]http.Header{
		"a form of another site": {"Sec-Fetch-Site": {"cross-site"},
			"Origin": {attacker}},
		"a fetch of another site": {"Sec-Fetch-Site": {"cross-site"}, "Sec-Fetch-Mode": {"no-cors"},
			"Origin": {"null"}},
		"a subdomain": {"Sec-Fetch-Site": {"same-site"},
			"Origin": {"https://evil.127.0.0.1"}},
		"an old browser":                       {"Sec-Fetch-Site": {""}, "Origin": {attacker}},
		"an old browser that hides the origin": {"Sec-Fetch-Site": {""}, "Origin": {"null"}},
		"a client that sends neither header":   {"Sec-Fetch-Site": {""}},
	} {
		for path, form := range changes(victim) {
			p := b.do(http.MethodPost, path, form, header)
			require.Equal(t, http.StatusForbidden, p.status, "%s: %s", name, path)
			require.Contains(t, p.body, "another site", "%s: %s", name, path)
		}
		p := b.do(http.MethodPost, "login", url.Values{"key": {operator.Secret.Reveal()}}, header)
		require.Equal(t, http.StatusForbidden, p.status, "%s logs in: %s", name, p.body)
	}
	key, err := r.store.Get(t.Context(), victim)
	require.NoError(t, err)
	require.EqualValues(t, 1, key.Revision, "nothing was changed")
	n, err := r.store.Count(t.Context(), keystore.Query{})
	require.NoError(t, err)
	require.Equal(t, 2, n, "nothing was created")
	require.Contains(t, b.get("").body, "<h1>Overview</h1>", "the operator is still logged in")

	// The requests of the console's own pages are accepted, also from a browser without
	// Sec-Fetch-Site.
	header := http.Header{"Sec-Fetch-Site": {""}, "Origin": {r.server.URL}}
	require.Equal(t, http.StatusOK,
		b.do(http.MethodPost, "keys/"+victim+"/disable", nil, header).status)
	// No GET changes anything.
	for path := range changes(victim) {
		b.do(http.MethodGet, path, nil, nil)
	}
	key, err = r.store.Get(t.Context(), victim)
	require.NoError(t, err)
	require.EqualValues(t, 2, key.Revision)
	// Other methods do not either.
	for _, method := range []string{"PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"} {
		p := b.do(method, "keys/"+victim+"/revoke", nil, nil)
		require.Equal(t, http.StatusMethodNotAllowed, p.status)
		require.Equal(t, "GET, HEAD, POST", p.header.Get("Allow"))
	}
}

// Every response has the headers against frames, inline scripts, sniffing and copies.
func TestHeaders(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	for _, path := range append(pages(operator.Key.ID), "nothing", "keys/nothing", "assets/nothing") {
		h := b.do(http.MethodGet, path, nil, nil).header
		require.Equal(t, "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' "+
			"data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
			h.Get("Content-Security-Policy"), path)
		require.Equal(t, "nosniff", h.Get("X-Content-Type-Options"), path)
		require.Equal(t, "no-referrer", h.Get("Referrer-Policy"), path)
		require.Equal(t, "no-store", h.Get("Cache-Control"), path)
		require.Equal(t, "noindex", h.Get("X-Robots-Tag"), path)
	}
}

// hostile is a text that breaks out of elements, attributes, URLs and scripts.
const hostile = `"'><script>alert(1)</script><img src=x onerror=alert(2)>` +
	`javascript:alert(3)//{{.}}</textarea></title>`

// requireHarmless requires that a page has no element or attribute of a hostile text.
func requireHarmless(t *testing.T, where, body string) {
	t.Helper()
	root, err := html.Parse(strings.NewReader(body))
	require.NoError(t, err)
	for n := range root.Descendants() {
		if n.Type != html.ElementNode {
			continue
		}
		require.NotContains(t, []string{"img", "iframe", "object", "embed", "base", "style"}, n.Data,
			where)
		for _, a := range n.Attr {
			require.False(t, strings.HasPrefix(a.Key, "on"), "%s: <%s %s>", where, n.Data, a.Key)
			require.NotEqual(t, "style", a.Key, where)
			if a.Key == "href" || a.Key == "src" || a.Key == "action" {
				require.True(t, strings.HasPrefix(a.Val, "./") || strings.HasPrefix(a.Val, "../") ||
					a.Val == "#main" || strings.HasPrefix(a.Val, "data:image/svg+xml,"),
					"%s: <%s %s=%q>", where, n.Data, a.Key, a.Val)
			}
		}
		if n.Data == "script" {
			require.Nil(t, n.FirstChild, "%s: a script inside the page", where)
			require.Len(t, n.Attr, 2, where)
		}
	}
}

// Texts that owners and callers control stay texts, on every page.
func TestHostileTexts(t *testing.T) {
	store := keystoretest.New(t, nil)
	r := newRigOver(t, store, console.Title(hostile))
	ctx := keystore.WithActor(t.Context(), hostile)
	issued, err := store.Create(ctx, keystore.Spec{Name: hostile, Owner: hostile,
		Scopes:   []string{`"><script>alert(1)</script>`, `'onmouseover='x`},
		Metadata: map[string]string{hostile: hostile}})
	require.NoError(t, err)
	id := issued.Key.ID
	require.NoError(t, store.Disable(ctx, id, hostile))
	admin, err := store.Create(ctx, keystore.Spec{Name: hostile, Scopes: []string{"keys:admin"}})
	require.NoError(t, err)
	b := r.browser(t)
	b.logIn(admin.Secret.Reveal())
	for _, path := range pages(id) {
		p := b.do(http.MethodGet, path, nil, http.Header{"User-Agent": {hostile}})
		requireHarmless(t, path, p.body)
	}
	query := url.QueryEscape(hostile)
	for _, path := range []string{"keys?text=%s", "keys?owner=%s", "keys?state=%s", "keys?scope=%s",
		"keys?expiring=%s", "keys?cursor=%s", "audit?key=%s", "audit?actor=%s", "audit?action=%s",
		"audit?from=%s", "audit?cursor=%s", "keys?note=%s", "keys/act?do=%s", "login?next=%s",
		"keys/new?owner=%s", "%s"} {
		p := b.do(http.MethodGet, fmt.Sprintf(path, query), nil, nil)
		requireHarmless(t, path, p.body)
	}
	for _, field := range []string{"owner", "scopes", "expires", "expires_at", "not_before",
		"networks", "per_second", "burst", "metadata", "request_id"} {
		form := b.fill("keys/new", url.Values{"name": {""}, "expires": {"never"}})
		form.Set(field, hostile)
		p := b.post("keys/new", form)
		require.NotContains(t, []int{http.StatusOK, 500}, p.status, field) // the name is missing
		requireHarmless(t, field, p.body)
	}
	for _, form := range []url.Values{{"grace": {hostile}}, {"grace": {"other"}, "other": {hostile}}} {
		requireHarmless(t, "rotate", b.post("keys/"+id+"/rotate", form).body)
	}
	requireHarmless(t, "reason",
		b.post("keys/"+id+"/disable", url.Values{"reason": {strings.Repeat(hostile, 20)}}).body)
	requireHarmless(t, "login", r.browser(t).post("login",
		url.Values{"key": {hostile}, "next": {hostile}}).body)

	tail := b.tail("audit/tail?after=0")
	for range 3 {
		row := tail.next(t)
		requireHarmless(t, "the tail", "<table>"+row+"</table>")
		require.NotContains(t, row, "<script")
	}
}

// A browser that an attacker has given a cookie does not get the attacker's login, and the cookie
// is not used for the operator's login.
func TestSessionFixation(t *testing.T) {
	r := newRig(t)
	attacker, _ := r.as(t, "keys:read")
	operator := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"}})
	base, err := url.Parse(r.server.URL)
	require.NoError(t, err)
	planted := attacker.http.Jar.Cookies(base)
	require.Len(t, planted, 1)

	victim := r.browser(t)
	victim.http.Jar.SetCookies(base, []*http.Cookie{
		{Name: planted[0].Name, Value: planted[0].Value, Path: "/", Secure: true}})
	victim.logIn(operator.Secret.Reveal())
	own := victim.http.Jar.Cookies(base)
	require.Len(t, own, 1)
	require.NotEqual(t, planted[0].Value, own[0].Value)
	require.Equal(t, "/keys/login", attacker.get("backup").url.Path,
		"the planted login has ended, and does not become the operator's")

	// A text that the console has not made is no login.
	unknown := r.browser(t)
	for _, value := range []string{"", "x", strings.Repeat("A", 43), own[0].Value + "A"} {
		unknown.http.Jar.SetCookies(base, []*http.Cookie{
			{Name: planted[0].Name, Value: value, Path: "/", Secure: true}})
		require.Equal(t, "/keys/login", unknown.get("").url.Path)
	}
	// Of two cookies, the console does not guess which one is right.
	p := r.browser(t).do(http.MethodGet, "", nil, http.Header{"Cookie": {
		"__Host-apikeys=" + own[0].Value + "; __Host-apikeys=" + own[0].Value}})
	require.Equal(t, "/keys/login", p.url.Path)

	set := r.browser(t)
	set.http.CheckRedirect = func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}
	cookie := set.post("login", url.Values{"key": {operator.Secret.Reveal()}}).header.Get("Set-Cookie")
	require.Regexp(t,
		`^__Host-apikeys=[A-Za-z0-9_-]{43}; Path=/; HttpOnly; Secure; SameSite=Strict$`, cookie)
}

// fromHeader is a ClientAddr for tests.
func fromHeader(r *http.Request) netip.Addr {
	addr, err := netip.ParseAddr(r.Header.Get("X-Test-Address"))
	if err != nil {
		return loopback
	}
	return addr
}

func from(addr string) http.Header { return http.Header{"X-Test-Address": {addr}} }

// A cookie that is sent from another address ends the login, for the thief and for the operator.
func TestStolenCookie(t *testing.T) {
	for _, tt := range []struct {
		login, other string
		same         bool
	}{
		{"192.0.2.1", "192.0.2.2", false},
		{"192.0.2.1", "192.0.2.1", true},
		{"192.0.2.1", "::ffff:192.0.2.1", true},
		{"2001:db8::1", "2001:db8::2", true},
		{"2001:db8::1", "2001:db8:0:1::1", false},
		{"127.0.0.1", "::1", true},
		{"127.0.0.1", "192.0.2.1", false},
	} {
		r := newRig(t, console.ClientAddr(fromHeader))
		key := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"}})
		b := r.browser(t)
		b.do(http.MethodPost, "login", url.Values{"key": {key.Secret.Reveal()}}, from(tt.login))
		require.Equal(t, "/keys/keys", b.do(http.MethodGet, "keys", nil, from(tt.login)).url.Path)
		want := "/keys/login"
		if tt.same {
			want = "/keys/keys"
		}
		// The thief has a copy of the cookie, and the operator keeps the cookie.
		thief := r.browser(t)
		base, _ := url.Parse(r.server.URL)
		thief.http.Jar.SetCookies(base, b.http.Jar.Cookies(base))
		require.Equal(t, want, thief.do(http.MethodGet, "keys", nil, from(tt.other)).url.Path, "%v", tt)
		p := b.do(http.MethodGet, "keys", nil, from(tt.login))
		require.Equal(t, want, p.url.Path, "%v", tt)
		if !tt.same {
			require.Contains(t, p.body, "Your login has ended")
			require.Contains(t, r.log.String(), `level=WARN msg="console login used from another`)
		}
	}
}

// After 10 wrong keys, an address waits. Other addresses do not. What a refusal says is the same
// for every wrong key.
func TestLoginGuessing(t *testing.T) {
	r := newRig(t, console.ClientAddr(fromHeader))
	good := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"}})
	revoked := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"}})
	require.NoError(t, r.store.Revoke(t.Context(), revoked.Key.ID, ""))
	network := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"},
		AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}})
	secret := good.Secret.Reveal()
	wrong := []string{"", "x", hostile, secret[:len(secret)-1], secret + "x",
		strings.Replace(secret, good.Key.ID, revoked.Key.ID, 1), revoked.Secret.Reveal(),
		network.Secret.Reveal(), strings.ToUpper(secret), good.Key.ID}
	logIn := func(key, addr string) *page {
		return r.browser(t).do(http.MethodPost, "login", url.Values{"key": {key}}, from(addr))
	}
	// guess reports false if the machine is so slow that the address has another attempt: 6 s after
	// the first.
	guess := func(addr string) (inTime bool) {
		began, first := time.Now(), ""
		for _, key := range wrong {
			p := logIn(key, addr)
			require.Equal(t, http.StatusForbidden, p.status)
			if first == "" {
				first = p.body
			}
			require.Equal(t, first, p.body, "all refusals look the same")
		}
		for _, key := range []string{"x", secret} {
			p := logIn(key, addr)
			if time.Since(began) > 5*time.Second {
				return false
			}
			require.Equal(t, http.StatusTooManyRequests, p.status, "also for the right key")
			require.NotEmpty(t, p.header.Get("Retry-After"))
		}
		return true
	}
	host := 10
	for !guess(fmt.Sprint("192.0.2.", host)) {
		host++
		require.Less(t, host, 30, "no ten logins take less than 5 s")
	}
	require.Contains(t, logIn(secret, "192.0.2.2").body, "<h1>Overview</h1>",
		"another address may log in")
	require.Contains(t, logIn(network.Secret.Reveal(), "198.51.100.7").body, "<h1>Overview</h1>")
	for _, key := range append(wrong[3:], secret) {
		if key != good.Key.ID {
			require.NotContains(t, r.log.String(), key)
		}
	}
	require.Contains(t, r.log.String(), "reason=revoked")
	require.Contains(t, r.log.String(), "reason=network")
}

// No text leads a browser to another site.
func TestOpenRedirect(t *testing.T) {
	r := newRig(t)
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"keys:admin"}})
	id := issued.Key.ID
	for next, want := range map[string]string{
		"":                             "./",
		"keys":                         "./keys",
		"keys/" + id + "/revoke":       "./keys/" + id + "/revoke",
		"keys?text=a%26b&owner=x":      "./keys?owner=x&text=a%26b",
		"//attacker.example":           "./",
		"https://attacker.example":     "./",
		"/\\attacker.example":          "./",
		"\\\\attacker.example":         "./",
		"keys/../../x":                 "./",
		"keys/..%2f..%2f":              "./",
		"javascript:alert(1)":          "./",
		"login":                        "./",
		"logout":                       "./",
		"audit/tail":                   "./",
		"keys\r\nLocation: //x":        "./",
		"keys?x=\r\nLocation: //x":     "./keys?x=%0D%0ALocation%3A+%2F%2Fx",
		".//attacker.example":          "./",
		"keys/*":                       "./",
		"assets/console.js":            "./",
		"keys/" + id + "//example.com": "./",
	} {
		b := r.browser(t)
		b.http.CheckRedirect = func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse
		}
		p := b.post("login", url.Values{"key": {issued.Secret.Reveal()}, "next": {next}})
		require.Equal(t, http.StatusSeeOther, p.status)
		require.Equal(t, want, p.header.Get("Location"), "%q", next)
	}
}

// Paths with other encodings, and paths that lead out of the console, name no page, and every
// redirect stays on the host.
func TestStrangePaths(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	id := operator.Key.ID
	served := func(h http.Handler, target string, cookies []*http.Cookie) *httptest.ResponseRecorder {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.server.URL, nil)
		require.NoError(t, err)
		req.RequestURI = target
		req.URL, err = url.ParseRequestURI(target)
		require.NoError(t, err)
		req.RemoteAddr = "127.0.0.1:1000"
		for _, c := range cookies {
			req.AddCookie(c)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		return w
	}
	base, _ := url.Parse(r.server.URL)
	cookies := b.http.Jar.Cookies(base)
	for _, path := range []string{
		"/keys%2f" + id, "/keys/" + id + "%2frevoke", "/keys/..", "/keys/../keys", "/./keys",
		"//keys", "//attacker.example/keys", "/keys//" + id, "/keys/" + id + "/", "/keys/",
		"/%6beys", "/keys/%2e%2e/audit", "/keys;x", "/keys/" + strings.ToUpper(id), "/keys/*",
		"/keys/*/edit", "/audit/", "/audit/tail/", "/login/..", "/assets/../keys", "/assets/",
		"/assets/..%2fkeys", "/keys/" + id + "/edit/..", "/keys\\" + id, "/keys/" + id[:25],
	} {
		for _, c := range [][]*http.Cookie{nil, cookies} {
			w := served(r.console, path, c)
			if location := w.Header().Get("Location"); location != "" {
				require.Regexp(t, `^(\./|(\.\./)+)login`, location, path)
				target, err := url.Parse("https://console.example/" + path)
				require.NoError(t, err)
				to, err := target.Parse(location)
				require.NoError(t, err)
				require.Equal(t, "console.example", to.Host, path)
			} else {
				require.Equal(t, http.StatusNotFound, w.Code, "%s: %s", path, w.Body)
			}
		}
	}
	// The path of the console without its last slash.
	stripped := http.StripPrefix("/keys", r.console)
	w := served(stripped, "/keys?x=1", nil)
	require.Equal(t, http.StatusMovedPermanently, w.Code)
	require.Equal(t, "./keys/", w.Header().Get("Location"))
	w = served(http.StripPrefix("//attacker.example", r.console), "//attacker.example", nil)
	require.Equal(t, "./attacker.example/", w.Header().Get("Location"))
}

// A stream is an open stream of events.
type stream struct {
	res    *http.Response
	lines  chan string
	cancel context.CancelFunc
}

// tail opens a stream of events.
func (b *browser) tail(path string) *stream {
	b.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, b.base+path, nil)
	require.NoError(b.t, err)
	res, err := b.http.Do(req)
	require.NoError(b.t, err)
	require.Equal(b.t, http.StatusOK, res.StatusCode)
	require.Equal(b.t, "text/event-stream", res.Header.Get("Content-Type"))
	s := &stream{res, make(chan string, 1000), cancel}
	go func() {
		defer close(s.lines)
		defer res.Body.Close()
		scanner := bufio.NewScanner(res.Body)
		scanner.Buffer(nil, 1<<20)
		for scanner.Scan() {
			s.lines <- scanner.Text()
		}
	}()
	b.t.Cleanup(func() {
		cancel()
		for range s.lines {
		}
	})
	return s
}

// next returns the data of the next event.
func (s *stream) next(t *testing.T) string {
	t.Helper()
	for {
		select {
		case line, ok := <-s.lines:
			require.True(t, ok, "the stream has ended")
			if data, ok := strings.CutPrefix(line, "data: "); ok {
				return data
			}
		case <-time.After(20 * time.Second):
			t.Fatal("no event came")
		}
	}
}

// rest returns the lines until the end of the stream.
func (s *stream) rest(t *testing.T) (lines []string) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case line, ok := <-s.lines:
			if !ok {
				return lines
			}
			lines = append(lines, line)
		case <-timeout:
			t.Fatal("the stream does not end")
		}
	}
}

// When the key of an operator is revoked, the login and the open streams end, and no event passes
// afterwards.
func TestRevokingTheOperatorsKey(t *testing.T) {
	r := newRig(t)
	for name, end := range map[string]func(id string) error{
		"revoke":  func(id string) error { return r.store.Revoke(t.Context(), id, "") },
		"disable": func(id string) error { return r.store.Disable(t.Context(), id, "") },
		"rotate": func(id string) error {
			_, err := r.store.Rotate(t.Context(), id, 0)
			return err
		},
		"narrow": func(id string) error {
			_, err := r.store.Update(t.Context(), id, func(s *keystore.Spec) error {
				s.Scopes = []string{"keys:read"}
				return nil
			})
			return err
		},
	} {
		b, operator := r.as(t, "keys:admin")
		tail, quiet := b.tail("audit/tail?after=9000000000000000000"), b.tail("audit/tail?quiet=1")
		require.NoError(t, end(operator.Key.ID))
		keystoretest.MustCreate(t, r.store, keystore.Spec{Name: "made afterwards"})
		for _, s := range []*stream{tail, quiet} {
			lines := s.rest(t)
			require.NotContains(t, strings.Join(lines, "\n"), "made afterwards", name)
			require.Contains(t, lines, "event: end", name)
		}
		p := b.get("keys")
		require.Equal(t, "/keys/login", p.url.Path, name)
		require.Contains(t, p.body, "Your login has ended", name)
		require.Equal(t, "/keys/login", b.post("keys/"+operator.Key.ID+"/enable", nil).url.Path, name)
	}
}

// A heldForm is the body of a POST. Before the first byte, it calls end.
type heldForm struct {
	io.Reader
	end func()
}

func (f *heldForm) Read(p []byte) (int, error) {
	if f.end != nil {
		f.end()
		f.end = nil
	}
	return f.Reader.Read(p)
}

// A client sends the headers of a POST, and holds back the form until the operator is gone. Then
// the form changes nothing.
func TestHeldForm(t *testing.T) {
	gone := false
	for name, opts := range map[string][]console.Option{
		"key": nil,
		"user": {console.WithUser(func(*http.Request) (string, []string, bool) {
			return "ann", []string{"keys:admin"}, !gone
		})},
	} {
		r := newRig(t, opts...)
		req := httptest.NewRequest(http.MethodPost, "https://console.example/keys/new", nil)
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
		end := func() { gone = true }
		if name == "key" {
			b, operator := r.as(t, "keys:admin")
			origin, err := url.Parse(r.server.URL)
			require.NoError(t, err)
			for _, cookie := range b.http.Jar.Cookies(origin) {
				req.AddCookie(cookie)
			}
			req.RemoteAddr = "127.0.0.1:1"
			end = func() { require.NoError(t, r.store.Revoke(t.Context(), operator.Key.ID, "")) }
		}
		form := url.Values{"name": {"back door"}, "scopes": {"keys:admin"}, "expires": {"never"},
			"request_id": {uuid.NewString()}}
		req.Body = io.NopCloser(&heldForm{strings.NewReader(form.Encode()), end})
		w := httptest.NewRecorder()
		r.console.ServeHTTP(w, req)
		require.NotEqual(t, http.StatusOK, w.Code, name)
		n, err := r.store.Count(t.Context(), keystore.Query{Text: "back door"})
		require.NoError(t, err)
		require.Zero(t, n, name)
	}
}

// A slowBackend calls during while the store reads a list.
type slowBackend struct {
	backend.Backend
	during atomic.Pointer[func()]
}

func (b *slowBackend) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if during := b.during.Load(); during != nil {
		(*during)()
	}
	return b.Backend.Scan(ctx, from, to)
}

// A page that was read from the store before the operator's key was revoked is not shown
// afterwards, however long the search takes.
func TestRevokingDuringASearch(t *testing.T) {
	slow := &slowBackend{Backend: memory.New()}
	store, err := keystore.New(slow, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	r := newRigOver(t, store)
	keystoretest.MustCreate(t, store, keystore.Spec{Name: "confidential"})
	b, operator := r.as(t, "keys:read")
	require.Contains(t, b.get("keys?all=1&text=confi").body, "confidential")
	revoke := sync.OnceFunc(func() {
		assert.NoError(t, store.Revoke(t.Context(), operator.Key.ID, ""))
	})
	slow.during.Store(&revoke)
	p := b.get("keys?all=1&text=confi")
	require.Equal(t, "/keys/login", p.url.Path)
	require.NotContains(t, p.body, "confidential</a>")
	require.Contains(t, p.body, "Your login has ended")
}

// An afterChange is an Observer that calls f after each change of a key.
type afterChange struct{ f func(keystore.Event) }

func (o *afterChange) Changed(e keystore.Event)       { o.f(e) }
func (o *afterChange) Verified(keystore.Verification) {}
func (o *afterChange) Refused(keystore.Refusal)       {}
func (o *afterChange) Ended(keystore.BindEnd)         {}

// An operator whose key is revoked during a bulk change changes no further key.
func TestRevokingDuringABulkChange(t *testing.T) {
	var operator *keystore.Issued
	var r *rig
	revoke := sync.OnceFunc(func() {
		assert.NoError(t, r.store.Revoke(t.Context(), operator.Key.ID, ""))
	})
	r = newRigOver(t, keystoretest.New(t, &keystore.Options{
		Observer: &afterChange{f: func(e keystore.Event) {
			if e.Action == keystore.ActionEnable {
				revoke()
			}
		}}}))
	var b *browser
	b, operator = r.as(t, "keys:admin")
	form := url.Values{"do": {"enable"}}
	for range 3 {
		id := keystoretest.MustCreate(t, r.store, keystore.Spec{}).Key.ID
		require.NoError(t, r.store.Disable(t.Context(), id, "stolen"))
		form.Add("id", id)
	}
	require.Equal(t, "/keys/login", b.post("keys/act", form).url.Path)
	n, err := r.store.Count(t.Context(), keystore.Query{Status: keystore.StatusDisabled})
	require.NoError(t, err)
	require.Equal(t, 2, n)
}

// A new secret is in one response, and in no other response and no log line.
func TestSecretsAreShownOnce(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	form := b.fill("keys/new", url.Values{"name": {"new"}, "expires": {"never"}})
	secret := secretOf(t, b.post("keys/new", form))
	id, _ := keystore.ParseID(secret)
	rotation := b.fill("keys/"+id+"/rotate", url.Values{"grace": {"24h"}})
	rotated := secretOf(t, b.post("keys/"+id+"/rotate", rotation))
	var bodies []string
	for _, path := range pages(id) {
		bodies = append(bodies, b.get(path).body)
	}
	bodies = append(bodies, b.post("keys/"+id+"/disable", nil).body, b.post("keys/act",
		url.Values{"do": {"enable"}, "id": {id}}).body, b.post("backup", nil).body, r.log.String())
	for _, body := range bodies {
		for _, s := range []string{secret, rotated, operator.Secret.Reveal()} {
			require.NotContains(t, body, s)
			require.NotContains(t, body, s[strings.LastIndex(s, "_")+1:])
		}
	}
	// A reload gets the same answer, and makes nothing.
	require.Equal(t, secret, secretOf(t, b.post("keys/new", form)))
	require.Equal(t, rotated, secretOf(t, b.post("keys/"+id+"/rotate", rotation)))
	n, err := r.store.Count(t.Context(), keystore.Query{})
	require.NoError(t, err)
	require.Equal(t, 2, n)
	// Another operator does not get the answer.
	other, _ := r.as(t, "keys:admin")
	require.NotEqual(t, secret, secretOf(t, other.post("keys/new", form)))
	// The same form with other content makes nothing, and says so.
	form.Set("name", "another name")
	again := b.post("keys/new", form)
	require.Equal(t, http.StatusUnprocessableEntity, again.status)
	require.Contains(t, again.body, "sent before with other content")
	require.NotContains(t, again.body, secret)
}
