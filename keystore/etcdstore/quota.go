package etcdstore

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

const (
	// defaultQuota is the quota of an etcd that was started without --quota-backend-bytes.
	defaultQuota = 2 << 30
	// statusEvery is the time between two requests for the status of each endpoint.
	statusEvery = 30 * time.Second
	// statusTimeout is the longest time for which the Backend waits for the status of an endpoint.
	statusTimeout = 5 * time.Second
	// minStatusPause is the shortest time between two requests of a Backend that refuses changes.
	minStatusPause = time.Second
	// entryOverhead is about the number of bytes that etcd adds to a key and a value.
	entryOverhead = 64
)

// A quota refuses changes before etcd's database is full. An etcd that is full refuses all writes,
// heartbeats and revocations too. So above 90 % of the quota, the quota allows only what restricts
// a key, and what deletes without writing.
type quota struct {
	configured int64         // Options.QuotaBytes
	kick       chan struct{} // wakes the goroutine that asks for the status

	mu      sync.Mutex // guards all below
	full    bool
	size    int64     // of the fullest member
	limit   int64     // of the fullest member; 0: the member has no quota
	written int64     // about what this Backend has written since it asked for the last status
	before  int64     // the same, for the time before: the last status may not include this
	asked   time.Time // when the Backend asked for the last status
}

// allows returns ErrFull if the database is too full for the changes.
func (q *quota) allows(b *Backend, changes []backend.Change) error {
	q.mu.Lock()
	full, pause := q.full, time.Since(q.asked)
	q.mu.Unlock()
	if !full {
		return nil
	}
	if pause > minStatusPause {
		q.ask()
	}
	restricts := func(c backend.Change) bool { return c.Restricts }
	writes := func(c backend.Change) bool { return !c.Check && !c.Delete }
	if slices.ContainsFunc(changes, restricts) || !slices.ContainsFunc(changes, writes) {
		return nil
	}
	return q.fullError()
}

// fullError returns an error that wraps ErrFull.
func (q *quota) fullError() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return fmt.Errorf("etcdstore: %w: etcd's database has %d MiB of its quota of %d MiB, and only "+
		"changes that restrict keys are accepted: compact and defragment etcd (etcdctl compact, "+
		"etcdctl defrag, etcdctl alarm disarm), or raise --quota-backend-bytes",
		backend.ErrFull, q.size>>20, q.limit>>20)
}

// exceeded notes that etcd has refused a write because the database is full.
func (q *quota) exceeded(b *Backend) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.setLocked(b, true, max(q.size, q.limit), q.limit)
}

func (q *quota) setLocked(b *Backend, full bool, size, limit int64) {
	changed := full != q.full
	q.full, q.size, q.limit = full, size, limit
	switch {
	case changed && full:
		b.log.Log(slog.LevelError, "etcd's database is nearly full: only changes that restrict "+
			"keys are accepted: compact and defragment etcd, or raise --quota-backend-bytes",
			"prefix", b.prefix, "bytes", size, "quota", limit)
	case changed:
		b.log.Log(slog.LevelInfo, "etcd's database has space again", "prefix", b.prefix,
			"bytes", size, "quota", limit)
	}
}

// isFullLocked reports whether the database has 90 % of the quota, with all that this Backend has
// written and the last status may not include.
func (q *quota) isFullLocked() bool {
	return q.limit > 0 && float64(q.size+q.before+q.written) >= 0.9*float64(q.limit)
}

// wrote notes a write. After a hundredth of the quota, the next status does not wait.
func (q *quota) wrote(b *Backend, bytes int64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.written += bytes
	if !q.full && q.isFullLocked() {
		q.setLocked(b, true, q.size, q.limit)
	}
	if q.limit > 0 && q.written > q.limit/100 {
		q.ask()
	}
}

func (q *quota) ask() {
	select {
	case q.kick <- struct{}{}:
	default:
	}
}

// noteStatus takes over the status of the endpoints that have answered.
func (q *quota) noteStatus(b *Backend, answers []*pb.StatusResponse) {
	var size, limit int64
	var highest float64
	alarm := false
	for _, r := range answers {
		l := q.configured
		if l == 0 {
			l = r.DbSizeQuota
		}
		if l == 0 {
			l = defaultQuota
		}
		alarm = alarm || slices.ContainsFunc(r.Errors, func(text string) bool {
			return strings.Contains(text, "NOSPACE")
		})
		if used := float64(r.DbSize) / float64(l); l > 0 && used >= highest {
			highest, size, limit = used, r.DbSize, l
		}
	}
	if len(answers) == 0 {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.size, q.limit = size, limit
	q.setLocked(b, alarm || q.isFullLocked(), size, limit)
}

// watchQuota asks for the status of the endpoints until Close.
func (b *Backend) watchQuota() {
	timer := time.NewTicker(statusEvery)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-b.quota.kick:
		case <-b.calls.Context().Done():
			return
		}
		b.quota.mu.Lock()
		b.quota.asked, b.quota.before, b.quota.written = time.Now(), b.quota.written, 0
		b.quota.mu.Unlock()
		b.quota.noteStatus(b, b.statuses())
	}
}

// statuses returns the status of each endpoint that answers, and warns of servers that are too old.
func (b *Backend) statuses() (answers []*pb.StatusResponse) {
	ctx, cancel := context.WithTimeout(b.calls.Context(), statusTimeout)
	defer cancel()
	var mu sync.Mutex
	var all sync.WaitGroup
	for _, endpoint := range b.client.Endpoints() {
		all.Go(func() {
			r, err := statusOf(ctx, b.client, endpoint)
			name := endpointName(endpoint)
			if err != nil {
				b.log.Log(slog.LevelDebug, "an etcd server has not answered", "endpoint", name,
					"error", explain(b.client, b.prefix, "status", err))
				return
			}
			if isTooOld(r.Version) {
				b.log.Log(slog.LevelError, "an etcd server is too old: the store relies on fixes "+
					"of etcd "+minVersion, "endpoint", name, "version", r.Version)
			}
			mu.Lock()
			defer mu.Unlock()
			answers = append(answers, r)
		})
	}
	all.Wait()
	return answers
}
