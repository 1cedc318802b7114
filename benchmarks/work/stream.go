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

// What the interceptor costs a message of a long stream, which it guards until the key ends. Two streams stay open from
// beginning to end, one with the interceptor and one without, and carry their messages in turns: each turn so many to the
// server and as many back, 1,000,000 in all at least. What it allocates is counted apart, where nothing else allocates: in
// the handler of a real stream, around messages that come and go nowhere.
var streamWork = Workload{
	Name:  "stream",
	Title: "A stream of a million messages",
	About: "Two streams over loopback, with the interceptor and without, carry small messages in turns, half of them in each " +
		"direction, over a million each. What the interceptor allocates is counted without gRPC's own allocations.",
	Goals: []Goal{
		{ID: "stream", Work: "cost of a message with the interceptor / without", Bound: atMost(1.01, Times)},
		{ID: "stream-allocs", Work: "allocations a message that the interceptor adds", Bound: atMost(0, Count)},
	},
}

func init() { streamWork.Run = runStream }

// pingPong takes as many messages as the first one of a turn says, and sends as many back.
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

// turn is one turn of the client's.
func turn(s testpb.TestService_FullDuplexCallClient, n int) error {
	first := &testpb.StreamingOutputCallRequest{ResponseParameters: []*testpb.ResponseParameters{{Size: int32(n)}}}
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
	rounds, messages := e.rounds(250), 5000 // in each direction, a turn
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
	o.note("Each stream carried %d messages in %d turns, after one turn of warming up.", 2*messages*(rounds+1), rounds+1)
	o.judge(&streamWork, "stream", measure.Ratios(s[peers.APIKey], s[peers.NoAuth]))
	allocated, err := streamAllocations(ctx, both[slices.IndexFunc(both, func(p *peers.Peer) bool { return p.Name == peers.APIKey })])
	if err != nil {
		return nil, err
	}
	o.judge(&streamWork, "stream-allocs", []float64{allocated})
	for _, p := range both {
		o.figure("a message, "+p.Name, Nanos, s[p.Name])
	}
	return o, nil
}

// A hollow stream is a real one, so that the interceptor treats it as such, whose messages come and go nowhere.
type hollow struct{ grpc.ServerStream }

func (hollow) RecvMsg(any) error { return nil }
func (hollow) SendMsg(any) error { return nil }

// streamAllocations counts what a message allocates in the interceptor.
func streamAllocations(ctx context.Context, apiKey *peers.Peer) (float64, error) {
	counted := make(chan float64, 1)
	service := &peers.Service{Duplex: func(s peers.Duplex) error {
		request, reply := &testpb.StreamingOutputCallRequest{}, &testpb.StreamingOutputCallResponse{}
		var failed error
		allocated := testing.AllocsPerRun(10_000, func() { // a message to the server, and one back
			failed = errors.Join(failed, s.RecvMsg(request), s.SendMsg(reply))
		})
		counted <- allocated / 2
		return failed
	}}
	outside := grpc.ChainStreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		return next(srv, hollow{ss})
	})
	rig, err := peers.NewRig(service, apiKey.Good, append([]grpc.ServerOption{outside}, apiKey.Options...)...)
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
