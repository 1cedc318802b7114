package sharedlab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// storeSettings are the settings of a store process.
type storeSettings struct {
	Engine    string // of openers
	Addresses []string
	Space     string
	Freshness time.Duration
	Board     string // the file
	Index     int    // of the process on the board
	Wrong     string // of wrongs; "" is the right protocol
}

// The work of one store process. While faults are injected, most revokers wait for a barrier, or
// for the engine. The number of revokers is therefore large.
const (
	callers     = 8  // goroutines that make calls
	talkers     = 8  // open streams
	sessions    = 40 // open sessions
	revokers    = 16
	maxLive     = 120 // keys that no process has begun to revoke
	recent      = 160 // keys that are used often
	remembered  = 1200
	familySize  = 8 // keys with the same owner
	callPause   = 60 * time.Millisecond
	talkPause   = 100 * time.Millisecond
	sessionGap  = 200 * time.Millisecond // after the end of a session
	maxAge      = 2 * time.Second        // of a key whose creator revokes a key
	longUse     = 10 * time.Second       // of a stream or a session
	callTimeout = 5 * time.Second        // beyond the timeout of the store

	// familySpread is how many keys may come between the first key of a family and the last. The
	// other processes make keys at the same time.
	familySpread = 1000
)

// A worker is a store process at work: a store, a gRPC server in front of the store, and callers.
type worker struct {
	storeSettings
	board   *board
	own     *storeBoard
	store   *keystore.Store
	conn    *grpc.ClientConn
	timeout time.Duration // of a call
	cursor  atomic.Int64  // all keys in the slots before were revoked
	strange sync.Once
}

// runStore runs a store process until the parent ends it.
func runStore(text string, parent <-chan struct{}) error {
	var w worker
	if err := json.Unmarshal([]byte(text), &w.storeSettings); err != nil {
		return err
	}
	var err error
	if w.board, err = openBoard(w.Board); err != nil {
		return err
	}
	w.own = &w.board.stores[w.Index]
	if err := moveClock(&w.own.clock); err == nil {
		w.own.movable.Store(1)
	} else {
		fmt.Fprintln(os.Stderr, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		<-parent
		cancel()
	}()
	if err := w.open(ctx); err != nil {
		return err
	}
	defer w.store.Close()
	stop, err := w.serve()
	if err != nil {
		return err
	}
	defer stop()
	fmt.Println(ready)
	var all sync.WaitGroup
	for range callers {
		all.Go(func() { w.repeat(ctx, callPause, w.call) })
	}
	for range talkers {
		all.Go(func() { w.repeat(ctx, talkPause, w.talk) })
	}
	for range revokers {
		all.Go(func() { w.repeat(ctx, talkPause, w.revoke) })
	}
	for range sessions {
		all.Go(func() { w.repeat(ctx, sessionGap, w.session) })
	}
	all.Wait()
	return nil
}

// open opens the store, and waits for the engine.
func (w *worker) open(ctx context.Context) error {
	timeout := 2*w.Freshness + 2*time.Second
	w.timeout = timeout + callTimeout
	for {
		limited, cancel := context.WithTimeout(ctx, patience)
		b, err := openers[w.Engine](limited, w.Addresses, w.Space)
		cancel()
		if err == nil {
			if wrong := wrongs[w.Wrong]; wrong != nil {
				b = wrong(b)
			}
			w.store, err = keystore.New(b, &keystore.Options{Freshness: w.Freshness,
				Timeout: timeout})
			if err == nil {
				return nil
			}
			_ = b.Close()
		}
		fmt.Fprintln(os.Stderr, "open the store:", err)
		pauseFor(ctx, 100*time.Millisecond)
		if ctx.Err() != nil {
			return nil
		}
	}
}

// The service of a store process: one call, and one stream that returns what it receives.
const (
	serviceName = "sharedlab.Echo"
	callMethod  = "/" + serviceName + "/Call"
	talkMethod  = "/" + serviceName + "/Talk"
	slotHeader  = "slot"
)

// serve starts the gRPC server, and connects a client.
func (w *worker) serve() (stop func(), err error) {
	auth, err := interceptor.New(w.store)
	if err != nil {
		return nil, err
	}
	server := grpc.NewServer(auth.ServerOptions()...)
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Call", Handler: handleCall}},
		Streams: []grpc.StreamDesc{{StreamName: "Talk", Handler: w.handleTalk,
			ServerStreams: true, ClientStreams: true}},
	}, nil)
	listener := bufconn.Listen(1 << 16)
	go func() { _ = server.Serve(listener) }()
	w.conn, err = grpc.NewClient("passthrough:///store",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return listener.DialContext(ctx)
		}))
	return func() {
		_ = w.conn.Close()
		server.Stop()
	}, err
}

func handleCall(
	srv any, ctx context.Context, dec func(any) error, chain grpc.UnaryServerInterceptor,
) (any, error) {
	in := new(wrapperspb.Int64Value)
	if err := dec(in); err != nil {
		return nil, err
	}
	return chain(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: callMethod},
		func(context.Context, any) (any, error) { return in, nil })
}

// handleTalk sends back what it receives. The client sends the time of each message.
func (w *worker) handleTalk(_ any, stream grpc.ServerStream) error {
	n, err := strconv.Atoi(metadata.ValueFromIncomingContext(stream.Context(), slotHeader)[0])
	if err != nil {
		return err
	}
	seen := &w.board.slots[n].seen[w.Index]
	for {
		m := new(wrapperspb.Int64Value)
		if err := stream.RecvMsg(m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		raise(&seen.received, m.Value)
		began := monotonic()
		if err := stream.SendMsg(m); err != nil {
			return err
		}
		raise(&seen.sent, began)
		w.own.messages.Add(1)
	}
}

// repeat calls f until ctx ends, with pauses.
func (w *worker) repeat(ctx context.Context, pause time.Duration, f func(context.Context)) {
	for ctx.Err() == nil {
		f(ctx)
		pauseFor(ctx, rand.N(2*pause))
	}
}

// pauseFor waits for d, or until ctx ends.
func pauseFor(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// pick returns one of the last keys, or -1.
func (w *worker) pick() int {
	taken := w.board.used()
	among := min(taken, []int{recent, recent, recent, remembered}[rand.IntN(4)])
	if among == 0 {
		return -1
	}
	n := taken - 1 - rand.IntN(among)
	if w.board.slots[n].ready.Load() == 0 {
		return -1
	}
	return n
}

// pickIf returns one of the last keys that has a property, if it finds one soon.
func (w *worker) pickIf(has func(*slot) bool) (n int) {
	for range 8 {
		if n = w.pick(); n >= 0 && has(&w.board.slots[n]) {
			break
		}
	}
	return n
}

// isLive reports whether no process has begun to revoke a key.
func isLive(s *slot) bool { return s.revoking.Load() == 0 }

// isEnding reports whether a process has begun to revoke a key lately.
func isEnding(s *slot) bool { return s.revoking.Load() > monotonic()-int64(longUse) }

// call makes one call with one of the keys: to the gRPC server, or to the store.
func (w *worker) call(ctx context.Context) {
	has := isLive
	if rand.IntN(2) == 0 {
		has = isEnding
	}
	n := w.pickIf(has)
	if n < 0 {
		return
	}
	s := &w.board.slots[n]
	_, token := s.key()
	limited, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	updated := s.revision.Load()
	began := monotonic()
	var err error
	if rand.IntN(2) == 0 {
		err = w.conn.Invoke(metadata.AppendToOutgoingContext(limited, "authorization",
			"Bearer "+token), callMethod, new(wrapperspb.Int64Value), new(wrapperspb.Int64Value))
		w.judge(ctx, s, began, err)
		return
	}
	key, err := w.store.Verify(limited, token)
	if err == nil && key.Revision < uint64(updated) {
		raise(&s.seen[w.Index].stale, began)
	}
	w.judge(ctx, s, began, statusOf(err, w.own))
}

// statusOf returns the error of the store as the interceptors report it.
func statusOf(err error, own *storeBoard) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, keystore.ErrDenied):
		return status.Error(codes.Unauthenticated, err.Error())
	case errors.Is(err, keystore.ErrUnavailable):
		if errors.Is(err, cluster.ErrNoMembership) {
			own.gate.Add(1)
		}
		return status.Error(codes.Unavailable, err.Error())
	}
	return status.FromContextError(err).Err()
}

// judge notes the result of a call.
func (w *worker) judge(ctx context.Context, s *slot, began int64, err error) {
	seen := &s.seen[w.Index]
	switch code := status.Code(err); {
	case err == nil:
		w.own.admitted.Add(1)
		raise(&seen.admitted, began)
	case ctx.Err() != nil: // the process ends
	case code == codes.Unauthenticated:
		w.own.denied.Add(1)
		if s.revoking.Load() == 0 {
			raise(&seen.denied, began)
		}
	case code == codes.Unavailable:
		w.own.away.Add(1)
	case code == codes.DeadlineExceeded:
		w.own.late.Add(1)
	default:
		w.note("a call", err)
	}
}

// note notes a result that no fault explains.
func (w *worker) note(what string, err error) {
	w.own.strange.Add(1)
	w.strange.Do(func() { fmt.Fprintf(os.Stderr, "%s: %v\n", what, err) })
}

// talk opens a stream with one of the keys, and sends and receives messages for some time.
func (w *worker) talk(ctx context.Context) {
	n := w.pickIf(isLive)
	if n < 0 {
		return
	}
	s := &w.board.slots[n]
	_, token := s.key()
	limited, cancel := context.WithTimeout(ctx, rand.N(longUse))
	defer cancel()
	began := monotonic()
	stream, err := w.conn.NewStream(metadata.AppendToOutgoingContext(limited, "authorization",
		"Bearer "+token, slotHeader, strconv.Itoa(n)),
		&grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, talkMethod)
	for first := true; err == nil; first = false {
		m := wrapperspb.Int64(monotonic())
		if err = stream.SendMsg(m); err == nil || errors.Is(err, io.EOF) {
			err = stream.RecvMsg(m)
		}
		if err == nil && first {
			w.own.streams.Add(1)
			w.judge(ctx, s, began, nil)
		}
		if err == nil {
			pauseFor(limited, rand.N(2*talkPause))
		}
	}
	if limited.Err() == nil || status.Code(err) == codes.Unauthenticated {
		w.judge(ctx, s, began, err)
	}
}

// revoke creates a key if there are few, waits, and revokes one of the keys of all processes.
func (w *worker) revoke(ctx context.Context) {
	if w.board.live.Load() < maxLive {
		w.create(ctx)
	}
	pauseFor(ctx, rand.N(maxAge)) // the callers cache the key
	n := w.pick()
	if rand.IntN(4) == 0 {
		n = w.oldest()
	}
	if n < 0 || w.board.slots[n].good.Load() != 0 {
		return
	}
	s := &w.board.slots[n]
	id, _ := s.key()
	if rand.IntN(4) == 0 {
		w.update(ctx, s, id)
		return
	}
	if s.complete.Load() != 0 && rand.IntN(2) == 0 {
		w.revokeFamily(ctx, n)
		return
	}
	if !s.revoking.CompareAndSwap(0, monotonic()) {
		return
	}
	w.board.live.Add(-1)
	w.end(ctx, []*slot{s}, []func() error{
		func() error { return w.store.Revoke(ctx, id, "chaos") },
		func() error { return w.store.Revoke(ctx, id, "chaos") },
		func() error { return w.store.Disable(ctx, id, "chaos") },
		func() error {
			_, err := w.store.Rotate(ctx, id, 0)
			return err
		},
	}[rand.IntN(4)])
}

// end ends the use of keys with one call, and repeats a call that fails. A repeat is safe.
func (w *worker) end(ctx context.Context, keys []*slot, call func() error) {
	for range 3 {
		if err := call(); err == nil {
			returned := monotonic()
			for _, s := range keys {
				s.revoked.Store(returned)
			}
			w.own.revoked.Add(int64(len(keys)))
			w.own.returned.Add(1)
			return
		}
		w.own.uncertain.Add(1)
		if pauseFor(ctx, 20*time.Millisecond); ctx.Err() != nil {
			return
		}
	}
}

// revokeFamily revokes all keys with the owner of a key, the last of its family.
func (w *worker) revokeFamily(ctx context.Context, last int) {
	family := w.board.slots[last].family.Load()
	var keys []*slot
	for n := last; n >= max(0, last-familySpread); n-- {
		s := &w.board.slots[n]
		if s.ready.Load() != 0 && s.family.Load() == family &&
			s.revoking.CompareAndSwap(0, monotonic()) {
			w.board.live.Add(-1)
			keys = append(keys, s)
		}
	}
	w.end(ctx, keys, func() error {
		_, err := w.store.RevokeAll(ctx, keystore.Query{Owner: ownerOf(family)}, "chaos", nil)
		return err
	})
}

func ownerOf(family int64) string { return fmt.Sprint("family ", family) }

// create creates a key, or some keys with the same owner.
func (w *worker) create(ctx context.Context) {
	family, size := int64(0), 1
	if rand.IntN(4) == 0 {
		family, size = rand.Int64(), familySize
	}
	for i := range size {
		spec := keystore.Spec{Name: "chaos"}
		if family != 0 {
			spec.Owner = ownerOf(family)
		}
		began := monotonic()
		issued, err := w.store.Create(ctx, spec)
		if err != nil {
			return
		}
		n, ok := w.board.take()
		if !ok {
			return // the board is full
		}
		s := &w.board.slots[n]
		s.began.Store(began)
		s.family.Store(family)
		isGood := family == 0 && rand.IntN(15) == 0
		if isGood {
			s.good.Store(1)
		}
		if family != 0 && i == size-1 {
			s.complete.Store(1)
		}
		if err := s.publish(issued.Key.ID, issued.Secret.Reveal()); err != nil {
			w.note("publish", err)
			return
		}
		if !isGood {
			w.board.live.Add(1)
		}
	}
}

// oldest returns the oldest key that no process has begun to revoke, or -1.
func (w *worker) oldest() int {
	for n := int(w.cursor.Load()); n < w.board.used(); n++ {
		s := &w.board.slots[n]
		if s.ready.Load() != 0 && isLive(s) && s.good.Load() == 0 {
			w.cursor.Store(int64(n))
			return n
		}
	}
	return -1
}

// update makes the only Update of a key.
func (w *worker) update(ctx context.Context, s *slot, id string) {
	if !s.updating.CompareAndSwap(0, monotonic()) {
		return
	}
	key, err := w.store.Update(ctx, id, func(spec *keystore.Spec) error {
		spec.Name = "chaos, updated"
		return nil
	})
	if err == nil {
		s.updated.Store(monotonic())
		s.revision.Store(int64(key.Revision))
	}
}

// session opens a session with one of the keys, and looks at the session until it ends.
func (w *worker) session(ctx context.Context) {
	n := w.pickIf(isLive)
	if n < 0 {
		return
	}
	s := &w.board.slots[n]
	_, token := s.key()
	began := monotonic()
	session, err := w.store.Bind(ctx, token)
	w.judge(ctx, s, began, statusOf(err, w.own))
	if err != nil {
		return
	}
	defer session.Close()
	for until := time.Now().Add(rand.N(longUse)); ctx.Err() == nil && time.Now().Before(until); {
		began := monotonic()
		if session.Cause() != nil {
			return
		}
		raise(&s.seen[w.Index].alive, began)
		pauseFor(ctx, rand.N(talkPause))
	}
}
