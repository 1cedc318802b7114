package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net/url"
	"strconv"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

const (
	// maxPrefixSize is the size of the longest prefix, in bytes.
	maxPrefixSize = 256

	// minVersion is the first version of etcd that the store accepts.
	minVersion = "3.5.18"

	// openTimeout bounds Open if the context has no deadline.
	openTimeout = 10 * time.Second
	// openPause is the time between two attempts to reach an endpoint.
	openPause = 100 * time.Millisecond
	// openGrace is the time for which Open waits for the other endpoints after one has answered.
	openGrace = 500 * time.Millisecond

	// marker is the value of the key that marks the prefix as that of a store. Later formats have
	// another marker.
	marker = "github.com/grpc-api-key/grpc-api-key/keystore/etcdstore format 1"
	// markerName is the beginning of the markers of all formats.
	markerName = "github.com/grpc-api-key/grpc-api-key/keystore/etcdstore format "

	// maxNeighbors is the number of other stores below the prefix that Open looks past.
	maxNeighbors = 64
)

// Open opens the store with a prefix, and makes the store if etcd has none. Open waits for etcd
// until ctx ends; if ctx has no deadline, for at most 10 s. Open does not wait for a problem that
// waiting cannot solve, such as a wrong password.
//
// Choose a prefix that names the application and the environment, such as "/apikeys/prod/". The
// prefix has 1 to 256 bytes, and no NUL byte. Two stores may have prefixes of which one begins with
// the other. Open refuses a new prefix under which another program has keys.
//
// The client stays the caller's: close the client after the Backend. The endpoints of the client
// should name all members of etcd. The Backend uses neither the namespace wrappers of the client
// nor its Watcher. A nil *Options means the zero Options.
//
// Several Backends may have the same prefix, in one process or in many. The Backend is a
// backend.Feeder, a backend.DownScanner and a backend.AllGetter.
func Open(
	ctx context.Context, client *clientv3.Client, prefix string, opts *Options,
) (*Backend, error) {
	if opts == nil {
		opts = &Options{}
	}
	switch {
	case client == nil || client.ActiveConnection() == nil:
		return nil, errors.New("etcdstore: open: the client is nil, or has no connection: make " +
			"the client with clientv3.New")
	case prefix == "":
		return nil, errors.New("etcdstore: open: the prefix is empty: choose a prefix such as " +
			"\"/apikeys/prod/\"")
	case len(prefix) > maxPrefixSize:
		return nil, fmt.Errorf("etcdstore: open: the prefix has %d bytes: at most %d are allowed",
			len(prefix), maxPrefixSize)
	case strings.ContainsRune(prefix, 0):
		return nil, errors.New("etcdstore: open: the prefix has a NUL byte")
	}
	b := &Backend{
		client: client, kv: clientv3.NewKV(client), prefix: prefix, base: baseOf(prefix),
		watch: pb.NewWatchClient(client.ActiveConnection()), log: remote.Logger{To: opts.Logger},
		calls:   remote.NewCalls(),
		quota:   quota{configured: opts.QuotaBytes, kick: make(chan struct{}, 1)},
		history: history{seed: maphash.MakeSeed()},
	}
	if err := b.open(ctx); err != nil {
		b.calls.Close()
		return nil, err
	}
	b.calls.Go(b.watchQuota)
	return b, nil
}

func (b *Backend) open(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, openTimeout)
		defer cancel()
	}
	if err := b.checkServers(ctx); err != nil {
		return err
	}
	err := b.openPrefix(ctx)
	for isTransient(err) && ctx.Err() == nil { // such as an election
		remote.Sleep(ctx, openPause)
		err = b.openPrefix(ctx)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("etcdstore: open: the server answers, but etcd has not served a request "+
			"in time: check that a majority of its members is running: %w", err)
	}
	return err
}

// statusOf asks an endpoint for its status.
func statusOf(
	ctx context.Context, client *clientv3.Client, endpoint string,
) (*pb.StatusResponse, error) {
	conn, err := client.Dial(endpoint)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
}

// endpointName returns an endpoint without credentials.
func endpointName(endpoint string) string {
	u, err := url.Parse(endpoint)
	if err != nil || u.User == nil {
		return endpoint
	}
	u.User = nil
	return u.String()
}

// An answer is the result of an attempt to reach an endpoint.
type answer struct {
	endpoint int
	status   *pb.StatusResponse
	err      error
	final    bool // no other answer follows
}

// checkServers asks each endpoint for its status, and returns once one has answered, and the others
// have had some time. A server that is too old is an error. An endpoint that does not answer is an
// error only if no endpoint answers.
func (b *Backend) checkServers(ctx context.Context) error {
	endpoints := b.client.Endpoints()
	trying, cancel := context.WithCancel(ctx)
	defer cancel()
	answers := make(chan answer, 1)
	for i, endpoint := range endpoints {
		go b.askServer(trying, i, endpoint, answers)
	}
	var statuses []*pb.StatusResponse
	failures := make([]error, len(endpoints))
	var grace <-chan time.Time
	for open := len(endpoints); open > 0; {
		select {
		case a := <-answers:
			if a.final {
				open--
			}
			if failures[a.endpoint] = a.err; a.err != nil {
				continue
			}
			if isTooOld(a.status.Version) {
				return fmt.Errorf("etcdstore: open: the etcd server at %s has version %s: the "+
					"store needs version %s or later: update etcd",
					endpointName(endpoints[a.endpoint]), a.status.Version, minVersion)
			}
			statuses = append(statuses, a.status)
			if grace == nil {
				grace = time.After(openGrace)
			}
		case <-grace:
			open = 0
		case <-ctx.Done():
			open = 0
		}
	}
	if len(statuses) == 0 {
		return b.unreachable(ctx, endpoints, failures)
	}
	b.history.cluster = statuses[0].Header.GetClusterId()
	b.quota.noteStatus(b, statuses)
	return nil
}

// askServer asks an endpoint for its status until the endpoint answers, or has a problem that
// waiting cannot solve.
func (b *Backend) askServer(ctx context.Context, i int, endpoint string, answers chan<- answer) {
	for {
		try, cancel := context.WithTimeout(ctx, statusTimeout)
		r, err := statusOf(try, b.client, endpoint)
		cancel()
		if ctx.Err() != nil {
			return
		}
		a := answer{endpoint: i, status: r, err: err, final: err == nil || !isWorthWaiting(err)}
		select {
		case answers <- a:
		case <-ctx.Done():
			return
		}
		if a.final {
			return
		}
		remote.Sleep(ctx, openPause)
	}
}

// isWorthWaiting reports whether an endpoint with this error may answer later.
func isWorthWaiting(err error) bool {
	text := err.Error()
	if strings.Contains(text, "tls:") || strings.Contains(text, "handshake failed") ||
		strings.Contains(text, "server preface") ||
		strings.Contains(text, "unexpected HTTP status code") {
		return false
	}
	switch codeOf(rpctypes.Error(err)) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Unknown:
		return true
	}
	return false
}

// unreachable returns the error for endpoints none of which has answered.
func (b *Backend) unreachable(ctx context.Context, endpoints []string, failures []error) error {
	var texts []string
	var first error
	for i, err := range failures {
		name := endpointName(endpoints[i])
		if err == nil {
			texts = append(texts, fmt.Sprintf("%s: no answer: check the endpoint and the network",
				name))
			continue
		}
		err = explain(b.client, b.prefix, name, err)
		if texts = append(texts, err.Error()); first == nil {
			first = errors.Unwrap(err)
		}
	}
	if ctx.Err() != nil {
		first = ctx.Err()
	}
	text := "etcdstore: open: no etcd server can be used: " + strings.Join(texts, "; ")
	return &remote.Error{Text: text, Err: first}
}

// isTooOld reports whether a version is below minVersion. A version that cannot be read is not.
func isTooOld(version string) bool {
	have, ok := parseVersion(version)
	want, _ := parseVersion(minVersion)
	for i := range have {
		if ok && have[i] != want[i] {
			return have[i] < want[i]
		}
	}
	return false
}

func parseVersion(version string) (v [3]int, ok bool) {
	version, _, _ = strings.Cut(version, "-")
	parts := strings.Split(version, ".")
	if len(parts) != len(v) {
		return v, false
	}
	for i, part := range parts {
		n, err := strconv.Atoi(part)
		if err != nil {
			return v, false
		}
		v[i] = n
	}
	return v, true
}

// openPrefix reads the marker of the store, or writes the marker of a new store.
func (b *Backend) openPrefix(ctx context.Context) error {
	// As many operations as the largest Apply has: a server with a lower limit refuses them here.
	gets := make([]clientv3.Op, backend.MaxChanges)
	for i := range gets {
		gets[i] = clientv3.OpGet(b.base)
	}
	r, err := b.kv.Txn(ctx).Then(gets...).Commit()
	if err != nil {
		return b.wrap(ctx, fmt.Sprintf("open: read below the prefix %q", b.prefix), err)
	}
	if id := r.Header.ClusterId; id != b.history.cluster {
		return fmt.Errorf("etcdstore: open: the endpoints belong to different etcd clusters, "+
			"%x and %x: name the members of one cluster", b.history.cluster, id)
	}
	b.history.revision = r.Header.Revision
	kvs := r.Responses[0].GetResponseRange().GetKvs()
	isNew := len(kvs) == 0
	if isNew {
		if err := b.checkForeign(ctx); err != nil {
			return err
		}
	} else if err := b.checkMarker(kvs[0].Value); err != nil {
		return err
	}
	// If the store is not new, nothing is written. But etcd checks the right to write.
	w, err := b.kv.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(b.base), "=", 0)).
		Then(clientv3.OpPut(b.base, marker)).Else(clientv3.OpGet(b.base)).Commit()
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		b.quota.exceeded(b)
		if isNew {
			return b.quota.fullError()
		}
		return nil
	case err != nil:
		return b.wrap(ctx, fmt.Sprintf("open: write below the prefix %q", b.prefix), err)
	case w.Succeeded:
		b.log.Log(slog.LevelInfo, "made a new store in etcd", "prefix", b.prefix)
		return nil
	}
	if kvs := w.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
		return b.checkMarker(kvs[0].Value)
	}
	return nil
}

// checkMarker returns an error unless a value is the marker of a store that this version can read.
func (b *Backend) checkMarker(value []byte) error {
	switch text := string(value); {
	case text == marker:
		return nil
	case strings.HasPrefix(text, markerName):
		return fmt.Errorf("etcdstore: open: a later version has made the store at the prefix %q: "+
			"update this program", b.prefix)
	}
	return b.foreignError(b.base)
}

func (b *Backend) foreignError(key string) error {
	return fmt.Errorf("etcdstore: open: the prefix %q holds something else, such as the key %q: "+
		"choose a prefix that is the store's own", b.prefix, key)
}

// checkForeign returns an error if the prefix of a new store has keys of another program. Keys of
// other stores do not count: the prefix "/a" of a new store may have the store "/ab" below. The
// first key of such a store is its marker.
func (b *Backend) checkForeign(ctx context.Context) error {
	at, end := b.prefix, clientv3.GetPrefixRangeEnd(b.prefix)
	for range maxNeighbors {
		r, err := b.kv.Get(ctx, at, clientv3.WithRange(end), clientv3.WithLimit(1))
		if err != nil {
			return b.wrap(ctx, fmt.Sprintf("open: read below the prefix %q", b.prefix), err)
		}
		if len(r.Kvs) == 0 {
			return nil
		}
		key := string(r.Kvs[0].Key)
		if key == b.base {
			return nil // another process has just made the store
		}
		if !strings.HasSuffix(key, "\x00") || strings.Count(key, "\x00") != 1 ||
			!strings.HasPrefix(string(r.Kvs[0].Value), markerName) {
			return b.foreignError(key)
		}
		at = clientv3.GetPrefixRangeEnd(key)
	}
	return nil
}
