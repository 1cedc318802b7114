package console

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A route says who may request a path, and what answers.
type route struct {
	get, post func(*visit) // nil: the method is not allowed
	scope     string       // what the operator needs for get and post; "": no login
	// postScope is what the operator needs for post, if that is more than scope.
	postScope string
	changes   bool // the route is for changes of keys: a console that is ReadOnly does not have it
}

// newRoutes returns the routes by their patterns. A * means the ID of a key. Only the paths
// of these patterns exist: every other path, however it is written or encoded, is not found.
func newRoutes() map[string]route {
	change := func(get, post func(*visit)) route {
		return route{get: get, post: post, scope: manage.Read, postScope: manage.Write, changes: true}
	}
	return map[string]route{
		"":               {get: (*visit).showOverview, scope: manage.Read},
		"keys":           {get: (*visit).showKeys, scope: manage.Read},
		"keys/new":       change((*visit).showNew, (*visit).create),
		"keys/act":       change((*visit).showBulk, (*visit).bulk),
		"keys/*":         {get: (*visit).showKey, scope: manage.Read},
		"keys/*/edit":    change((*visit).showEdit, (*visit).edit),
		"keys/*/rotate":  change((*visit).showRotate, (*visit).rotate),
		"keys/*/credits": change((*visit).showCredits, (*visit).changeCredits),
		"keys/*/disable": change((*visit).showDisable, (*visit).disable),
		"keys/*/enable":  change((*visit).showEnable, (*visit).enable),
		"keys/*/revoke":  change((*visit).showRevoke, (*visit).revoke),
		"audit":          {get: (*visit).showAudit, scope: manage.Read},
		"audit/tail":     {get: (*visit).tail, scope: manage.Read},
		"backup": {get: (*visit).showBackup, post: (*visit).backup, scope: manage.Admin,
			postScope: manage.Admin},
		"login":  {get: (*visit).showLogin, post: (*visit).logIn},
		"logout": {post: (*visit).logOut},
	}
}

// find returns the route of an escaped path without its first slash, and the ID in the path.
func (c *Console) find(path string) (_ route, id string, ok bool) {
	if r, ok := c.routes[path]; ok && !strings.Contains(path, "*") {
		return r, "", true
	}
	rest, ok := strings.CutPrefix(path, "keys/")
	if !ok {
		return route{}, "", false
	}
	id, action, deeper := strings.Cut(rest, "/")
	if !isID(id) {
		return route{}, "", false
	}
	pattern := "keys/*"
	if deeper {
		pattern += "/" + action
	}
	r, ok := c.routes[pattern]
	return r, id, ok
}

// isID reports whether a text consists of the characters of an ID. The store checks the rest.
func isID(s string) bool {
	return len(s) == 26 && strings.Trim(s, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
}

// A visit is one request, and who has made the request.
type visit struct {
	*Console
	w http.ResponseWriter
	r *http.Request
	// root is the URL of the overview, relative to the URL of the request. root is "./", or several
	// times "../".
	root   string
	path   string // of the request, without its first slash
	id     string // the key's ID in the path
	login  *login // nil with WithUser, and without a login
	caller manage.Caller
}

// The headers of every response. Nothing on a page comes from another host, no script or style is
// inside a page, and no frame shows a page.
const contentPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; " +
	"img-src 'self' data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; " +
	"base-uri 'none'"

func setHeaders(h http.Header) {
	h.Set("Content-Security-Policy", contentPolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Robots-Tag", "noindex")
	h.Set("Cache-Control", "no-store")
}

// maxForm is the largest body of a request, in bytes: a key has at most 16 KiB, which a form
// encodes in three times as many bytes.
const maxForm = 128 << 10

// ServeHTTP answers a request.
func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	setHeaders(w.Header())
	path := r.URL.EscapedPath()
	v := &visit{Console: c, w: w, r: r, path: strings.TrimPrefix(path, "/"), root: "./"}
	if n := strings.Count(v.path, "/"); n > 0 {
		v.root = strings.Repeat("../", n)
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	switch {
	case path == "":
		v.redirectToSlash()
	case strings.HasPrefix(v.path, assetDir):
		v.serveAsset(strings.TrimPrefix(v.path, assetDir))
	case c.ctx.Err() != nil:
		v.failWith(http.StatusServiceUnavailable, "The console is closed",
			"The server is stopping. Try again in a moment.")
	default:
		v.serve()
	}
}

// redirectToSlash adds a slash to the path of the console, for the relative links. The path is that
// of the request, because StripPrefix has removed the prefix. The redirect is relative, and begins
// with a dot, so that the redirect leads to no other host.
func (v *visit) redirectToSlash() {
	path, _, _ := strings.Cut(v.r.RequestURI, "?")
	last := path[strings.LastIndexByte(path, '/')+1:]
	name, err := url.PathUnescape(last)
	if err != nil || strings.Trim(last, ".") == "" {
		v.notFound()
		return
	}
	v.w.Header().Set("Location", "./"+url.PathEscape(name)+"/")
	v.w.WriteHeader(http.StatusMovedPermanently)
}

func (v *visit) serve() {
	route, id, ok := v.find(v.path)
	if !ok || route.changes && v.readOnly || route.scope == "" && v.user != nil {
		if !v.identify() { // so that a stranger does not see the links of an operator
			return
		}
		v.notFound()
		return
	}
	v.id = id
	handle, scope := route.get, route.scope
	switch v.r.Method {
	case http.MethodGet, http.MethodHead:
	case http.MethodPost:
		handle = route.post
		if route.postScope != "" {
			scope = route.postScope
		}
	default:
		handle = nil
	}
	if handle == nil {
		v.w.Header().Set("Allow", allowed(route))
		v.failWith(http.StatusMethodNotAllowed, "The method is not allowed",
			"This page does not accept a "+methodWord(v.r.Method)+" request.")
		return
	}
	if v.r.Method == http.MethodPost && (!v.fromOwnPage() || !v.readBody()) {
		return
	}
	if route.scope == "" {
		v.currentLogin()
	} else if !v.identify() {
		return
	} else if !v.caller.Has(scope) {
		v.info("console request refused", "actor", v.caller.Actor(), "path", v.path,
			"reason", "scope", "scope", scope)
		v.failWith(http.StatusForbidden, "Your scopes do not allow this",
			"You need the scope "+scope+" or "+manage.Admin+".")
		return
	}
	handle(v)
}

// readBody reports whether the form of a POST can be read. Otherwise readBody answers the request.
// A client may hold back the rest of the form for hours. So readBody runs before serve looks for
// the operator: an operator whose key was revoked in the meantime changes nothing.
func (v *visit) readBody() bool {
	if err := v.r.ParseForm(); err != nil {
		v.failWith(http.StatusBadRequest, "The form cannot be read",
			"Go back, and send the form again.")
		return false
	}
	return true
}

func allowed(r route) string {
	switch {
	case r.post == nil:
		return "GET, HEAD"
	case r.get == nil:
		return "POST"
	default:
		return "GET, HEAD, POST"
	}
}

// methodWord returns a method as a word for a page, whatever the client has sent.
func methodWord(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch,
		http.MethodDelete, http.MethodOptions:
		return method
	default:
		return "such a"
	}
}

// fromOwnPage reports whether a POST comes from a page of the console. Otherwise fromOwnPage
// answers the request.
func (v *visit) fromOwnPage() bool {
	err := v.csrf.Check(v.r)
	// The cookie, or the login of the application, comes from a browser, and every browser sends
	// one of these headers.
	ambient := v.user != nil || len(v.r.CookiesNamed(cookieName)) > 0
	if err == nil && ambient && v.r.Header.Get("Sec-Fetch-Site") == "" &&
		v.r.Header.Get("Origin") == "" {
		err = errors.New("the request has neither Sec-Fetch-Site nor Origin")
	}
	if err == nil {
		return true
	}
	v.warn("console request refused", "address", v.addressOf(v.r), "path", v.path, "reason", err)
	v.failWith(http.StatusForbidden, "The request came from another site",
		"Open the console itself, and try again there. Nothing was changed.")
	return false
}

// currentLogin finds the login of the cookie. A cookie that strangers can read on its way is no
// login.
func (v *visit) currentLogin() {
	if v.user != nil || !v.private(v.r) {
		return
	}
	active := v.r.Header.Get(refreshHeader) == "" && v.path != "audit/tail"
	if v.login = v.logins.find(cookieOf(v.r), v.addressOf(v.r), active); v.login != nil {
		key := v.login.key
		v.caller = manage.KeyHolder("console:key:"+key.ID, key)
	}
}

// refreshHeader is in requests of the script of a page. Such a request does not keep a login
// from being idle.
const refreshHeader = "X-Console-Refresh"

// identify finds out who makes the request. If the request has no operator, identify answers the
// request.
func (v *visit) identify() bool {
	if v.user != nil {
		actor, scopes, ok := v.user(v.r)
		if !ok {
			v.failWith(http.StatusUnauthorized, "You are not logged in",
				"Log in to the application, and try again.")
			return false
		}
		v.caller = userOf(actor, scopes)
		return true
	}
	v.currentLogin()
	if v.login != nil {
		return true
	}
	v.leadToLogin()
	return false
}

// hasEnded reports whether the login has ended since identify found the login.
func (v *visit) hasEnded() bool { return v.login != nil && v.login.session.Cause() != nil }

// leadToLogin answers the request of a browser without a login.
func (v *visit) leadToLogin() {
	if v.path == "audit/tail" || v.r.Header.Get(refreshHeader) != "" {
		v.w.WriteHeader(http.StatusUnauthorized) // the script of a page leads to the login
		return
	}
	query := url.Values{}
	if v.r.Method != http.MethodPost {
		if next := strings.TrimSuffix(v.path+"?"+v.r.URL.RawQuery, "?"); next != "" {
			query.Set("next", next)
		}
	}
	if len(v.r.CookiesNamed(cookieName)) > 0 {
		query.Set("ended", "1")
		setCookie(v.w, "")
	}
	v.redirect(strings.TrimSuffix("login?"+query.Encode(), "?"))
}

// userOf returns the user of an application, see WithUser.
func userOf(actor string, scopes []string) manage.Caller {
	return manage.KeyHolder("console:"+actor,
		keystore.NewKey(keystore.Spec{Name: actor, Scopes: scopes}))
}

// target returns the page of the console that a text of a request names, as a URL relative to the
// overview. The text is not trusted: target returns a URL that target has built, from a route that
// exists. If the text names no page, ok is false.
func (v *visit) target(text string) (url_ string, ok bool) {
	path, query, _ := strings.Cut(text, "?")
	route, _, ok := v.find(path)
	if !ok || route.get == nil || route.scope == "" || path == "audit/tail" {
		return "", false
	}
	values, err := url.ParseQuery(query)
	if err != nil || len(values) == 0 {
		return path, true
	}
	return path + "?" + values.Encode(), true
}

// redirect leads the browser to a page of the console. The page is relative to the overview.
func (v *visit) redirect(page string) {
	v.w.Header().Set("Location", v.root+page)
	v.w.WriteHeader(http.StatusSeeOther)
}

// operator returns what changes keys for the caller. revision is the revision that the operator has
// seen, or 0.
func (v *visit) operator(revision uint64) manage.Operator {
	return manage.Operator{Store: v.store, Caller: v.caller, Revision: revision}
}

// mayWrite reports whether the operator may change keys at all.
func (v *visit) mayWrite() bool { return v.caller.Has(manage.Write) && !v.readOnly }

// ctx returns the context for reads.
func (v *visit) ctx() context.Context { return v.r.Context() }

// changeCtx returns the context for a change. A change runs to its end even if the browser has
// gone, or if the change ends the login of the operator.
func (v *visit) changeCtx() context.Context { return context.WithoutCancel(v.r.Context()) }

func (v *visit) notFound() {
	v.failWith(http.StatusNotFound, "There is no such page",
		"Check the address, or begin at the overview.")
}

// fail shows the page for an error of the store.
func (v *visit) fail(err error) {
	var ceiling *manage.CeilingError
	switch {
	case errors.As(err, &ceiling):
		v.failWith(http.StatusForbidden, "Your own key does not allow this",
			sentence(ceilingText(ceiling)))
	case errors.Is(err, keystore.ErrNotEverywhere):
		v.failWith(http.StatusServiceUnavailable, "The change is made, but not everywhere yet",
			"Another process of the store may not know the change for a moment. "+
				"Do not repeat the change.")
	case errors.Is(err, keystore.ErrNotFound):
		v.failWith(http.StatusNotFound, "There is no such key",
			"The key was purged, or the address is wrong. Look for the key in the list.")
	case errors.Is(err, keystore.ErrInvalid):
		v.failWith(http.StatusBadRequest, "This cannot be done", sentence(errorText(err)))
	case errors.Is(err, keystore.ErrKeyRevoked):
		v.failWith(http.StatusConflict, "The key is revoked",
			"A revoked key cannot be changed. Create a new key instead.")
	case errors.Is(err, keystore.ErrConflict):
		v.failWith(http.StatusConflict, "The key has changed",
			"Somebody has changed the key since you opened the page. Nothing was done. "+
				"Look at the key, and decide again.")
	case errors.Is(err, keystore.ErrCorrupt):
		v.warn("console met damaged data", "path", v.path, "error", err)
		v.failWith(http.StatusInternalServerError, "Stored data is damaged",
			sentence(errorText(err)))
	case errors.Is(err, keystore.ErrClosed):
		v.failWith(http.StatusServiceUnavailable, "The store is closed",
			"The server is stopping. Try again in a moment.")
	case errors.Is(err, syscall.ENOSPC):
		v.warn("console could not change a key", "path", v.path, "error", err)
		v.failWith(http.StatusServiceUnavailable, "The disk of the server is full",
			"Nothing was changed. Make space on the disk, and try again.")
	case v.r.Context().Err() != nil:
		// The browser has gone.
	default:
		v.warn("console could not reach the store", "path", v.path, "error", err)
		text := "Try again in a moment."
		if v.r.Method == http.MethodPost {
			text = "The change may have been made or not. Look at the key, and try again."
		}
		v.failWith(http.StatusServiceUnavailable, "The store does not answer", text)
	}
}

// A problem is the content of a page that says what went wrong.
type problem struct{ Title, Text string }

func (v *visit) failWith(status int, title, text string) {
	v.render(status, "problem", title, &problem{title, text})
}

func retryAfter(d time.Duration) string {
	return strconv.Itoa(int(d/time.Second) + 1)
}

func waitText(d time.Duration) string {
	if d > 2*time.Minute {
		return plural(int(d/time.Minute)+1, "minute")
	}
	return plural(int(d/time.Second)+1, "second")
}
