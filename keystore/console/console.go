package console

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/failures"
	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Console is the web console of one store. New makes a Console. A Console is safe for concurrent
// use.
type Console struct {
	store *keystore.Store
	log   *slog.Logger
	title string
	// user is the login of the application; nil: operators log in with keys.
	user       func(*http.Request) (actor string, scopes []string, ok bool)
	clientAddr func(*http.Request) netip.Addr
	readOnly   bool
	behindTLS  bool

	routes    map[string]route // by the pattern of the path
	csrf      *http.CrossOriginProtection
	answers   *manage.Answers
	inventory *inventory.Inventory
	failures  *failures.Limit
	logins    *logins
	notes     notes
	traffic   *traffic
	// patience is how long a page looks for keys or events.
	patience time.Duration
	// searching holds a token for each search without a time limit.
	searching chan struct{}
	// oldest is true once the backend has refused to read the newest keys first.
	oldest atomic.Bool

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	// streams are the streams of events that run.
	streams streams
	running sync.WaitGroup // the goroutine of traffic
}

// An Option is a setting for New. The zero Option has no effect.
type Option struct{ apply func(*Console) }

// WithUser replaces the login of the console by the login of the application. For each request,
// user returns the name of the user, the scopes that the user has, and whether the request has a
// user. The scopes are those of keys: see the package comment. The console refuses a request
// without a user with 401, shows no login page and sets no cookie. While a page follows the events,
// the console calls user again every 20 seconds, with the same request, and ends the stream if the
// user is gone. The application has to protect the requests, with TLS for example: pages show new
// secrets. A nil function has no effect. The function must be safe for concurrent use.
func WithUser(user func(r *http.Request) (actor string, scopes []string, ok bool)) Option {
	return Option{func(c *Console) {
		if user != nil {
			c.user = user
		}
	}}
}

// ReadOnly hides and refuses everything that changes a key, whatever the scopes of the operator.
func ReadOnly() Option { return Option{func(c *Console) { c.readOnly = true }} }

// Title sets the name of the console, for the head of each page. The name tells an operator which
// store this is, such as "Orders, production". An empty title means "API keys".
func Title(title string) Option {
	return Option{func(c *Console) {
		if title != "" {
			c.title = title
		}
	}}
}

// Logger reports logins, refused logins, the ends of logins, and refused requests. The changes of
// keys are in the events of the store, and in the log of keystore.Options.Logger. No secret is
// logged. Without Logger, or with nil, the Console logs nothing.
func Logger(l *slog.Logger) Option {
	return Option{func(c *Console) {
		if l != nil {
			c.log = l
		}
	}}
}

// BehindTLS is for a Console whose connections come from a proxy that terminates TLS. The console
// then accepts logins over connections without TLS. The proxy must be the only client that can
// connect to the server. Give ClientAddr too, or all operators have the address of the proxy.
func BehindTLS() Option { return Option{func(c *Console) { c.behindTLS = true }} }

// ClientAddr sets how the console finds the address of the client of a request, for keys with
// AllowedNetworks, for the limit of failed logins, and for logins, which belong to an address. By
// default, the address is the RemoteAddr of the request. If a proxy is in between, read the header
// that the proxy sets. The zero Addr means that the address is not known. A nil function has no
// effect.
func ClientAddr(addr func(*http.Request) netip.Addr) Option {
	return Option{func(c *Console) {
		if addr != nil {
			c.clientAddr = addr
		}
	}}
}

// New returns a Console for the keys of a store. Call Close before the store is closed. The error
// says which argument cannot be used.
func New(store *keystore.Store, opts ...Option) (*Console, error) {
	if store == nil {
		return nil, errors.New("console: New: the store is nil")
	}
	c := &Console{
		store:      store,
		log:        slog.New(slog.DiscardHandler),
		title:      "API keys",
		clientAddr: remoteAddr,
		csrf:       http.NewCrossOriginProtection(),
		answers:    manage.NewAnswers(),
		inventory:  inventory.New(store, 0),
		failures:   failures.New(failuresPerSecond, failuresBurst),
		traffic:    newTraffic(store),
		patience:   pagePatience,
		searching:  make(chan struct{}, maxSearches),
	}
	c.logins = newLogins(c)
	c.routes = newRoutes()
	for _, o := range opts {
		if o.apply != nil {
			o.apply(c)
		}
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.running.Go(func() { c.traffic.run(c.ctx) })
	return c, nil
}

// Close ends all logins and all streams of events, and forgets the answers that repeated requests
// would get. After Close, the console answers each request with 503. Close does not close the
// store. Close waits for no request.
func (c *Console) Close() {
	c.cancel()
	c.logins.close()
	c.answers.Close()
	c.running.Wait()
}

// The limit for failed logins of one address.
const (
	failuresPerSecond = 1.0 / 6
	failuresBurst     = 10
)
