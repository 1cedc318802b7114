package peers

import (
	"context"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func startAPIKey(ctx context.Context, dir string) (*Peer, error) {
	store, err := keystore.Open(dir, Options(0))
	if err != nil {
		return nil, err
	}
	p := &Peer{
		How:   "the default options: SHA-256 digests in a directory, and a cache of 65,536 keys",
		Close: store.Close,
	}
	fill := func() error {
		auth, err := interceptor.New(store)
		if err != nil {
			return err
		}
		p.Options = auth.ServerOptions()
		p.Check = func(ctx context.Context, credential string) error {
			_, err := store.Verify(ctx, credential)
			return err
		}
		_, p.Bad = issue()
		if p.Good, err = Create(ctx, store, Population, Clients, nil); err != nil {
			return err
		}
		return nil
	}
	if err := fill(); err != nil {
		_ = store.Close()
		return nil, err
	}
	return p, nil
}

// creators is the number of goroutines that create keys. At most this many changes share one commit
// of the store.
const creators = 1024

// Create creates n typical keys, and returns the texts of some of the keys: the number is keep,
// evenly spread over all keys. If progress is not nil, Create calls progress with the number of
// keys so far, from one goroutine at a time.
func Create(
	ctx context.Context, store *keystore.Store, n, keep int, progress func(done, of int),
) (kept []string, err error) {
	every := max(1, n/max(keep, 1))
	err = CreateEach(ctx, store, n, func(int) keystore.Spec { return Spec() },
		func(number int, made *keystore.Issued) {
			if number%every == 0 && len(kept) < keep {
				kept = append(kept, made.Secret.Reveal())
			}
		}, progress)
	return kept, err
}

// CreateEach creates n keys. spec returns the spec of the key with a number from 0 to n-1, and may
// be called by several goroutines at the same time. CreateEach calls created for each key, from one
// goroutine at a time.
func CreateEach(
	ctx context.Context, store *keystore.Store, n int, spec func(number int) keystore.Spec,
	created func(number int, made *keystore.Issued), progress func(done, of int),
) error {
	var (
		mu    sync.Mutex
		next  int
		first error
		wg    sync.WaitGroup
	)
	take := func() (number int, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if first != nil || next == n {
			return 0, false
		}
		if progress != nil && next%(1+n/100) == 0 {
			progress(next, n)
		}
		next++
		return next - 1, true
	}
	for range min(creators, n) {
		wg.Go(func() {
			for {
				number, ok := take()
				if !ok {
					return
				}
				made, err := store.Create(ctx, spec(number))
				mu.Lock()
				if err != nil && first == nil {
					first = err
				}
				if err == nil {
					created(number, made)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return first
}

// Options returns the default options with the given size of the cache, where 0 is the default
// size, and without a timeout of writes. With the default timeout, a machine that is busy for ten
// seconds would end the run. The timeout does not influence a run in which no write exceeds the
// timeout.
func Options(cacheSize int) *keystore.Options {
	return &keystore.Options{CacheSize: cacheSize, Timeout: -1}
}

// Spec returns a typical spec of a key.
func Spec() keystore.Spec {
	return keystore.Spec{
		Name:   "ci of the web shop",
		Owner:  "team-37",
		Scopes: []string{"orders:read", "orders:write"},
	}
}
