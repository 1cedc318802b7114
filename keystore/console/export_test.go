package console

import "time"

// SetPatience sets how long a page looks for keys or events.
func SetPatience(c *Console, d time.Duration) { c.patience = d }

// CompleteMinute ends the present minute of the charts.
func CompleteMinute(c *Console) { c.traffic.completeMinute() }

// Logins returns the number of logins.
func Logins(c *Console) int { return c.logins.count() }

// Constants of the package, for tests.
const (
	PageSize        = pageSize
	MaxKeyLogins    = maxKeyLogins
	MaxActorStreams = maxActorStreams
	MaxSearches     = maxSearches
)

// Streams returns the number of open streams of events.
func Streams(c *Console) int {
	c.streams.mu.Lock()
	defer c.streams.mu.Unlock()
	return c.streams.n
}

// OccupySearches takes the turns of n searches through the whole store, until the result is called.
func OccupySearches(c *Console, n int) (end func()) {
	for range n {
		c.searching <- struct{}{}
	}
	return func() {
		for range n {
			<-c.searching
		}
	}
}
