package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math"
	"math/rand/v2"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Feed implements backend.Feeder. A position is a revision of etcd.
//
// Feed opens its own stream, and does not use the Watcher of the client. After a lost connection,
// the Watcher continues without a check, even on an etcd that was restored. The Watcher also
// buffers, without a bound, what the caller has not read. After the end of a stream, Feed opens
// another stream, and first checks whether etcd still has the history of the last position; see
// history. If streams fail for 30 s, Feed ends with the error.
//
// The stream requires a leader: a member of etcd that is cut off from the leader ends the stream,
// so that the next stream can reach another member.
func (b *Backend) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	start, end := b.bounds(from, to)
	return func(yield func(backend.Batch, error) bool) {
		f := feed{Backend: b, caller: ctx, start: start, end: end, at: after, yield: yield}
		if err := f.run(); !errors.Is(err, errStopped) {
			yield(backend.Batch{}, err)
		}
	}
}

// errStopped ends a feed because the caller has ended the loop.
var errStopped = errors.New("the caller has ended the loop")

// A feed is one loop over a Feed.
type feed struct {
	*Backend
	caller     context.Context
	start, end string           // the range, as keys of etcd
	at         backend.Position // the feed has yielded everything up to here; 0: not begun
	generation uint64           // of at
	yield      func(backend.Batch, error) bool
	failing    time.Time       // since when streams fail; zero: the last stream had a response
	pending    []*mvccpb.Event // the fragments of a response that is not complete
	verify     *position       // the change that the next event must be; nil: any event may come
}

// After the end of a stream, a feed opens another stream. The feed gives up after feedPatience
// without a response, so that the caller learns why.
const (
	feedPatience = 30 * time.Second
	minFeedPause = 20 * time.Millisecond
	maxFeedPause = 500 * time.Millisecond
)

// run runs the feed, and returns why the feed ended.
func (f *feed) run() error {
	ctx, stop, err := f.calls.Join(f.caller)
	if err != nil {
		return err
	}
	defer stop()
	resumes := f.at != 0
	if resumes {
		var ok bool
		if f.generation, ok = f.history.resume(); !ok {
			return gap(errRestored)
		}
	} else if err := f.begin(); err != nil {
		return err
	}
	if f.start >= f.end { // no change is in the range
		<-ctx.Done()
		return f.calls.Ended(f.caller)
	}
	for pause := minFeedPause; ; resumes = true {
		err := f.follow(ctx, resumes)
		if errors.Is(err, errStopped) {
			return err
		}
		if ended := f.calls.Ended(f.caller); ended != nil {
			return ended
		}
		if !isTransient(err) {
			return err
		}
		if f.failing.IsZero() {
			f.failing, pause = time.Now(), minFeedPause
		}
		if time.Since(f.failing) > feedPatience {
			return err
		}
		f.log.Log(slog.LevelDebug, "the feed from etcd begins again", "prefix", f.prefix,
			"error", err)
		remote.Sleep(ctx, pause/2+rand.N(pause/2))
		pause = min(2*pause, maxFeedPause)
	}
}

// begin starts the feed at the present.
func (f *feed) begin() error {
	r, generation, err := f.read(f.caller, "feed", f.base, clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	f.history.start(generation)
	f.at, f.generation = backend.Position(r.Header.Revision), generation
	return f.pass(backend.Batch{Position: f.at})
}

// check returns ErrGap if etcd has another history than the position of the feed.
func (f *feed) check() error {
	ctx, cancel := context.WithTimeout(f.caller, feedPatience)
	defer cancel()
	r, generation, err := f.read(ctx, "feed", f.base, clientv3.WithKeysOnly())
	if err != nil {
		return err
	}
	if generation != f.generation {
		return gap(errRestored)
	}
	if r.Header.Revision < int64(f.at) {
		return f.history.changed(f.Backend, generation, f.at)
	}
	if p, ok := f.history.known(f.at); ok && f.start <= p.key && p.key < f.end {
		f.verify = &p
	}
	return nil
}

// follow opens a stream after the position of the feed, and yields what the stream has.
func (f *feed) follow(ctx context.Context, resumes bool) error {
	f.pending, f.verify = nil, nil
	if resumes {
		if err := f.check(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream
	stream, err := f.watch.Watch(clientv3.WithRequireLeader(ctx),
		grpc.MaxCallRecvMsgSize(math.MaxInt32))
	if err != nil {
		return f.wrap(f.caller, "feed", err)
	}
	first := int64(f.at) + 1
	if f.verify != nil {
		first-- // the change at the position comes once more
	}
	// If Send fails, the stream has ended, and Recv has the reason.
	_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{
		CreateRequest: &pb.WatchCreateRequest{Key: []byte(f.start), RangeEnd: []byte(f.end),
			StartRevision: first, Fragment: true},
	}})
	for {
		events, err := f.receive(stream)
		if err == nil {
			err = f.deliver(events)
		}
		if err != nil {
			return err
		}
	}
}

// pass yields a Batch. The body of the loop may end the context, or close the Backend.
func (f *feed) pass(batch backend.Batch) error {
	if !f.yield(batch, nil) {
		return errStopped
	}
	return f.calls.Ended(f.caller)
}

// receive returns the events of the next response, or none.
func (f *feed) receive(stream pb.Watch_WatchClient) ([]*mvccpb.Event, error) {
	r, err := stream.Recv()
	if err != nil {
		return nil, f.wrap(f.caller, "feed", err)
	}
	f.failing = time.Time{}
	if err := f.history.watched(f.Backend, f.generation, r.Header); err != nil {
		return nil, err
	}
	switch {
	case r.CompactRevision != 0:
		return nil, gap(fmt.Errorf("etcd has compacted the changes before revision %d, and the "+
			"feed has read up to %d: keep the history for longer, with "+
			"--auto-compaction-retention", r.CompactRevision, f.at))
	case r.Canceled:
		return nil, f.wrap(f.caller, "feed", cancelError(r.CancelReason))
	}
	events := append(f.pending, r.Events...)
	if f.pending = nil; r.Fragment {
		f.pending, events = events, nil
	}
	return events, nil
}

// verified returns the events after the position at which the feed continues. The events begin with
// the change at this position, unless etcd has another history now.
func (f *feed) verified(events []*mvccpb.Event) ([]*mvccpb.Event, error) {
	want := f.verify
	if want == nil || len(events) == 0 {
		return events, nil
	}
	same := false
	for len(events) > 0 && events[0].Kv.ModRevision == int64(want.at) {
		same = same || string(events[0].Kv.Key) == want.key &&
			f.history.hash(events[0]) == want.hash
		events = events[1:]
	}
	if !same {
		return nil, f.history.changed(f.Backend, f.generation, want.at)
	}
	f.verify = nil
	return events, nil
}

// deliver yields a Batch for each revision of the events. A response has all events of a revision.
func (f *feed) deliver(events []*mvccpb.Event) error {
	events, err := f.verified(events)
	if err != nil {
		return err
	}
	for len(events) > 0 {
		n := 1
		for n < len(events) && events[n].Kv.ModRevision == events[0].Kv.ModRevision {
			n++
		}
		f.at = backend.Position(events[0].Kv.ModRevision)
		batch := backend.Batch{Position: f.at, Changes: make([]backend.Entry, 0, n)}
		f.history.yielded(f.generation, events[0])
		for _, event := range events[:n] {
			batch.Changes = append(batch.Changes, f.entry(event))
		}
		if err := f.pass(batch); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

// entry returns the entry as an event left the entry. An entry that is damaged has no Value.
func (f *feed) entry(event *mvccpb.Event) backend.Entry {
	if event.Type == mvccpb.Event_DELETE {
		key := event.Kv.Key
		return backend.Entry{Key: key[len(f.base):len(key):len(key)]}
	}
	e, err := f.parse(event.Kv)
	if err == nil {
		f.history.note(f.generation, e, event.Kv.ModRevision)
	}
	return e
}
