package hostiletest

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var duration = flag.Duration("attack", 300*time.Millisecond, "the duration of each attack")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hang is the longest duration of any step on a busy machine. A longer step counts as stuck.
const hang = 2 * time.Minute

// bystanders is the number of normal streams that are open with the key of the victim.
const bystanders = 20

// recommended returns the recommended options of a server that is reachable for strangers.
func recommended() []grpc.ServerOption {
	return []grpc.ServerOption{
		// for each connection; there is no limit by default
		grpc.MaxConcurrentStreams(1000),
		grpc.MaxHeaderListSize(16 << 10), // 16 MiB by default
		grpc.MaxRecvMsgSize(1 << 20),     // 4 MiB by default
		// 2 minutes by default, for TLS and the HTTP/2 preface
		grpc.ConnectionTimeout(10 * time.Second),
		// Close the connection of a peer that has disappeared, or has stopped in the middle of a
		// frame.
		grpc.KeepaliveParams(keepalive.ServerParameters{
			Time: 30 * time.Second, Timeout: 10 * time.Second, // 2 hours and 20 s by default
			MaxConnectionIdle: 15 * time.Minute, // unlimited by default
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second}),
	}
}

// A site is a server with a store, good clients, and the key of a victim.
type site struct {
	*testing.T
	store *keystore.Store
	addr  string

	victim, token string // the ID and the text of the key that will be revoked
	revoked       atomic.Bool
	handlers      atomic.Int64 // the number of handlers that run with the key of the victim
	late          atomic.Int64 // the number of messages with this key after the return of Revoke

	other string // the key of the good clients

	// ready reports whether the attack is at full strength. If ready is nil, the attack is at full
	// strength after half of its duration.
	ready func() bool
}

// newSite starts a server with the recommended options. The options in opts override these options.
func newSite(t *testing.T, opts ...grpc.ServerOption) *site {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	// A long timeout, because a busy machine must not cause a failure.
	store, err := keystore.Open(t.TempDir(), &keystore.Options{Timeout: hang})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	auth, err := interceptor.New(store)
	require.NoError(t, err)
	s := &site{T: t, store: store}
	s.victim, s.token = s.issue()
	_, s.other = s.issue()

	opts = append(append(recommended(), opts...), auth.ServerOptions()...)
	server := grpc.NewServer(append(opts, grpc.WaitForHandlers(true))...)
	testpb.RegisterTestServiceServer(server, &service{site: s})
	healthpb.RegisterHealthServer(server, health.NewServer())
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.addr = lis.Addr().String()
	done := make(chan error, 1)
	go func() { done <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-done)
		require.Zero(t, store.Stats().Live, "a stream still exists after the end of the server")
	})
	return s
}

func (s *site) issue() (id, token string) {
	issued, err := s.store.Create(s.Context(), keystore.Spec{Name: "test"})
	require.NoError(s, err)
	return issued.Key.ID, issued.Secret.Reveal()
}

func (s *site) dial() testpb.TestServiceClient {
	conn, err := grpc.NewClient(s.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(s, err)
	s.Cleanup(func() { _ = conn.Close() })
	return testpb.NewTestServiceClient(conn)
}

func withKey(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// A service echoes messages. If the metadata contains "flood", the service sends messages without
// end.
type service struct {
	testpb.UnimplementedTestServiceServer
	site *site
}

func (*service) EmptyCall(context.Context, *testpb.Empty) (*testpb.Empty, error) {
	return &testpb.Empty{}, nil
}

func (v *service) FullDuplexCall(stream testpb.TestService_FullDuplexCallServer) error {
	s := v.site
	key, ok := interceptor.FromContext(stream.Context())
	if !ok {
		return status.Error(codes.Internal, "no key in the context")
	}
	note := func(bool) {}
	if key.ID == s.victim {
		s.handlers.Add(1)
		defer s.handlers.Add(-1)
		note = func(after bool) {
			if after {
				s.late.Add(1)
			}
		}
	}
	flood := len(metadata.ValueFromIncomingContext(stream.Context(), "flood")) > 0
	m := &testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: make([]byte, 4<<10)}}
	if !flood {
		m = &testpb.StreamingOutputCallResponse{}
	}
	for {
		if !flood {
			// Load before the call of Recv: if true, a message that Recv returns is late.
			after := s.revoked.Load()
			if _, err := stream.Recv(); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			note(after)
		}
		after := s.revoked.Load()
		if err := stream.Send(m); err != nil {
			return err
		}
		note(after)
	}
}

// under runs the attack, and revokes the key of the victim in the middle of the attack. During the
// attack, under checks that good clients have no errors. Afterwards, under checks that no handlers,
// streams or memory remain. The attack continues until its context is done.
func (s *site) under(attack func(ctx context.Context)) {
	before := heap()
	good := s.startGood()
	streams := s.openStreams(bystanders)

	ctx, stop := context.WithCancel(s.Context())
	defer stop()
	var attackers sync.WaitGroup
	attackers.Go(func() { attack(ctx) })
	peak := make(chan uint64, 1)
	go func() { peak <- watchHeap(ctx) }()
	time.Sleep(*duration / 2)
	if s.ready != nil {
		s.eventually("the attack did not reach full strength", s.ready)
	}

	patience, cancel := context.WithTimeout(s.Context(), hang)
	defer cancel()
	live := s.store.Stats().Live
	begin := time.Now()
	require.NoError(s, s.store.Revoke(patience, s.victim, "attacked"))
	s.revoked.Store(true)
	s.Logf("Revoke took %v, among %d live streams", time.Since(begin).Round(time.Microsecond), live)
	for _, stream := range streams {
		for err := error(nil); ; {
			if _, err = stream.Recv(); err != nil {
				require.NoError(s, endedByRevocation(err))
				break
			}
		}
	}
	_, err := s.dial().EmptyCall(withKey(patience, s.token), &testpb.Empty{})
	require.Equal(s, codes.Unauthenticated, status.Code(err))
	s.eventually("handlers still run with the revoked key", func() bool {
		return s.handlers.Load() == 0
	})

	time.Sleep(*duration / 2)
	stop()
	attackers.Wait()
	highest := <-peak
	calls, errs := good.stop()
	require.Empty(s, errs, "good clients had errors")
	require.NotZero(s, calls)
	require.Zero(s, s.late.Load(), "messages passed with the revoked key")
	s.eventually("some streams have not ended", func() bool { return s.store.Stats().Live == 0 })
	// The server may still read data that the attackers have sent before their end.
	var after uint64
	s.eventually("the server did not release memory", func() bool {
		after = heap()
		return after < before+32<<20
	})
	s.Logf("%d good calls, none failed; heap %d MiB before, %d MiB at most, %d MiB after",
		calls, before>>20, highest>>20, after>>20)
	totals.add(s.T, int(calls), int(after>>20)-int(before>>20), highest)
}

// attacks counts the attacks of this process. Attacks run one after the other.
type attacks struct {
	count, calls int
	grown        int    // in MiB: the largest growth of the heap by one attack
	highest      uint64 // the largest heap during an attack
	worst        string // the attack with the largest heap
}

var totals attacks

func (a *attacks) add(t *testing.T, calls, grown int, highest uint64) {
	a.count++
	a.calls += calls
	a.grown = max(a.grown, grown)
	if highest > a.highest {
		a.highest, a.worst = highest, t.Name()
	}
	figures.RecordAs(t, "attacks", "%d attacks of %v: 0 of %d good calls failed; heap afterwards "+
		"at most %d MiB above before; at its height %d MiB, under %s",
		a.count, *duration, a.calls, a.grown, a.highest>>20, a.worst)
}

// openStreams opens streams with the key of the victim, and checks that each stream works.
func (s *site) openStreams(n int) (streams []testpb.TestService_FullDuplexCallClient) {
	client := s.dial()
	for range n {
		stream, err := client.FullDuplexCall(withKey(s.Context(), s.token))
		require.NoError(s, err)
		require.NoError(s, stream.Send(&testpb.StreamingOutputCallRequest{}))
		_, err = stream.Recv()
		require.NoError(s, err)
		streams = append(streams, stream)
	}
	return streams
}

// endedByRevocation returns nil if err is the error that the client of a stream receives when the
// key of the stream is revoked.
func endedByRevocation(err error) error {
	st := status.Convert(err)
	for _, d := range st.Details() {
		info, ok := d.(*errdetails.ErrorInfo)
		if ok && st.Code() == codes.Unauthenticated && info.Reason == "API_KEY_REVOKED" {
			return nil
		}
	}
	return fmt.Errorf("the stream did not end because of the revocation: %w", err)
}

func (s *site) eventually(what string, ok func() bool) {
	require.Eventually(s, ok, hang, 5*time.Millisecond, what)
}

// A good is a group of clients with a valid key. The clients make unary calls and send messages on
// streams all the time, and must never fail.
type good struct {
	done  chan struct{}
	wg    sync.WaitGroup
	calls atomic.Int64

	mu     sync.Mutex
	errors []string
}

func (s *site) startGood() *good {
	g := &good{done: make(chan struct{})}
	for range 4 {
		client := s.dial()
		g.wg.Go(func() {
			ctx, cancel := context.WithCancel(withKey(s.Context(), s.other))
			defer cancel()
			stream, err := client.FullDuplexCall(ctx)
			g.note(err)
			if err != nil {
				return
			}
			tick := time.NewTicker(2 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-g.done:
					g.note(stream.CloseSend())
					if _, err := stream.Recv(); err != io.EOF {
						g.note(
							fmt.Errorf("a good stream must end with io.EOF, but ended with: %w",
								err))
					}
					return
				case <-tick.C:
				}
				patience, cancel := context.WithTimeout(ctx, hang)
				_, err := client.EmptyCall(patience, &testpb.Empty{})
				cancel()
				g.note(err)
				g.note(stream.Send(&testpb.StreamingOutputCallRequest{}))
				_, err = stream.Recv()
				g.note(err)
				if g.calls.Add(2); err != nil {
					return
				}
			}
		})
	}
	return g
}

func (g *good) note(err error) {
	if err != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.errors = append(g.errors, err.Error())
	}
}

func (g *good) stop() (calls int64, errs string) {
	close(g.done)
	g.wg.Wait()
	return g.calls.Load(), strings.Join(g.errors, "\n")
}

// heap returns the memory in use after two garbage collections. The second collection empties the
// pools.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// watchHeap returns the largest size of the heap until ctx is done, garbage included.
func watchHeap(ctx context.Context) (most uint64) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		most = max(most, m.HeapAlloc)
		select {
		case <-ctx.Done():
			return most
		case <-tick.C:
		}
	}
}
