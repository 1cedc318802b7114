package console_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A rig is a console on a TLS server, under the prefix /keys.
type rig struct {
	store   *keystore.Store
	console *console.Console
	server  *httptest.Server
	log     *syncBuffer
}

// A syncBuffer is a bytes.Buffer for several goroutines.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func newRig(t testing.TB, opts ...console.Option) *rig {
	return newRigOver(t, keystoretest.New(t, nil), opts...)
}

func newRigOver(t testing.TB, store *keystore.Store, opts ...console.Option) *rig {
	r := &rig{store: store, log: new(syncBuffer)}
	logger := slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	var err error
	r.console, err = console.New(store, append([]console.Option{console.Logger(logger)}, opts...)...)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.Handle("/keys/", http.StripPrefix("/keys", r.console))
	r.server = httptest.NewTLSServer(mux)
	t.Cleanup(func() {
		r.console.Close()
		r.server.Close()
	})
	return r
}

// A browser is a client with cookies. It follows redirects, and sends what browsers send.
type browser struct {
	t    testing.TB
	base string
	http *http.Client
	rig  *rig
}

func (r *rig) browser(t testing.TB) *browser {
	jar, err := cookiejar.New(nil)
	require.NoError(t, err)
	transport := r.server.Client().Transport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	return &browser{t, r.server.URL + "/keys/", &http.Client{Transport: transport, Jar: jar}, r}
}

// A page is a response.
type page struct {
	status int
	header http.Header
	url    *url.URL // after the redirects
	body   string
}

func (b *browser) do(method, path string, form url.Values, header http.Header) *page {
	b.t.Helper()
	target := path
	if !strings.HasPrefix(path, "http") {
		target = b.base + path
	}
	req, err := http.NewRequestWithContext(context.Background(), method, target,
		strings.NewReader(form.Encode()))
	require.NoError(b.t, err)
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	for name, values := range header {
		req.Header[name] = values
		if len(values) == 1 && values[0] == "" {
			req.Header.Del(name)
		}
	}
	res, err := b.http.Do(req)
	require.NoError(b.t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(b.t, err)
	return &page{res.StatusCode, res.Header, res.Request.URL, string(body)}
}

// get loads a page, and requires that the page shows.
func (b *browser) get(path string) *page {
	b.t.Helper()
	p := b.do(http.MethodGet, path, nil, nil)
	require.Equal(b.t, http.StatusOK, p.status, "%s", p.body)
	return p
}

// post sends a form.
func (b *browser) post(path string, form url.Values) *page {
	b.t.Helper()
	return b.do(http.MethodPost, path, form, nil)
}

// fill loads a page, and returns the hidden fields of its form, with the fields of form.
func (b *browser) fill(path string, form url.Values) url.Values {
	b.t.Helper()
	filled := url.Values{}
	for _, m := range hiddenField.FindAllStringSubmatch(b.get(path).body, -1) {
		filled.Add(m[1], m[2])
	}
	for name, values := range form {
		filled[name] = values
	}
	return filled
}

var hiddenField = regexp.MustCompile(`<input type="hidden" name="([^"]*)" value="([^"]*)">`)

// logIn logs in with a key, and requires that the overview shows.
func (b *browser) logIn(secret string) *browser {
	b.t.Helper()
	p := b.post("login", url.Values{"key": {secret}})
	require.Equal(b.t, http.StatusOK, p.status, "%s", p.body)
	require.Equal(b.t, "/keys/", p.url.Path)
	require.Contains(b.t, p.body, "<h1>Overview</h1>")
	return b
}

// as returns a browser of an operator with the scopes.
func (r *rig) as(t testing.TB, scopes ...string) (*browser, *keystore.Issued) {
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Name: "operator", Scopes: scopes})
	return r.browser(t).logIn(issued.Secret.Reveal()), issued
}

var shownSecret = regexp.MustCompile(`<code id="secret">([^<]+)</code>`)

// secretOf returns the secret that a page shows.
func secretOf(t testing.TB, p *page) string {
	t.Helper()
	m := shownSecret.FindStringSubmatch(p.body)
	require.NotNil(t, m, "the page shows no secret: %d %s", p.status, p.body)
	return m[1]
}

// An operator logs in, creates a key, finds the key, changes and revokes the key, and finds all of
// this in the audit.
func TestWalk(t *testing.T) {
	r := newRig(t)
	b, operator := r.as(t, "keys:admin")
	made := b.post("keys/new", b.fill("keys/new", url.Values{
		"name": {"billing"}, "owner": {"acme"}, "scopes": {"orders:read orders:write"},
		"expires": {"30d"}, "metadata": {"env=test\r\nnote=two\\nlines"}, "networks": {"127.0.0.1"},
		"per_second": {"10"}, "burst": {"20"},
	}))
	require.Equal(t, http.StatusOK, made.status)
	require.Contains(t, made.body, "Shown once.")
	require.Contains(t, made.body, "billing")
	secret := secretOf(t, made)
	id, ok := keystore.ParseID(secret)
	require.True(t, ok)
	local := keystore.WithClientAddr(t.Context(), loopback)
	_, err := r.store.Verify(local, secret)
	require.NoError(t, err)
	key, err := r.store.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, []string{"orders:read", "orders:write"}, key.Scopes())
	require.Equal(t, map[string]string{"env": "test", "note": "two\nlines"}, key.Metadata())
	require.Equal(t, keystore.RateLimit{PerSecond: 10, Burst: 20}, key.RateLimit)
	require.Equal(t, "127.0.0.1/32", key.AllowedNetworks()[0].String())

	list := b.get("keys")
	require.Contains(t, list.body, ">billing</a>")
	require.Less(t, strings.Index(list.body, ">billing</a>"),
		strings.Index(list.body, `aria-labelledby="k-`+operator.Key.ID), "newest first")
	session, err := r.store.Bind(local, secret)
	require.NoError(t, err)
	defer session.Close()
	shown := b.get("keys/" + id)
	for _, text := range []string{"acme", "orders:write", "env", "127.0.0.1/32", "10 each second",
		key.Hint, "<dt>Live streams</dt><dd>1</dd>"} {
		require.Contains(t, shown.body, text)
	}

	edited := b.post("keys/"+id+"/edit", b.fill("keys/"+id+"/edit", url.Values{
		"name": {"billing 2"}, "owner": {"acme"}, "scopes": {"orders:read\norders:write\nbilling"},
		"expires": {"at"}, "expires_at": {key.ExpiresAt.UTC().Format("2006-01-02T15:04:05")},
		"metadata": {"env=test"}, "networks": {"127.0.0.1"}, "per_second": {"10"}, "burst": {"20"},
	}))
	require.Equal(t, "/keys/keys/"+id, edited.url.Path)
	require.Contains(t, edited.body, "Changed billing 2.")
	require.NoError(t, session.Cause(), "the change has taken nothing from the key")

	rotated := b.post("keys/"+id+"/rotate",
		b.fill("keys/"+id+"/rotate", url.Values{"grace": {"1h"}}))
	second := secretOf(t, rotated)
	require.NotEqual(t, secret, second)
	for _, token := range []string{secret, second} {
		_, err = r.store.Verify(local, token)
		require.NoError(t, err)
	}

	require.Contains(t, b.get("keys/"+id+"/disable").body, "1 live stream will end.")
	disabled := b.post("keys/"+id+"/disable", url.Values{"reason": {"unpaid"}})
	require.Contains(t, disabled.body, "Disabled the key: 1 live stream ended.")
	require.ErrorIs(t, session.Cause(), keystore.ErrDisabled)
	require.Contains(t, disabled.body, "unpaid")
	require.Contains(t, b.post("keys/"+id+"/enable", nil).body, "Enabled the key.")
	revoked := b.post("keys/"+id+"/revoke", url.Values{"reason": {"the laptop was stolen"}})
	require.Contains(t, revoked.body, "Revoked the key: 0 live streams ended.")
	_, err = r.store.Verify(local, second)
	require.ErrorIs(t, err, keystore.ErrRevoked)

	audit := b.get("audit?key=" + id).body
	for _, action := range []string{"create", "update", "rotate", "disable", "enable", "revoke"} {
		require.Contains(t, audit, `<span class="action `+action+`">`)
	}
	require.Contains(t, audit, "the laptop was stolen")
	require.Contains(t, audit, "console:key:"+operator.Key.ID)
	for event, err := range r.store.Events(t.Context(), keystore.EventQuery{KeyID: id}) {
		require.NoError(t, err)
		require.Equal(t, "console:key:"+operator.Key.ID, event.Actor)
	}

	require.Equal(t, "/keys/login", b.post("logout", nil).url.Path)
	require.Equal(t, "/keys/login", b.get("keys").url.Path)
	require.NotContains(t, r.log.String(), secret)
	require.NotContains(t, r.log.String(), second)
	require.NotContains(t, r.log.String(), operator.Secret.Reveal())
}

var loopback = netip.MustParseAddr("127.0.0.1")
