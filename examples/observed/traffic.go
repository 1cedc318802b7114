package main

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A traffic makes calls until stop.
type traffic struct {
	client testpb.TestServiceClient
	store  *keystore.Store
	doomed string       // the ID of the key that revoke revokes
	open   atomic.Int64 // the streams under this key

	ctx    context.Context
	cancel context.CancelFunc
	done   sync.WaitGroup
	conn   *grpc.ClientConn
}

// The keys of the owners, and how many streams the doomed key has.
var owners = []string{"billing", "search", "mobile"}

const streams = 20

// startTraffic makes keys, and begins to use the keys: three owners make calls and hold streams,
// strangers try their luck, and keys come and go.
func startTraffic(ctx context.Context, store *keystore.Store, addr string) (*traffic, error) {
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	t := &traffic{client: testpb.NewTestServiceClient(conn), store: store, conn: conn}
	t.ctx, t.cancel = context.WithCancel(ctx)
	for i, owner := range owners {
		issued, err := store.Create(ctx, keystore.Spec{Name: owner + " in production",
			Owner: owner, ExpiresAt: time.Now().Add(time.Duration(i+1) * 72 * time.Hour)})
		if err != nil {
			t.stop()
			return nil, err
		}
		key := grpc.PerRPCCredentials(
			keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure()))
		t.doomed = issued.Key.ID // the last one
		for range i + 2 {
			t.repeat(5*time.Millisecond, func() {
				_, _ = t.client.EmptyCall(t.ctx, &testpb.Empty{}, key)
			})
		}
		t.repeat(500*time.Millisecond, func() { // needs a scope that the key lacks
			_, _ = t.client.UnaryCall(t.ctx, &testpb.SimpleRequest{}, key)
		})
		if i == len(owners)-1 {
			for range streams {
				t.done.Go(func() { t.stream(key) })
			}
		}
	}
	nonsense := grpc.PerRPCCredentials(keycreds.New("nonsense", keycreds.AllowInsecure()))
	t.repeat(50*time.Millisecond, func() {
		_, _ = t.client.EmptyCall(t.ctx, &testpb.Empty{}, nonsense)
	})
	t.repeat(80*time.Millisecond, func() { _, _ = t.client.EmptyCall(t.ctx, &testpb.Empty{}) })
	t.repeat(200*time.Millisecond, func() {
		issued, err := t.store.Create(t.ctx, keystore.Spec{Name: "for a job", Owner: "jobs"})
		if err == nil {
			_, _ = t.store.Verify(t.ctx, issued.Secret.Reveal())
			_ = t.store.Revoke(t.ctx, issued.Key.ID, "the job is done")
		}
	})
	return t, nil
}

// repeat calls f again and again, with a pause, until stop.
func (t *traffic) repeat(pause time.Duration, f func()) {
	t.done.Go(func() {
		for t.ctx.Err() == nil {
			f()
			select {
			case <-time.After(pause):
			case <-t.ctx.Done():
			}
		}
	})
}

// stream exchanges a message every 100 ms until the server ends the stream.
func (t *traffic) stream(key grpc.CallOption) {
	s, err := t.client.FullDuplexCall(t.ctx, key)
	if err != nil {
		return
	}
	t.open.Add(1)
	defer t.open.Add(-1)
	for {
		if err := s.Send(&testpb.StreamingOutputCallRequest{}); err != nil && err != io.EOF {
			return
		}
		if _, err := s.Recv(); err != nil {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// revoke revokes the key of the busiest owner, who continues to send the key.
func (t *traffic) revoke() (report string, err error) {
	before := t.store.Stats().Ended["revoked"]
	began := time.Now()
	if err := t.store.Revoke(t.ctx, t.doomed, "leaked"); err != nil {
		return "", err
	}
	took := time.Since(began)
	ended := t.store.Stats().Ended["revoked"] - before
	return fmt.Sprintf("Revoke returned after %v. It ended %d streams, under %d calls a second.",
		took.Round(10*time.Microsecond), ended, t.callsPerSecond()), nil
}

// callsPerSecond is how many calls the store has admitted in the last second.
func (t *traffic) callsPerSecond() uint64 {
	before := t.store.Stats()
	time.Sleep(time.Second)
	after := t.store.Stats()
	return after.Admitted + after.Refused - before.Admitted - before.Refused
}

func (t *traffic) stop() {
	t.cancel()
	t.done.Wait()
	_ = t.conn.Close()
}
