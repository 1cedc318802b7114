package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func statsCommand() *cli.Command {
	return &cli.Command{
		Name: "stats", Category: groupStore,
		Usage: "print the numbers of keys, calls and streams",
		Description: "Keys are counted in the whole store. The other numbers are of the server " +
			"that answers, since it has opened the store.",
		UsageText: "apikeyctl stats",
		Action:    withServer(printStats),
	}
}

// A stats has the numbers of a server.
type stats struct {
	Keys            map[string]int64 `json:"keys"`
	CountedTime     *time.Time       `json:"counted_time"`
	LiveStreams     int64            `json:"live_streams"`
	Admitted        int64            `json:"admitted"`
	Refused         int64            `json:"refused"`
	Refusals        map[string]int64 `json:"refusals"`
	Changes         map[string]int64 `json:"changes"`
	Ended           map[string]int64 `json:"ended"`
	Hits            int64            `json:"hits"`
	Misses          int64            `json:"misses"`
	CachedKeys      int64            `json:"cached_keys"`
	OutdatedDigests *int64           `json:"outdated_digests"`
	Processes       int32            `json:"processes"`
	Fresh           bool             `json:"fresh"`
	Leases          int64            `json:"leases"`
	Exhausted       int64            `json:"exhausted"`
	StartTime       *time.Time       `json:"start_time"`
}

func printStats(ctx context.Context, c *call) (err error) {
	if err := c.noArgs(); err != nil {
		return err
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	r, err := c.store.GetStats(ctx, new(adminpb.GetStatsRequest))
	if err != nil {
		return c.failed(ctx, err)
	}
	return c.out.one(stats{
		Keys: counts(r.Keys), CountedTime: timeOf(r.CountedTime),
		LiveStreams: r.LiveStreams, Admitted: r.Admitted, Refused: r.Refused,
		Refusals: counts(r.Refusals), Changes: counts(r.Changes), Ended: counts(r.Ended),
		Hits: r.Hits, Misses: r.Misses, CachedKeys: r.CachedKeys,
		OutdatedDigests: r.OutdatedDigests, Processes: r.Processes, Fresh: r.Fresh,
		Leases: r.Leases, Exhausted: r.Exhausted, StartTime: timeOf(r.StartTime),
	})
}

// counts returns an empty map for nil, which is {} in JSON.
func counts(m map[string]int64) map[string]int64 {
	if m == nil {
		return map[string]int64{}
	}
	return m
}

// ident is the number of keys that are admitted.
func (s stats) ident() string { return strconv.FormatInt(s.Keys["active"], 10) }

func (s stats) row() []field {
	outdated := "-"
	if s.OutdatedDigests != nil {
		outdated = strconv.FormatInt(*s.OutdatedDigests, 10)
	}
	admits := "yes"
	if !s.Fresh {
		admits = "no: the server has lost contact with the store"
	}
	return []field{
		{"Keys", countsText(s.Keys)},
		{"Counted", relative(s.CountedTime)},
		{"Streams", strconv.FormatInt(s.LiveStreams, 10)},
		{"Admitted", strconv.FormatInt(s.Admitted, 10)},
		{"Refused", strconv.FormatInt(s.Refused, 10) + inBrackets(s.Refusals)},
		{"Credits", fmt.Sprintf("%d leases, %d calls without credits", s.Leases, s.Exhausted)},
		{"Changes", countsText(s.Changes)},
		{"Streams ended", countsText(s.Ended)},
		{"Cached keys", strconv.FormatInt(s.CachedKeys, 10)},
		{"Outdated digests", outdated},
		{"Processes", strconv.Itoa(int(s.Processes))},
		{"Admits callers", admits},
		{"Running since", relative(s.StartTime)},
	}
}

func (s stats) whole() []field { return s.row() }

// countsText writes counts with their words, in the order of the words: "active 12, revoked 3".
func countsText(m map[string]int64) string {
	var parts []string
	for _, word := range slices.Sorted(maps.Keys(m)) {
		if m[word] > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", word, m[word]))
		}
	}
	if parts == nil {
		return "0"
	}
	return strings.Join(parts, ", ")
}

func inBrackets(m map[string]int64) string {
	if text := countsText(m); text != "0" {
		return " (" + text + ")"
	}
	return ""
}

func checkCommand() *cli.Command {
	return &cli.Command{
		Name: "check", Category: groupStore,
		Usage:       "read everything that is stored, and say what is damaged",
		Description: "The server admits calls during the check.",
		UsageText:   "apikeyctl check",
		Action:      withServer(check),
	}
}

// A checked is the result of a check without damage.
type checked struct {
	Damaged bool `json:"damaged"`
}

func (checked) ident() string  { return "" }
func (checked) row() []field   { return []field{{"DAMAGED", "no"}} }
func (checked) whole() []field { return checked{}.row() }

func check(ctx context.Context, c *call) (err error) {
	if err := c.noArgs(); err != nil {
		return err
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	if _, err := c.store.CheckIntegrity(ctx, new(adminpb.CheckIntegrityRequest)); err != nil {
		return c.failed(ctx, err)
	}
	if c.out.format == formatID {
		return nil
	}
	return c.out.said(checked{}, "nothing is damaged")
}
