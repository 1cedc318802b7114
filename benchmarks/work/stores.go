package work

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A sized is a closed store on disk, with the results of its openings.
type sized struct {
	dir    string
	keys   int
	tokens []string   // at most 65,536 tokens of the store
	owned  [][]string // the IDs of the keys of some owners, by the number of the owner
	disk   float64
	took   time.Duration // the time to create the keys
	opened []opening     // one for each round
}

func (s *sized) name() string { return digits(float64(s.keys)) + " keys" }

// of returns one figure of each opening.
func (s *sized) of(what func(*opening) float64) []float64 {
	var values []float64
	for i := range s.opened {
		values = append(values, what(&s.opened[i]))
	}
	return values
}

// copyOf returns a directory with a copy of the files of a store.
func (e *Env) copyOf(s *sized) (string, error) {
	dir, err := e.temp()
	if err != nil {
		return "", err
	}
	copied := filepath.Join(dir, "copy")
	return copied, os.CopyFS(copied, os.DirFS(s.dir))
}

func newSized(ctx context.Context, dir string, e *Env, keys int) (*sized, error) {
	s := &sized{
		dir: filepath.Join(dir, "store"), keys: keys,
		owned: make([][]string, min(ownersOf(keys), mostOwned)),
	}
	store, err := keystore.Open(s.dir, peers.Options(0))
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	owners, every := ownersOf(keys), max(1, keys/hotKeys)
	err = peers.CreateEach(ctx, store, keys,
		func(number int) keystore.Spec {
			spec := peers.Spec()
			spec.Owner = ownerName(number % owners)
			return spec
		},
		func(number int, made *keystore.Issued) {
			if number%every == 0 && len(s.tokens) < hotKeys {
				s.tokens = append(s.tokens, made.Secret.Reveal())
			}
			if owner := number % owners; owner < len(s.owned) {
				s.owned[owner] = append(s.owned[owner], made.Key.ID)
			}
		}, e.progress("creating "+s.name()))
	s.took = time.Since(begin)
	if err = errors.Join(err, store.Close()); err != nil {
		return nil, err
	}
	rand.Shuffle(len(s.tokens), func(i, j int) {
		s.tokens[i], s.tokens[j] = s.tokens[j], s.tokens[i]
	})
	_, allocated, err := diskOf(s.dir)
	s.disk = float64(allocated)
	return s, err
}

// keysOfOwner is the number of keys of each owner. The keys of an owner are spread over the whole
// time of the creation, so that no two keys of an owner are neighbours in the store.
const keysOfOwner = 10

// mostOwned is the number of owners whose keys a sized knows.
const mostOwned = 2048

func ownersOf(keys int) int { return max(1, keys/keysOfOwner) }

func ownerName(number int) string { return "team-" + strconv.FormatInt(int64(number), 36) }

// Stores keeps the large stores of a run, because it takes long to create a store. Create makes the
// keys and their events, from 1,024 goroutines that share commits. There is no faster way that
// leaves the same files on disk as a normal store.
//
// A workload that changes a store changes only a few thousand keys, and no token of the store.
type Stores struct {
	dir string
	all map[int]*sized
}

// NewStores returns an empty Stores. The stores are in dir, and the caller removes dir.
func NewStores(dir string) *Stores { return &Stores{dir, make(map[int]*sized)} }

// sized returns the store with the given number of keys, and creates the store if necessary.
func (e *Env) sized(ctx context.Context, keys int) (*sized, error) {
	if e.Stores == nil {
		dir, err := e.temp()
		if err != nil {
			return nil, err
		}
		e.Stores = NewStores(dir)
	}
	if s := e.Stores.all[keys]; s != nil {
		s.opened = nil
		return s, nil
	}
	dir, err := os.MkdirTemp(e.Stores.dir, "sized")
	if err != nil {
		return nil, err
	}
	s, err := newSized(ctx, dir, e, keys)
	if err == nil {
		e.Stores.all[keys] = s
	}
	return s, err
}
