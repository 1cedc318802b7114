package console

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// countPatience is how long the overview waits for the numbers of keys. If the count takes longer,
// the page shows the last numbers.
const countPatience = 10 * time.Millisecond

// An overview is the content of the overview.
type overview struct {
	Counted time.Time // zero: not counted yet, and the numbers of keys are 0
	States  []stateCount
	Active  int64
	Soon    int64 // keys that expire within 7 days
	Unused  int64 // keys that are unused for 90 days
	keystore.Stats
	Charts   []*chart
	Minutes  []minuteRow
	Since    time.Time // when the charts began
	Down     string    // why the store does not serve; "": the store serves
	Full     uint64    // writes that failed because the disk was full
	Failed   uint64    // other writes that failed
	Logins   int
	OwnLogin bool
}

// A stateCount is the number of keys in a state.
type stateCount struct {
	State string
	N     int64
}

// A minuteRow is a minute in the table of the figures.
type minuteRow struct{ Clock, Admitted, Refused string }

func (v *visit) showOverview() {
	ctx, cancel := context.WithTimeout(v.ctx(), countPatience)
	defer cancel()
	counts, err := v.inventory.Counts(ctx)
	if err != nil {
		counts = v.inventory.Latest()
	}
	if counts == nil {
		counts = new(inventory.Counts)
	}
	st := v.store.Stats()
	hour := v.traffic.last(st)
	o := &overview{
		Counted: counts.At, Active: counts.ByStatus["active"], Soon: counts.Expiring["7d"],
		Unused: counts.Unused["90d"], Stats: st, Since: v.traffic.since,
		Charts: []*chart{
			newChart("Admitted", "admitted", hour, func(m minute) uint64 { return m.admitted }),
			newChart("Refused", "refused", hour, func(m minute) uint64 { return m.refused }),
		},
		Full:     st.FailedWrites["full"],
		Failed:   st.FailedWrites["failed"],
		Logins:   v.logins.count(),
		OwnLogin: v.login != nil,
	}
	for _, m := range slices.Backward(hour) {
		o.Minutes = append(o.Minutes, minuteRow{clock(m.at), number(m.admitted), number(m.refused)})
	}
	for status := keystore.StatusActive; status <= keystore.StatusRevoked; status++ {
		o.States = append(o.States, stateCount{status.String(), counts.ByStatus[status.String()]})
	}
	if err := v.store.Err(); err != nil {
		o.Down = sentence(errorText(err))
	} else if !st.Fresh {
		o.Down = "This process is out of contact with the other processes of the store, and " +
			"refuses every call."
	}
	v.render(http.StatusOK, "overview", "Overview", o)
}

const day = 24 * time.Hour
