package work

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// The stream workload measures the cost of the interceptor for each message of a long stream. The
// interceptor guards a stream until the key ends. One stream with the interceptor and one stream
// without the interceptor stay open during the whole run, and carry their messages in turns. Each
// turn sends the same number of messages in both directions. In total, each stream carries at least
// 1,000,000 messages. The allocations are counted separately, in the handler of a real stream whose
// messages are not transferred, so that no other code allocates.
var streamWork = Workload{
	Name:  "stream",
	Title: "A stream of a million messages",
	About: "Two streams over loopback, one with the interceptor and one without, carry small " +
		"messages in turns. Half of the messages go in each direction, and each stream carries " +
		"more than a million messages. The allocations of the interceptor are counted without " +
		"the allocations of gRPC.",
	Goals: []Goal{
		{
			ID: "stream", Work: "cost of a message with the interceptor / without",
			Bound: atMost(1.01, Times),
		},
		{
			ID: "stream-allocs", Work: "allocations of the interceptor for each message",
			Bound: atMost(0, Count),
		},
	},
}

func init() { streamWork.Run = runStream }

// pingPong handles turns. The first message of a turn contains the number of messages of the turn.
// pingPong receives this number of messages, and then sends the same number of messages.
func pingPong(s peers.Duplex) error {
	reply := &testpb.StreamingOutputCallResponse{}
	for {
		first, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		n := int(first.ResponseParameters[0].Size)
		for range n - 1 {
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
		for range n {
			if err := s.Send(reply); err != nil {
				return err
			}
		}
	}
}

// turn makes one turn of n messages as the client.
func turn(s testpb.TestService_FullDuplexCallClient, n int) error {
	first := &testpb.StreamingOutputCallRequest{
		ResponseParameters: []*testpb.ResponseParameters{{Size: int32(n)}},
	}
	rest := &testpb.StreamingOutputCallRequest{}
	if err := s.Send(first); err != nil {
		return err
	}
	for range n - 1 {
		if err := s.Send(rest); err != nil {
			return err
		}
	}
	for range n {
		if _, err := s.Recv(); err != nil {
			return err
		}
	}
	return nil
}

func runStream(ctx context.Context, e *Env) (o *Outcome, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	both, _, err := peers.Start(ctx, dir, peers.APIKey, peers.NoAuth)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(func() error { return peers.Close(both) })
	rounds, messages := e.rounds(250), 5000 // messages in each direction of a turn
	cases := make([]measure.Contestant, 0, 2)
	o = &Outcome{}
	for _, p := range both {
		rig, err := peers.NewRig(&peers.Service{Duplex: pingPong}, p.Good, p.Options...)
		if err != nil {
			return nil, err
		}
		end.add(rig.Close)
		s, err := rig.Client(0).FullDuplexCall(ctx)
		if err != nil {
			return nil, err
		}
		timed := measure.Contestant{Name: p.Name, Sample: func(context.Context) (float64, error) {
			begin := time.Now()
			err := turn(s, messages)
			return float64(time.Since(begin).Nanoseconds()) / float64(2*messages), err
		}}
		cases = append(cases, timed)
	}
	s, err := measure.Rounds(ctx, rounds, e.progress("streaming"), cases...)
	if err != nil {
		return nil, err
	}
	o.note("Each stream carried %d messages in %d turns; the first turn only warms up.",
		2*messages*(rounds+1), rounds+1)
	o.judge(&streamWork, "stream", measure.Ratios(s[peers.APIKey], s[peers.NoAuth]))
	guarded := slices.IndexFunc(both, func(p *peers.Peer) bool { return p.Name == peers.APIKey })
	allocated, err := streamAllocations(ctx, both[guarded])
	if err != nil {
		return nil, err
	}
	o.judge(&streamWork, "stream-allocs", []float64{allocated})
	for _, p := range both {
		o.figure("one message, "+p.Name, Nanos, s[p.Name])
	}
	return o, nil
}

// A hollow is a real stream, so that the interceptor treats it like any stream, but its messages
// are not transferred.
type hollow struct{ grpc.ServerStream }

func (hollow) RecvMsg(any) error { return nil }
func (hollow) SendMsg(any) error { return nil }

// streamAllocations returns the number of allocations of the interceptor for each message.
func streamAllocations(ctx context.Context, apiKey *peers.Peer) (float64, error) {
	counted := make(chan float64, 1)
	service := &peers.Service{Duplex: func(s peers.Duplex) error {
		request := &testpb.StreamingOutputCallRequest{}
		reply := &testpb.StreamingOutputCallResponse{}
		var failed error
		// Each run is one message to the server and one message back.
		allocated := testing.AllocsPerRun(10_000, func() {
			failed = errors.Join(failed, s.RecvMsg(request), s.SendMsg(reply))
		})
		counted <- allocated / 2
		return failed
	}}
	outside := grpc.ChainStreamInterceptor(func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
	) error {
		return next(srv, hollow{ss})
	})
	options := append([]grpc.ServerOption{outside}, apiKey.Options...)
	rig, err := peers.NewRig(service, apiKey.Good, options...)
	if err != nil {
		return 0, err
	}
	s, err := rig.Client(0).FullDuplexCall(ctx)
	if err == nil {
		if _, err = s.Recv(); errors.Is(err, io.EOF) {
			err = nil
		}
	}
	if err := errors.Join(err, rig.Close()); err != nil {
		return 0, err
	}
	return <-counted, nil
}
