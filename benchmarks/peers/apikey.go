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
	p := &Peer{How: "the default options: SHA-256 digests in a directory, 65,536 keys in the cache", Close: store.Close}
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

// creators is how many goroutines create keys: as many as share a commit of the store's at best.
const creators = 1024

// Create makes n keys like those of an application, and returns the texts of so many of them, spread evenly. Progress, unless
// it is nil, is told how many there are, by one goroutine at a time.
func Create(ctx context.Context, store *keystore.Store, n, keep int, progress func(done, of int)) ([]string, error) {
	var (
		mu    sync.Mutex
		next  int
		kept  []string
		first error
		wg    sync.WaitGroup
	)
	every := max(1, n/max(keep, 1))
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
				made, err := store.Create(ctx, Spec())
				mu.Lock()
				if err != nil && first == nil {
					first = err
				}
				if err == nil && number%every == 0 && len(kept) < keep {
					kept = append(kept, made.Secret.Reveal())
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return kept, first
}

// Options are the defaults but for the size of the cache, where 0 is the default too, and the limit on writes: a machine that
// is busy with something else for ten seconds would end the run. That limit costs and spares nothing where it is not reached.
func Options(cacheSize int) *keystore.Options {
	return &keystore.Options{CacheSize: cacheSize, Timeout: -1}
}

// Spec is what an application would say of a key.
func Spec() keystore.Spec {
	return keystore.Spec{Name: "ci of the web shop", Owner: "team-37", Scopes: []string{"orders:read", "orders:write"}}
}
