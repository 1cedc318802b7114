package work

import (
	"context"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// The unary workload measures unary calls over a real socket. There is one server for each peer.
// All servers and callers run in this process, and the peers are measured in turns. The callers
// connect once, and each caller sends its own credential with every call.
var unaryWork = Workload{
	Name:  "unary",
	Title: "Unary calls, end to end",
	About: "8 connections over loopback, each with another credential and 4 concurrent calls, " +
		"and 64 bytes in each direction. Servers, callers, Redis and PostgreSQL share the " +
		"machine. A real network between the server and a database would slow down only the " +
		"peers with a look-up for each call.",
	Goals: []Goal{
		{
			ID: "unary-noauth", Work: "calls with grpc-api-key / calls with no auth",
			Bound: atLeast(0.98, Times),
		},
		{
			ID: "unary-redis", Work: "calls with grpc-api-key / calls with a Redis look-up",
			Bound: atLeast(1.5, Times),
		},
		{
			ID: "unary-postgres", Work: "calls with grpc-api-key / calls with a PostgreSQL look-up",
			Bound: atLeast(2, Times),
		},
	},
}

func init() { unaryWork.Run = runUnary }

const callsAtOnce = 4 // the number of concurrent calls on each connection

func runUnary(ctx context.Context, e *Env) (o *Outcome, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	all, skipped, err := peers.Start(ctx, dir)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(func() error { return peers.Close(all) })
	o = &Outcome{Skipped: skipped}
	rate := make(map[string]measure.Contestant)
	var contestants []measure.Contestant
	for _, p := range all {
		rig, err := peers.NewRig(&peers.Service{}, p.Good, p.Options...)
		if err != nil {
			return nil, err
		}
		end.add(rig.Close)
		c := measure.Contestant{Name: p.Name, Sample: func(context.Context) (float64, error) {
			call := func(g int) func() error { return rig.Call(ctx, g) }
			return measure.Throughput(callsAtOnce*len(p.Good), 1, e.turn(300*time.Millisecond), call)
		}}
		rate[p.Name] = c
		contestants = append(contestants, c)
	}
	s, err := measure.Rounds(ctx, e.rounds(15), e.progress("calling"), contestants...)
	if err != nil {
		return nil, err
	}
	// To measure a difference of 2 %, compare the two contestants alone and in more rounds.
	floor, err := measure.Rounds(ctx, e.rounds(150), e.progress("calling, with and without auth"),
		rate[peers.APIKey], rate[peers.NoAuth])
	if err != nil {
		return nil, err
	}
	o.judge(&unaryWork, "unary-noauth", measure.Ratios(floor[peers.APIKey], floor[peers.NoAuth]))
	for id, peer := range map[string]string{
		"unary-redis": peers.Redis, "unary-postgres": peers.PostgreSQL,
	} {
		if s[peer] == nil {
			o.skip(&unaryWork, id, peer+" is not installed")
			continue
		}
		o.judge(&unaryWork, id, measure.Ratios(s[peers.APIKey], s[peer]))
	}
	bars := chart.Bars{
		Name: "unary", Title: "Unary calls per second",
		Note: "more is better; callers and servers share the machine",
	}
	for _, p := range all {
		o.figure(p.Name, Rate, s[p.Name])
		o.note("%s: %s.", p.Name, p.How)
		median := measure.Median(s[p.Name])
		bars.Add(p.Name, median, Rate.Format(median), p.Name == peers.APIKey)
	}
	bars.Sort(true)
	o.Charts = append(o.Charts, &bars)
	return o, nil
}
