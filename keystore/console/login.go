package console

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/failures"
	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// cookieName is the name of the cookie. Browsers accept a cookie with the prefix __Host- only from
// the host itself, with Secure and for all paths. So no subdomain can set the cookie.
const cookieName = "__Host-apikeys"

const (
	maxLogin = 8 * time.Hour
	maxIdle  = 30 * time.Minute
	// maxLogins is how many logins a Console has at most, and maxKeyLogins how many of one key. A
	// further login ends the oldest login of the key.
	maxLogins    = 1024
	maxKeyLogins = 128
)

// Why a login has ended, if the store has not ended the session.
var (
	errLoggedOut    = errors.New("the operator has logged out")
	errOld          = errors.New("the login is 8 hours old")
	errIdle         = errors.New("the login was idle for 30 minutes")
	errOtherAddress = errors.New("the cookie was sent from another address")
	errReplaced     = errors.New("the key has too many logins, and this login is the oldest")
	errConsoleEnd   = errors.New("the console was closed")
)

// A login is an operator who has logged in with a key.
//
// A login is in the map of logins until it ends. The end of the login, for whatever reason, removes
// the login from the map once, and closes the session. The context of the session is the context
// of the login: the context ends when the session is closed, and when the store ends the session.
type login struct {
	hash    [sha256.Size]byte // of the cookie
	session *keystore.Session
	key     *keystore.Key
	addr    netip.Addr // of the operator
	began   time.Time

	// Guarded by the mutex of logins.
	used  time.Time // the last request
	timer *time.Timer
	ended bool
}

type logins struct {
	console *Console

	mu     sync.Mutex // guards all below, and some fields of each login
	all    map[[sha256.Size]byte]*login
	closed bool
}

func newLogins(c *Console) *logins {
	return &logins{console: c, all: make(map[[sha256.Size]byte]*login)}
}

// begin makes a login of a session, and returns the text of the cookie. After close, begin returns
// keystore.ErrClosed, and closes the session.
func (ls *logins) begin(session *keystore.Session, addr netip.Addr) (string, error) {
	var bits [32]byte
	_, _ = rand.Read(bits[:]) // never fails
	text := base64.RawURLEncoding.EncodeToString(bits[:])
	now := time.Now()
	l := &login{hash: sha256.Sum256([]byte(text)), session: session, key: session.Key(),
		addr: addr, began: now, used: now}
	ls.mu.Lock()
	if ls.closed {
		ls.mu.Unlock()
		session.Close()
		return "", keystore.ErrClosed
	}
	replaced := ls.oldestLocked(l.key.ID)
	ls.all[l.hash] = l
	l.timer = time.AfterFunc(maxIdle, func() { ls.expire(l) })
	ls.mu.Unlock()
	if replaced != nil {
		ls.end(replaced, errReplaced)
	}
	// The store calls the function immediately if the session has ended already.
	session.OnEnd(func() { ls.end(l, session.Cause()) })
	return text, nil
}

// oldestLocked returns the login that must end before a key gets a further login, or nil. The
// caller holds mu.
func (ls *logins) oldestLocked(keyID string) *login {
	var oldest, oldestOfKey *login
	ofKey := 0
	for _, l := range ls.all {
		if oldest == nil || l.began.Before(oldest.began) {
			oldest = l
		}
		if l.key.ID != keyID {
			continue
		}
		ofKey++
		if oldestOfKey == nil || l.began.Before(oldestOfKey.began) {
			oldestOfKey = l
		}
	}
	switch {
	case ofKey >= maxKeyLogins:
		return oldestOfKey
	case len(ls.all) >= maxLogins:
		return oldest
	default:
		return nil
	}
}

// find returns the login of a cookie, or nil. If the request comes from another address than the
// login, find ends the login. If active is true, the request keeps the login from being idle.
func (ls *logins) find(text string, addr netip.Addr, active bool) *login {
	if len(text) != base64.RawURLEncoding.EncodedLen(32) {
		return nil
	}
	hash := sha256.Sum256([]byte(text))
	now := time.Now()
	ls.mu.Lock()
	l := ls.all[hash]
	var cause error
	switch {
	case l == nil:
	case !now.Before(l.began.Add(maxLogin)):
		cause = errOld
	case !now.Before(l.used.Add(maxIdle)):
		cause = errIdle
	case !sameAddress(l.addr, addr):
		cause = errOtherAddress
	case active:
		l.used = now
	}
	ls.mu.Unlock()
	if l == nil {
		return nil
	}
	if cause == nil {
		cause = l.session.Cause() // nil while the session lasts
	} else if cause == errOtherAddress {
		ls.console.warn("console login used from another address", "key_id", l.key.ID,
			"address", l.addr, "other_address", addr)
	}
	if cause != nil {
		ls.end(l, cause)
		return nil
	}
	return l
}

// sameAddress reports whether a request from b may use a login from a.
func sameAddress(a, b netip.Addr) bool {
	return failures.Network(a) == failures.Network(b) || a.IsLoopback() && b.IsLoopback()
}

// expire ends a login that is idle or too old, and otherwise sets the timer again.
func (ls *logins) expire(l *login) {
	now := time.Now()
	ls.mu.Lock()
	idle, old := l.used.Add(maxIdle), l.began.Add(maxLogin)
	var cause error
	switch {
	case l.ended:
	case !now.Before(old):
		cause = errOld
	case !now.Before(idle):
		cause = errIdle
	case old.Before(idle):
		l.timer.Reset(old.Sub(now))
	default:
		l.timer.Reset(idle.Sub(now))
	}
	ls.mu.Unlock()
	if cause != nil {
		ls.end(l, cause)
	}
}

// end ends a login. A second end does nothing.
func (ls *logins) end(l *login, cause error) {
	ls.mu.Lock()
	again := l.ended
	l.ended = true
	delete(ls.all, l.hash)
	l.timer.Stop()
	ls.mu.Unlock()
	if again {
		return
	}
	l.session.Close()
	ls.console.info("console login ended", "key_id", l.key.ID, "address", l.addr, "cause", cause)
}

// count returns the number of logins.
func (ls *logins) count() int {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	return len(ls.all)
}

// close ends all logins, and refuses new logins.
func (ls *logins) close() {
	ls.mu.Lock()
	ls.closed = true
	all := make([]*login, 0, len(ls.all))
	for _, l := range ls.all {
		all = append(all, l)
	}
	ls.mu.Unlock()
	for _, l := range all {
		ls.end(l, errConsoleEnd)
	}
}

// info and warn log a line. A panic of the handler must not end a goroutine of the console.
func (c *Console) info(message string, args ...any) { c.logLine(slog.LevelInfo, message, args) }
func (c *Console) warn(message string, args ...any) { c.logLine(slog.LevelWarn, message, args) }

func (c *Console) logLine(level slog.Level, message string, args []any) {
	defer func() { _ = recover() }()
	c.log.Log(context.Background(), level, message, args...)
}

// remoteAddr returns the RemoteAddr of a request, or the zero Addr.
func remoteAddr(r *http.Request) netip.Addr {
	ap, _ := netip.ParseAddrPort(r.RemoteAddr)
	return ap.Addr()
}

// addressOf returns the address of the client of a request. An IPv4-mapped IPv6 address is returned
// as IPv4.
func (c *Console) addressOf(r *http.Request) netip.Addr {
	return c.clientAddr(r).Unmap().WithZone("")
}

// private reports whether no stranger can read a request on its way: the request came over TLS, or
// did not leave this machine.
func (c *Console) private(r *http.Request) bool {
	return r.TLS != nil || c.behindTLS || isLocal(r)
}

// isLocal reports whether a request comes from a browser on this machine. A proxy on this machine
// passes on requests of strangers, so isLocal looks at what a proxy changes, too. The check of the
// Host also refuses a name of a stranger that leads to a loopback address.
func isLocal(r *http.Request) bool {
	for _, header := range []string{
		"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Via",
	} {
		if r.Header.Get(header) != "" {
			return false
		}
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(interface{ String() string }); ok {
		ap, err := netip.ParseAddrPort(local.String())
		if err != nil || !ap.Addr().Unmap().IsLoopback() {
			return false
		}
	}
	if !remoteAddr(r).Unmap().IsLoopback() {
		return false
	}
	host := r.Host
	if ap, err := netip.ParseAddrPort(host); err == nil {
		return ap.Addr().Unmap().IsLoopback()
	}
	if addr, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return addr.Unmap().IsLoopback()
	}
	name, _, _ := strings.Cut(host, ":")
	return strings.EqualFold(name, "localhost")
}

// cookieOf returns the text of the cookie, or "" if the request has no cookie, or several.
func cookieOf(r *http.Request) string {
	cookies := r.CookiesNamed(cookieName)
	if len(cookies) != 1 {
		return ""
	}
	return cookies[0].Value
}

func setCookie(w http.ResponseWriter, text string) {
	cookie := &http.Cookie{Name: cookieName, Value: text, Path: "/", Secure: true, HttpOnly: true,
		SameSite: http.SameSiteStrictMode}
	if text == "" {
		cookie.MaxAge = -1
	}
	http.SetCookie(w, cookie)
}

// A loginForm is the content of the login page.
type loginForm struct {
	Next    string // the page to show after the login
	Error   string
	Ended   bool // the login has ended
	Outside bool // the request came by a link of another site, so the browser sent no cookie
	Private bool // the console accepts a key over this connection
}

// showLogin shows the page with the form for a key.
func (v *visit) showLogin() {
	v.renderLogin(http.StatusOK, &loginForm{
		Next:    v.r.FormValue("next"),
		Ended:   v.r.FormValue("ended") != "",
		Outside: v.r.Header.Get("Sec-Fetch-Site") == "cross-site",
	})
}

func (v *visit) renderLogin(status int, f *loginForm) {
	f.Private = v.private(v.r)
	if next, ok := v.target(f.Next); !ok || next == "" {
		f.Next = ""
	}
	v.render(status, "login", "Log in", f)
}

// logIn logs an operator in. A caller who has not proved to hold a key learns nothing: all refusals
// look the same.
func (v *visit) logIn() {
	f := &loginForm{Next: v.r.PostFormValue("next")}
	addr := v.addressOf(v.r)
	if !v.private(v.r) {
		v.renderLogin(http.StatusForbidden, f)
		return
	}
	if wait := v.failures.Wait(addr); wait > 0 {
		v.warn("console login refused", "address", addr, "reason", "too many wrong keys")
		v.w.Header().Set("Retry-After", retryAfter(wait))
		f.Error = "Too many wrong keys came from this address. Wait " + waitText(wait) +
			", and try again."
		v.renderLogin(http.StatusTooManyRequests, f)
		return
	}
	ctx := keystore.WithClientAddr(context.Background(), addr)
	ctx = keystore.WithCost(ctx, 0) // a login costs no credits, also if the key has none left
	session, err := v.store.Bind(ctx, strings.TrimSpace(v.r.PostFormValue("key")))
	var limited *keystore.RateLimitError
	switch {
	case errors.Is(err, keystore.ErrDenied), errors.Is(err, keystore.ErrNarrowed):
		v.failures.Add(addr)
		v.warn("console login refused", "address", addr, "reason", keystore.Reason(err))
		f.Error = "The store does not accept this key. Paste the whole key, as it was shown when " +
			"the key was created."
		v.renderLogin(http.StatusForbidden, f)
		return
	case errors.As(err, &limited):
		v.w.Header().Set("Retry-After", retryAfter(limited.RetryAfter))
		f.Error = "This key was used too often. Wait " + waitText(limited.RetryAfter) +
			", and try again."
		v.renderLogin(http.StatusTooManyRequests, f)
		return
	case err != nil:
		v.fail(err)
		return
	}
	key := session.Key()
	if !manage.KeyHolder("", key).Has(manage.Read) {
		session.Close()
		v.warn("console login refused", "address", addr, "key_id", key.ID, "reason", "scope")
		f.Error = "This key lacks the scope " + manage.Read + ". Take a key that has " +
			manage.Read + " or " + manage.Admin + "."
		v.renderLogin(http.StatusForbidden, f)
		return
	}
	// A login that the browser has from before ends, so that the text of a cookie never changes its
	// owner.
	if old := v.logins.find(cookieOf(v.r), addr, false); old != nil {
		v.logins.end(old, errLoggedOut)
	}
	text, err := v.logins.begin(session, addr)
	if err != nil {
		v.fail(err)
		return
	}
	v.info("console login", "key_id", key.ID, "address", addr)
	setCookie(v.w, text)
	next, _ := v.target(f.Next)
	v.redirect(next)
}

// logOut ends the login.
func (v *visit) logOut() {
	if v.login != nil {
		v.logins.end(v.login, errLoggedOut)
		setCookie(v.w, "")
	}
	v.redirect("login")
}
