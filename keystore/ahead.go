package keystore

import (
	"iter"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// readAhead yields the entries of a Scan or a Snapshot. While the loop body runs, a goroutine reads
// the next entries. So a loop body that computes takes no longer than the read. The goroutine has
// ended when the iteration ends.
func readAhead(entries iter.Seq2[backend.Entry, error]) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		pages, stop := make(chan page), make(chan struct{})
		var reader sync.WaitGroup
		reader.Go(func() {
			defer close(pages)
			readPages(entries, func(p page) bool {
				select {
				case pages <- p:
					return true
				case <-stop:
					return false
				}
			})
		})
		defer reader.Wait()
		defer close(stop)
		for p := range pages {
			for _, e := range p.entries {
				if !yield(e, nil) {
					return
				}
			}
			if p.err != nil {
				yield(backend.Entry{}, p.err)
				return
			}
		}
	}
}

// A page is a number of entries, and the error after the entries.
type page struct {
	entries []backend.Entry
	err     error
}

const pageEntries = 256

// readPages calls send with the entries in pages, until send returns false.
func readPages(entries iter.Seq2[backend.Entry, error], send func(page) bool) {
	var p page
	for e, err := range entries {
		if err != nil {
			p.err = err
			break
		}
		if p.entries = append(p.entries, e); len(p.entries) == pageEntries {
			if !send(p) {
				return
			}
			p = page{entries: make([]backend.Entry, 0, pageEntries)}
		}
	}
	send(p)
}
