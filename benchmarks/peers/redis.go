package peers

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// startRedis starts a peer that looks every credential up in Redis.
func startRedis(ctx context.Context, dir string) (*Peer, error) {
	// The server persists nothing, because only reads are measured.
	server, err := newRedisServer(ctx, dir, "--appendonly", "no")
	if err != nil {
		return nil, err
	}
	client := server.client(&redis.Options{})
	stop := func() error { return errors.Join(client.Close(), server.stop()) }
	fail := func(err error) (*Peer, error) { return nil, errors.Join(err, stop()) }
	stored, unknown := issue()
	pipe := client.Pipeline()
	for _, i := range stored {
		pipe.Set(ctx, redisKey(i), i.id, 0)
	}
	if _, err := pipe.Exec(ctx); err != nil {
		return fail(err)
	}
	p := guard(func(ctx context.Context, credential string) (*principal, error) {
		id, err := client.Get(ctx, redisKey(issued{credential: credential})).Result()
		if errors.Is(err, redis.Nil) {
			return nil, errRefused
		}
		if err != nil {
			return nil, err
		}
		return &principal{id}, nil
	})
	p.How = "go-redis; each call runs one GET by the SHA-256; " +
		"the server keeps its data in memory and is on the loopback interface"
	p.Close = stop
	p.credentials(stored, unknown)
	return p, nil
}

// A redisServer is a new Redis server on the loopback interface, so the results do not include the
// latency of a real network.
type redisServer struct {
	port int
	pid  int
	stop func() error
}

// newRedisServer starts a server that makes no snapshots.
func newRedisServer(ctx context.Context, dir string, options ...string) (*redisServer, error) {
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, fmt.Errorf("redis-server is %w: apt-get install redis-server", errMissing)
	}
	port, err := freeport.Port()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(binary, append([]string{
		"--bind", "127.0.0.1", "--port", fmt.Sprint(port), "--dir", dir,
		"--save", "", "--daemonize", "no",
	}, options...)...)
	own(cmd)
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	s := &redisServer{port, cmd.Process.Pid, func() error {
		err := cmd.Process.Kill()
		_ = cmd.Wait() // returns an error, because the server was killed
		return err
	}}
	client := s.client(&redis.Options{})
	defer client.Close()
	if err := eventually(ctx, func() error { return client.Ping(ctx).Err() }); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

func (s *redisServer) client(o *redis.Options) *redis.Client {
	o.Addr = fmt.Sprintf("127.0.0.1:%d", s.port)
	return redis.NewClient(o)
}

func redisKey(i issued) string {
	digest := i.digest()
	return "apikey:" + hex.EncodeToString(digest[:])
}

// eventually calls f until f returns nil, for at most one minute, the longest time for the start of
// a server.
func eventually(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server does not answer: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
