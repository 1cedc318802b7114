package peers

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"github.com/redis/go-redis/v9"
)

// startRedis looks every credential up in a Redis of its own, on loopback: what a real network would add is left out.
func startRedis(ctx context.Context, dir string) (*Peer, error) {
	binary, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, fmt.Errorf("redis-server is %w: apt-get install redis-server", errMissing)
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	// Nothing is persisted: only reads are measured.
	server := exec.Command(binary, "--bind", "127.0.0.1", "--port", fmt.Sprint(port), "--dir", dir,
		"--save", "", "--appendonly", "no", "--daemonize", "no")
	own(server)
	if err := server.Start(); err != nil {
		return nil, err
	}
	client := redis.NewClient(&redis.Options{Addr: fmt.Sprintf("127.0.0.1:%d", port)})
	stop := func() error {
		err := errors.Join(client.Close(), server.Process.Kill())
		_ = server.Wait() // it says that it was killed
		return err
	}
	fail := func(err error) (*Peer, error) { return nil, errors.Join(err, stop()) }
	if err := eventually(ctx, func() error { return client.Ping(ctx).Err() }); err != nil {
		return fail(err)
	}

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
	p.How = "go-redis, GET by the SHA-256, one for each call; the server is on loopback, in memory"
	p.Close = stop
	p.credentials(stored, unknown)
	return p, nil
}

func redisKey(i issued) string {
	digest := i.digest()
	return "apikey:" + hex.EncodeToString(digest[:])
}

// eventually calls f until it returns nil, for as long as a server may take to start.
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
