package work

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The revoke workload measures two durations, for several numbers of live streams under the revoked
// key: from the call of Revoke to the return of Revoke, and to the end of the stream at the last
// client. Every stream is a real stream. The handler is blocked in Recv. The client is blocked in
// Recv too, and receives Unauthenticated.
var revokeWork = Workload{
	Name:  "revoke",
	Title: "Revocation under live streams",
	About: "0, 1,000 and 10,000 streams under the revoked key, over 8 connections. The handler " +
		"and the client of each stream are blocked in Recv. Server and clients share the " +
		"machine, so the time to the last client includes the work of all clients.",
	Goals: []Goal{{
		ID: "revoke", Work: "return of Revoke, 10,000 live streams / none",
		Bound: atMost(2, Times), Or: &Bound{true, 5e6, MoreThan},
	}},
}

func init() { revokeWork.Run = runRevoke }

func runRevoke(ctx context.Context, e *Env) (o *Outcome, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	store, err := keystore.Open(filepath.Join(dir, "store"), peers.Options(0))
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(store.Close)
	auth, err := interceptor.New(store)
	if err != nil {
		return nil, err
	}
	service := &peers.Service{Duplex: func(s peers.Duplex) error {
		if err := s.Send(&testpb.StreamingOutputCallResponse{}); err != nil { // the stream is live
			return err
		}
		_, err := s.Recv()
		return err
	}}
	rig, err := peers.NewRig(service, make([]string, peers.Clients), auth.ServerOptions()...)
	if err != nil {
		return nil, err
	}
	end.add(rig.Close)

	counts := []int{0, e.size(1000), e.size(10_000)}
	if e.Quick {
		counts = []int{0, 100, 1000}
	}
	name := func(streams int) string {
		return fmt.Sprintf("return of Revoke, live streams: %d", streams)
	}
	last := make(map[int][]float64) // the time to the end of the last stream
	var contestants []measure.Contestant
	for _, n := range counts {
		sample := func(ctx context.Context) (float64, error) {
			returned, known, err := revokeOne(ctx, store, rig, n)
			last[n] = append(last[n], float64(known.Nanoseconds()))
			return float64(returned.Nanoseconds()), err
		}
		contestants = append(contestants, measure.Contestant{Name: name(n), Sample: sample})
	}
	progress := e.progress("revoking under streams")
	s, err := measure.Rounds(ctx, e.rounds(12), progress, contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	none, most := s[name(0)], s[name(counts[2])]
	o.judgeEither(&revokeWork, "revoke", measure.Ratios(most, none), measure.Differences(most, none))
	bars := chart.Bars{
		Name: "revoke", Title: "Revocation under live streams",
		Note: "less is better; logarithmic", Log: true,
	}
	add := func(name string, samples []float64) {
		o.figure(name, Nanos, samples)
		median := measure.Median(samples)
		bars.Add(name, median, Nanos.Format(median), true)
	}
	for _, n := range counts {
		add(name(n), s[name(n)])
	}
	for _, n := range counts[1:] {
		add(fmt.Sprintf("end of the last of %d streams at its client", n), last[n][1:])
	}
	o.figure(fmt.Sprintf("return of Revoke, %d live streams / none", counts[2]),
		Times, measure.Ratios(most, none))
	o.figure(fmt.Sprintf("return of Revoke, %d live streams - none", counts[2]),
		MoreThan, measure.Differences(most, none))
	o.Charts = append(o.Charts, &bars)
	return o, nil
}

// revokeOne creates a key, opens the given number of streams with the key, and revokes the key.
// returned is the duration of Revoke. known is the time from the call of Revoke to the end of the
// last stream at its client.
func revokeOne(
	ctx context.Context, store *keystore.Store, rig *peers.Rig, streams int,
) (returned, known time.Duration, err error) {
	issued, err := store.Create(ctx, peers.Spec())
	if err != nil {
		return 0, 0, err
	}
	// Put the key into the cache, also if there are no streams.
	if _, err := store.Verify(ctx, issued.Secret.Reveal()); err != nil {
		return 0, 0, err
	}
	var (
		live, ended sync.WaitGroup
		mu          sync.Mutex
		failed      error
		credential  = grpc.PerRPCCredentials(peers.Bearer(issued.Secret.Reveal()))
		fail        = func(err error) {
			mu.Lock()
			defer mu.Unlock()
			failed = errors.Join(failed, err)
		}
	)
	live.Add(streams)
	for i := range streams {
		ended.Go(func() {
			s, err := rig.Client(i).FullDuplexCall(ctx, credential)
			if err == nil {
				_, err = s.Recv()
			}
			live.Done()
			if err != nil {
				fail(err)
				return
			}
			if _, err := s.Recv(); status.Code(err) != codes.Unauthenticated {
				fail(fmt.Errorf("the stream must end with Unauthenticated, but ended with: %v", err))
			}
		})
	}
	live.Wait()
	begin := time.Now()
	err = store.Revoke(ctx, issued.Key.ID, "measured")
	returned = time.Since(begin)
	ended.Wait()
	return returned, time.Since(begin), errors.Join(err, failed)
}
