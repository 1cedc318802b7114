package interceptor_test

import (
	"flag"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var (
	streamCount = flag.Int("streams", 1000, "how many streams are live when their key is revoked")
	revocations = flag.Int("revocations", 3, "how many times that is done")
)

// The main promise: one Revoke ends 1,000 live streams over ten connections.
//
// The server detects late messages. A message is late if a Recv or Send began after Revoke had
// returned and succeeded, or if a client sent a message after Revoke had returned and a handler got
// the message. The test sets a flag after Revoke has returned. A goroutine that loads the flag as
// true, and then calls, calls after Revoke has returned. This order is a happens-before order, not
// an order of clocks, so no message is late by accident.
func TestRevokeUnderAThousandStreams(t *testing.T) {
	store := openStore(t)
	bystander, otherToken := issue(t, store, keystore.Spec{})
	idle, _ := issue(t, store, keystore.Spec{})
	r := &crowd{bystander: bystander.ID}
	addr := serve(t, &service{duplex: r.handle}, newAuth(t, store).ServerOptions()...)
	for range 10 {
		r.clients = append(r.clients, testpb.NewTestServiceClient(dial(t, addr)))
	}
	other, err := r.clients[0].FullDuplexCall(withKey(t.Context(), otherToken))
	require.NoError(t, err)
	stillWorks := func() {
		require.NoError(t, other.Send(&testpb.StreamingOutputCallRequest{}))
		_, err := other.Recv()
		require.NoError(t, err, "the stream of another key goes on")
	}
	stillWorks()

	for _, kinds := range [][]string{
		{"quiet"},
		{"echo", "echo", "echo", "echo", "echo", "echo", "echo", "echo", "sends", "receives"},
	} {
		t.Run(strings.Join(slices.Compact(slices.Clone(kinds)), ", "), func(t *testing.T) {
			var commits, revokes, known []time.Duration
			for n := range *revocations {
				key, token := issue(t, store, keystore.Spec{})
				ends := r.open(t, token, kinds)
				require.Equal(t, *streamCount+1, store.Stats().Live)
				for range 3 {
					commits = append(commits, timed(func() {
						_, err := store.Update(t.Context(), idle.ID,
							func(spec *keystore.Spec) error {
								spec.Metadata = map[string]string{
									"round": string(rune('a' + (n+len(commits))%26)),
								}
								return nil
							})
						require.NoError(t, err)
					}))
				}
				known = append(known, timed(func() {
					revokes = append(revokes,
						timed(func() { require.NoError(t, store.Revoke(t.Context(), key.ID, "")) }))
					r.round.Load().revoked.Store(true)
					close(r.round.Load().after)
					for range *streamCount {
						requireRefused(t, <-ends, codes.Unauthenticated, "API_KEY_REVOKED")
					}
				}))
				r.handlers.Wait()
				require.Zero(t, r.round.Load().late.Load(),
					"messages went through after Revoke had returned")
				require.Equal(t, 1, store.Stats().Live)
				stillWorks()
			}
			figures.Record(t,
				"%d streams, %d revocations: 0 messages after Revoke returned; p50 and p99 of "+
					"Revoke %v and %v, of one durable commit beside them %v and %v, until the "+
					"last client knew %v and %v",
				*streamCount, *revocations, quantile(revokes, 50), quantile(revokes, 99),
				quantile(commits, 50), quantile(commits, 99),
				quantile(known, 50), quantile(known, 99))
		})
	}
}

// A crowd is many streams under one key.
type crowd struct {
	bystander string // the ID of the key of one stream that does not end
	clients   []testpb.TestServiceClient
	round     atomic.Pointer[round]
	handlers  sync.WaitGroup
}

type round struct {
	revoked atomic.Bool   // set after Revoke has returned
	after   chan struct{} // closed after Revoke has returned
	late    atomic.Int64  // number of late messages
	arrived sync.WaitGroup
	start   chan struct{}  // closed when all handlers have arrived
	flowing sync.WaitGroup // done when each handler has got a message
}

func (r *crowd) open(t *testing.T, token string, kinds []string) (ends <-chan error) {
	now := &round{after: make(chan struct{}), start: make(chan struct{})}
	r.round.Store(now)
	now.arrived.Add(*streamCount)
	now.flowing.Add(*streamCount)
	r.handlers.Add(*streamCount)
	all := make(chan error, *streamCount)
	for i := range *streamCount {
		kind := kinds[i/len(r.clients)%len(kinds)]
		ctx := metadata.AppendToOutgoingContext(withKey(t.Context(), token), "kind", kind)
		stream, err := r.clients[i%len(r.clients)].FullDuplexCall(ctx)
		require.NoError(t, err)
		// The message contains whether it was sent after Revoke had returned.
		send := func() error {
			return stream.Send(
				&testpb.StreamingOutputCallRequest{
					Payload: &testpb.Payload{Body: mark(now.revoked.Load())}})
		}
		recv := func() error {
			m, err := stream.Recv()
			if err == nil && marked(m.Payload) {
				now.late.Add(1)
			}
			return err
		}
		go func() {
			<-now.start
			for err := error(nil); ; {
				if kind == "echo" {
					_ = send() // the error is io.EOF; Recv returns the status
				}
				if err = recv(); err != nil {
					all <- err
					return
				}
			}
		}()
		if kind == "receives" || kind == "quiet" {
			go func() {
				<-now.start
				if kind == "quiet" {
					<-now.after
				}
				for send() == nil && kind != "quiet" {
				}
			}()
		}
	}
	now.arrived.Wait()
	close(now.start)
	now.flowing.Wait()
	return all
}

func (r *crowd) handle(s duplexStream) error {
	if k, _ := interceptor.FromContext(s.Context()); k.ID == r.bystander {
		for {
			if _, err := s.Recv(); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			if err := s.Send(payload(1)); err != nil {
				return err
			}
		}
	}
	defer r.handlers.Done()
	now := r.round.Load()
	now.arrived.Done()
	kind := metadata.ValueFromIncomingContext(s.Context(), "kind")[0]
	<-now.start
	flows := sync.OnceFunc(now.flowing.Done)
	if kind == "quiet" {
		flows()
	}
	for {
		before := now.revoked.Load()
		if kind != "sends" {
			m, err := s.Recv()
			if err != nil {
				return err
			}
			if before || marked(m.Payload) {
				now.late.Add(1)
			}
			flows()
			before = now.revoked.Load()
		}
		if kind == "echo" || kind == "sends" {
			err := s.Send(
				&testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: mark(before)}})
			if err != nil {
				return err
			}
			flows()
			if before {
				now.late.Add(1)
			}
		}
	}
}

func mark(late bool) []byte {
	body := make([]byte, 100)
	if late {
		body[0] = 1
	}
	return body
}

func marked(p *testpb.Payload) bool { return len(p.GetBody()) > 0 && p.Body[0] == 1 }

func timed(f func()) time.Duration {
	begin := time.Now()
	f()
	return time.Since(begin)
}

// quantile returns the value that the given percentage of values does not exceed.
func quantile(values []time.Duration, percent int) time.Duration {
	slices.Sort(values)
	return values[(len(values)*percent+99)/100-1].Round(time.Microsecond)
}
