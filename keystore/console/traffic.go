package console

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// minutes is how many minutes the charts show.
const minutes = 60

// A traffic counts the admitted and the refused calls of each minute of the last hour. A goroutine
// reads the counts of the store once a minute, so Verify does no work for the charts.
type traffic struct {
	store *keystore.Store
	since time.Time // when the counting began

	mu       sync.Mutex      // guards all below
	complete [minutes]minute // a ring of complete minutes
	n        int             // how many minutes were ever complete
	begin    time.Time       // of the minute that is not complete yet
	admitted uint64          // the counts of the store at begin
	refused  uint64
}

// A minute has the calls of one minute.
type minute struct {
	at                time.Time
	admitted, refused uint64
}

func newTraffic(store *keystore.Store) *traffic {
	st := store.Stats()
	now := time.Now()
	return &traffic{store: store, since: now, begin: now, admitted: st.Admitted, refused: st.Refused}
}

// run completes a minute every minute, until ctx ends.
func (t *traffic) run(ctx context.Context) {
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			t.completeMinute()
		case <-ctx.Done():
			return
		}
	}
}

func (t *traffic) completeMinute() {
	st := t.store.Stats()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.complete[t.n%minutes] = minute{t.begin, st.Admitted - t.admitted, st.Refused - t.refused}
	t.n++
	t.begin, t.admitted, t.refused = time.Now(), st.Admitted, st.Refused
}

// last returns the last hour, oldest minute first. The last element is the minute that is not
// complete yet.
func (t *traffic) last(st keystore.Stats) []minute {
	t.mu.Lock()
	defer t.mu.Unlock()
	first := max(0, t.n-minutes+1)
	last := make([]minute, 0, minutes)
	for i := first; i < t.n; i++ {
		last = append(last, t.complete[i%minutes])
	}
	// A minute may have been completed after st was read.
	return append(last, minute{t.begin, less(st.Admitted, t.admitted), less(st.Refused, t.refused)})
}

func less(a, b uint64) uint64 {
	if a < b {
		return 0
	}
	return a - b
}

// A chart is a bar chart of the last hour, drawn as SVG.
type chart struct {
	Name, Class, Label string
	Total, Max         uint64
	Bars               []bar
}

// A bar is a bar of a chart. The SVG is 600 wide and 100 high.
type bar struct {
	X         int
	Y, Height string
	Title     string
}

// newChart returns the chart of one count.
func newChart(name, class string, hour []minute, count func(minute) uint64) *chart {
	c := &chart{Name: name, Class: class}
	for _, m := range hour {
		c.Total += count(m)
		c.Max = max(c.Max, count(m))
	}
	for i, m := range hour {
		n := count(m)
		height := 0.0
		if n > 0 {
			height = max(1.5, 100*float64(n)/float64(c.Max)) // a small number shows too
		}
		c.Bars = append(c.Bars, bar{
			X: 10 * (minutes - len(hour) + i),
			Y: fmt.Sprintf("%.1f", 100-height), Height: fmt.Sprintf("%.1f", height),
			Title: fmt.Sprintf("%s UTC: %s %s", clock(m.at), number(n), class),
		})
	}
	c.Label = fmt.Sprintf("%s each minute of the last hour: %s in all, at most %s in a minute",
		name, number(c.Total), number(c.Max))
	return c
}

// clock returns the minute of a time.
func clock(t time.Time) string { return t.UTC().Format("15:04") }
