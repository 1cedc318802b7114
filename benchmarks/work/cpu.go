package work

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// The cpu workload measures the processor time of a whole server process for each unary call. The
// throughput of a loaded machine varies by several percent from turn to turn, and includes the work
// of the callers. The processor time of the server process varies less, and includes everything
// that the server does: gRPC, the system calls, the garbage collection.
//
// One child process runs the servers of all peers that work without another process. The callers
// are in this process. So all servers have the same heap, and the garbage collection costs all
// peers the same. Only one server at a time gets calls.
var cpuWork = Workload{
	Name:  "cpu",
	Title: "Processor time of unary calls",
	About: "One process runs a server for each peer, and the callers are in another process: 8 " +
		"connections over loopback, each with 4 concurrent calls and 64 bytes in each direction. " +
		"The processor time is the user and system time of the whole server process " +
		"(`getrusage`), divided by the number of calls. The allocations are the allocations of " +
		"the whole server process for each call of a single caller.",
	Goals: []Goal{
		{
			ID: "cpu-unary", Work: "processor time of a call with grpc-api-key / with no auth",
			Bound: atMost(1.02, Times),
		},
		{
			ID: "allocs-unary", Work: "allocations of a call with grpc-api-key - with no auth",
			Bound: atMost(2, Count),
		},
	},
}

func init() { cpuWork.Run = runCPU }

// cpuPeers are the peers that need no other process.
var cpuPeers = []string{
	peers.NoAuth, peers.APIKey, peers.Map, peers.LookAside, peers.HS256, peers.ES256,
}

// A served describes a server of the child process.
type served struct {
	Name, Addr string
	Good       []string // the credentials of the callers
}

// A spent is what the child process has used so far.
type spent struct {
	CPU         float64 // nanoseconds
	Allocations float64
}

// serve runs a server for each of cpuPeers. serve first writes a list of served to the standard
// output. Then serve answers each line on the standard input with a spent. serve returns at the end
// of the input.
func serve(dir string) (err error) {
	all, _, err := peers.Start(context.Background(), dir, cpuPeers...)
	if err != nil {
		return err
	}
	var end closer
	defer end.into(&err)
	end.add(func() error { return peers.Close(all) })
	var list []served
	for _, p := range all {
		addr, stop, err := peers.Serve(&peers.Service{}, p.Options...)
		if err != nil {
			return err
		}
		end.add(stop)
		list = append(list, served{p.Name, addr, p.Good})
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(list); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		cpu, err := processCPU()
		if err != nil {
			return err
		}
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		err = out.Encode(spent{float64(cpu.Nanoseconds()), float64(m.Mallocs)})
		if err != nil {
			return err
		}
	}
	return nil
}

// A server is the child process that runs serve.
type server struct {
	servers []served
	cmd     *exec.Cmd
	in      io.WriteCloser
	out     *json.Decoder
}

func startServer(ctx context.Context, dir string) (*server, error) {
	cmd, err := childCommand(ctx, "serve", dir)
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &server{cmd: cmd, in: in, out: json.NewDecoder(out)}
	if err := s.out.Decode(&s.servers); err != nil {
		return nil, errors.Join(fmt.Errorf("the server process does not start: %w", err), s.Close())
	}
	return s, nil
}

// spent asks the child process what it has used.
func (s *server) spent() (used spent, err error) {
	if _, err = io.WriteString(s.in, "\n"); err == nil {
		err = s.out.Decode(&used)
	}
	return used, err
}

// Close ends the child process.
func (s *server) Close() error { return errors.Join(s.in.Close(), s.cmd.Wait()) }

// allocations returns the allocations of the server process for each of n calls, one call at a
// time. The result is a whole number, because the rare allocations of the background are no part of
// a call.
func (s *server) allocations(n int, call func() error) (float64, error) {
	before, err := s.spent()
	for i := 0; i < n && err == nil; i++ {
		err = call()
	}
	if err != nil {
		return 0, err
	}
	after, err := s.spent()
	return math.Round((after.Allocations - before.Allocations) / float64(n)), err
}

func runCPU(ctx context.Context, e *Env) (o *Outcome, err error) {
	o = &Outcome{}
	if _, err := processCPU(); err != nil {
		for _, g := range cpuWork.Goals {
			o.skip(&cpuWork, g.ID, err.Error())
		}
		return o, nil
	}
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	child, err := startServer(ctx, dir)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(child.Close)

	cpu := make(map[string]measure.Contestant)
	allocations := make(map[string]measure.Contestant)
	rates := make(map[string][]float64)
	var all, counted []measure.Contestant
	for _, peer := range child.servers {
		rig, err := peers.Connect(peer.Addr, peer.Good)
		if err != nil {
			return nil, err
		}
		end.add(rig.Close)
		call := func(g int) func() error { return rig.Call(ctx, g) }
		c := measure.Contestant{Name: peer.Name, Sample: func(context.Context) (float64, error) {
			before, err := child.spent()
			if err != nil {
				return 0, err
			}
			begin := time.Now()
			rate, err := measure.Throughput(
				callsAtOnce*len(peer.Good), 1, e.turn(250*time.Millisecond), call)
			if err != nil {
				return 0, err
			}
			calls := rate * time.Since(begin).Seconds()
			rates[peer.Name] = append(rates[peer.Name], rate)
			after, err := child.spent()
			return (after.CPU - before.CPU) / calls, err
		}}
		a := measure.Contestant{Name: peer.Name, Sample: func(context.Context) (float64, error) {
			return child.allocations(e.size(2000), rig.Call(ctx, 0))
		}}
		cpu[peer.Name], allocations[peer.Name] = c, a
		all, counted = append(all, c), append(counted, a)
	}
	many, err := measure.Rounds(ctx, e.rounds(15), e.progress("calling all peers"), all...)
	if err != nil {
		return nil, err
	}
	clear(rates)
	pair, err := measure.Rounds(ctx, e.rounds(300), e.progress("calling with and without auth"),
		cpu[peers.APIKey], cpu[peers.NoAuth])
	if err != nil {
		return nil, err
	}
	made, err := measure.Rounds(ctx, e.rounds(11), e.progress("counting allocations"), counted...)
	if err != nil {
		return nil, err
	}

	o.judge(&cpuWork, "cpu-unary", measure.Ratios(pair[peers.APIKey], pair[peers.NoAuth]))
	o.judge(&cpuWork, "allocs-unary", measure.Differences(made[peers.APIKey], made[peers.NoAuth]))
	for _, name := range []string{peers.NoAuth, peers.APIKey} {
		o.figure(name+": processor time of a call, in pairs", Nanos, pair[name])
		o.figure(name+": calls per second, in pairs", Rate, rates[name][1:])
	}
	o.figure("calls per second with grpc-api-key / with no auth, in pairs", Times,
		measure.Ratios(rates[peers.APIKey][1:], rates[peers.NoAuth][1:]))
	for _, peer := range child.servers {
		o.figure(peer.Name+": processor time of a call", Nanos, many[peer.Name])
	}
	for _, peer := range child.servers {
		o.figure(peer.Name+": allocations of a call", Count, made[peer.Name])
	}
	return o, nil
}
