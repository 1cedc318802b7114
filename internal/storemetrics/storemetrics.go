// Package storemetrics has the metrics of a store, for the adapters to Prometheus and to
// OpenTelemetry, so that both systems get the same metrics. Everything comes from Store.Stats when
// the metrics are collected: Verify does no work for a metric.
package storemetrics

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Kind says how a metric changes.
type Kind int

const (
	Counter   Kind = iota // never goes down
	Level                 // a present value, whose sum over all processes has a meaning
	Gauge                 // any other present value
	Histogram             // of durations, since the store was opened
)

// A Metric is one metric of a store.
type Metric struct {
	// Prometheus is the name in Prometheus, and OTel the name in OpenTelemetry. A Histogram has no
	// name in OpenTelemetry, where no instrument takes durations that were counted before: OTel is
	// then the prefix of two counters, of the durations and of their sum.
	Prometheus, OTel string
	Help             string
	Kind             Kind
	// Unit is the unit in OpenTelemetry (UCUM). "s" are seconds, and Prometheus has the same unit.
	Unit string
	// Label is the label in Prometheus, and Attribute the attribute in OpenTelemetry. Both are
	// empty if the metric has one value.
	Label, Attribute string
	// Read passes each value to yield, with its label. The labels of a metric are always a subset
	// of one small set of words, which no caller and no key can change.
	Read func(s *Sample, yield func(word string, v Value))
}

// A Value is a value of a metric: Number, or, for a Histogram, Durations.
type Value struct {
	Number    float64
	Durations keystore.Histogram
}

// A Sample is what is known of a store at one moment.
type Sample struct {
	keystore.Stats
	Up        bool              // Store.Err is nil
	Inventory *inventory.Counts // nil: no count is complete, or no Inventory was given
}

// MinInventory is the shortest time between two counts of an Inventory: each count reads every key.
const MinInventory = 10 * time.Minute

// NewInventory returns an Inventory that counts at most once in a time. The error continues the
// name of the option, and says why the time is not usable.
func NewInventory(store *keystore.Store, every time.Duration) (*inventory.Inventory, error) {
	if every < MinInventory {
		return nil, fmt.Errorf("is %v: it must be 0, for no inventory, or at least %v, because "+
			"each count reads every key", every, MinInventory)
	}
	return inventory.New(store, every), nil
}

// Take returns a Sample of a store. keys may be nil.
func Take(store *keystore.Store, keys *inventory.Inventory) *Sample {
	s := &Sample{Stats: store.Stats(), Up: store.Err() == nil}
	if keys != nil {
		s.Inventory = keys.Refresh()
	}
	return s
}

// Metrics are all metrics of a store. The last ones have values only with an Inventory.
var Metrics = []Metric{
	{
		Prometheus: "apikeys_up", OTel: "apikey.store.up", Unit: "1", Kind: Gauge,
		Help: "1 while the store serves; 0 after Close, and after a failure that only opening " +
			"the store again can end.",
		Read: one(func(s *Sample) float64 { return number(s.Up) }),
	},
	{
		Prometheus: "apikeys_lookups_total", OTel: "apikey.lookups", Unit: "{lookup}",
		Label: "result", Attribute: "apikey.lookup.result",
		Help: "Look-ups of keys, by whether the key was in memory (hit) or was read from the " +
			"storage (miss).",
		Read: func(s *Sample, yield func(string, Value)) {
			yield("hit", Value{Number: float64(s.Hits)})
			yield("miss", Value{Number: float64(s.Misses)})
		},
	},
	{
		Prometheus: "apikeys_admissions_total", OTel: "apikey.admissions", Unit: "{call}",
		Help: "Calls of Verify and Bind that were admitted.",
		Read: one(func(s *Sample) float64 { return float64(s.Admitted) }),
	},
	{
		Prometheus: "apikeys_refusals_total", OTel: "apikey.refusals", Unit: "{call}",
		Label: "reason", Attribute: errorType,
		Help: "Calls of Verify and Bind that were refused, by the reason.",
		Read: words(func(s *Sample) map[string]uint64 { return s.Refusals }),
	},
	{
		Prometheus: "apikeys_changes_total", OTel: "apikey.changes", Unit: "{change}",
		Label: "action", Attribute: "apikey.action",
		Help: "Changes of keys by this process, by the action.",
		Read: words(func(s *Sample) map[keystore.Action]uint64 { return s.Changes }),
	},
	{
		Prometheus: "apikeys_change_duration_seconds", OTel: "apikey.change", Unit: "s",
		Label: "action", Attribute: "apikey.action", Kind: Histogram,
		Help: "How long calls that change one key took, until the change was in force " +
			"everywhere, by the action.",
		Read: func(s *Sample, yield func(string, Value)) {
			for _, action := range slices.Sorted(maps.Keys(s.Durations)) {
				yield(string(action), Value{Durations: s.Durations[action]})
			}
		},
	},
	{
		Prometheus: "apikeys_failed_writes_total", OTel: "apikey.write.failures", Unit: "{write}",
		Label: "reason", Attribute: errorType,
		Help: "Writes that failed because the storage had no space (full), or for another " +
			"reason (failed).",
		Read: words(func(s *Sample) map[string]uint64 { return s.FailedWrites }),
	},
	{
		Prometheus: "apikeys_credit_leases_total", OTel: "apikey.credit.leases", Unit: "{lease}",
		Help: "Writes by which this process has leased credits of keys.",
		Read: one(func(s *Sample) float64 { return float64(s.Leases) }),
	},
	{
		Prometheus: "apikeys_credits_exhausted_total", OTel: "apikey.credit.exhaustions",
		Unit: "{use}",
		Help: "Uses of keys that had too few credits.",
		Read: one(func(s *Sample) float64 { return float64(s.Exhausted) }),
	},
	{
		Prometheus: "apikeys_streams_ended_total", OTel: "apikey.stream.ends", Unit: "{stream}",
		Label: "cause", Attribute: errorType,
		Help: "Sessions, such as open streams, that the store has ended, by the cause.",
		Read: words(func(s *Sample) map[string]uint64 { return s.Ended }),
	},
	{
		Prometheus: "apikeys_streams", OTel: "apikey.stream.count", Unit: "{stream}", Kind: Level,
		Help: "Sessions, such as open streams, that are bound to a key now.",
		Read: one(func(s *Sample) float64 { return float64(s.Live) }),
	},
	{
		Prometheus: "apikeys_cached_keys", OTel: "apikey.cache.key.count", Unit: "{key}",
		Kind: Level,
		Help: "Keys in memory.",
		Read: one(func(s *Sample) float64 { return float64(s.Cached) }),
	},
	{
		Prometheus: "apikeys_cache_evictions_total", OTel: "apikey.cache.evictions", Unit: "{key}",
		Help: "Keys that left the memory because other keys needed the space.",
		Read: one(func(s *Sample) float64 { return float64(s.Evicted) }),
	},
	{
		Prometheus: "apikeys_outdated_digests", OTel: "apikey.outdated_digest.count",
		Unit: "{digest}", Kind: Gauge,
		Help: "Digests that an earlier hasher has made; absent if there is no earlier hasher, " +
			"and before the first count.",
		Read: func(s *Sample, yield func(string, Value)) {
			if s.Outdated >= 0 {
				yield("", Value{Number: float64(s.Outdated)})
			}
		},
	},
	{
		Prometheus: "apikeys_processes", OTel: "apikey.process.count", Unit: "{process}",
		Kind: Gauge,
		Help: "Processes that have the store open, including this process; 0 while this " +
			"process is out of contact with the others.",
		Read: one(func(s *Sample) float64 { return float64(s.Processes) }),
	},
	{
		Prometheus: "apikeys_fresh", OTel: "apikey.process.fresh", Unit: "1", Kind: Gauge,
		Help: "1 while this process may admit callers; 0 while it is out of contact with the " +
			"other processes of the store.",
		Read: one(func(s *Sample) float64 { return number(s.Fresh) }),
	},
	{
		Prometheus: "apikeys_freshness_seconds", OTel: "apikey.process.freshness", Unit: "s",
		Kind: Gauge,
		Help: "The freshness of a store of several processes: how long a process without " +
			"contact may admit callers.",
		Read: shared(func(s *Sample) float64 { return s.Freshness.Seconds() }),
	},
	{
		Prometheus: "apikeys_feed_lag_seconds", OTel: "apikey.process.feed_lag", Unit: "s",
		Kind: Gauge,
		Help: "How long the storage takes to confirm a heartbeat of this process, and to " +
			"deliver it in the feed of the changes.",
		Read: shared(func(s *Sample) float64 { return s.FeedLag.Seconds() }),
	},
	{
		Prometheus: "apikeys_barrier_duration_seconds", OTel: "apikey.barrier", Unit: "s",
		Kind: Histogram,
		Help: "How long calls waited until a change was in force in every process.",
		Read: func(s *Sample, yield func(string, Value)) {
			if s.Freshness > 0 {
				yield("", Value{Durations: s.Barriers})
			}
		},
	},
	{
		Prometheus: "apikeys_lost_touch_total", OTel: "apikey.process.losses", Unit: "{loss}",
		Help: "How often this process was out of contact with the other processes, and refused " +
			"all calls.",
		Read: shared(func(s *Sample) float64 { return float64(s.LostTouch) }),
	},
	{
		Prometheus: "apikeys_processes_removed_total", OTel: "apikey.process.removals",
		Unit: "{process}",
		Help: "Silent processes that this process has removed from the store.",
		Read: shared(func(s *Sample) float64 { return float64(s.Removed) }),
	},
	{
		Prometheus: "apikeys_keys", OTel: "apikey.key.count", Unit: "{key}", Kind: Gauge,
		Label: "state", Attribute: "apikey.key.state",
		Help: "Keys in the store, by the status. With Inventory only.",
		Read: counts(func(c *inventory.Counts) map[string]int64 { return c.ByStatus }),
	},
	{
		Prometheus: "apikeys_expiring_keys", OTel: "apikey.expiring_key.count", Unit: "{key}",
		Kind: Gauge, Label: "within", Attribute: "apikey.key.expires_within",
		Help: "Active keys that expire within a time. With Inventory only.",
		Read: counts(func(c *inventory.Counts) map[string]int64 { return c.Expiring }),
	},
	{
		Prometheus: "apikeys_unused_keys", OTel: "apikey.unused_key.count", Unit: "{key}",
		Kind: Gauge, Label: "since", Attribute: "apikey.key.unused_since",
		Help: "Active keys that were created before a time and not used since. With Inventory " +
			"only.",
		Read: counts(func(c *inventory.Counts) map[string]int64 { return c.Unused }),
	},
	{
		Prometheus: "apikeys_inventory_timestamp_seconds", OTel: "apikey.inventory.time",
		Unit: "s", Kind: Gauge,
		Help: "When the last complete count of the keys began, in seconds since the Unix " +
			"epoch. With Inventory only.",
		Read: func(s *Sample, yield func(string, Value)) {
			if s.Inventory != nil {
				at := time.Duration(s.Inventory.At.UnixNano())
				yield("", Value{Number: at.Seconds()})
			}
		},
	},
}

// errorType is the attribute of the semantic conventions for a reason.
const errorType = "error.type"

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// one is Read of a metric with one value.
func one(value func(*Sample) float64) func(*Sample, func(string, Value)) {
	return func(s *Sample, yield func(string, Value)) { yield("", Value{Number: value(s)}) }
}

// shared is one for a store that several processes may have open. Any other store has no value.
func shared(value func(*Sample) float64) func(*Sample, func(string, Value)) {
	return func(s *Sample, yield func(string, Value)) {
		if s.Freshness > 0 {
			yield("", Value{Number: value(s)})
		}
	}
}

// words is Read of a metric with a value for each word.
func words[K ~string](values func(*Sample) map[K]uint64) func(*Sample, func(string, Value)) {
	return func(s *Sample, yield func(string, Value)) {
		for word, n := range values(s) {
			yield(string(word), Value{Number: float64(n)})
		}
	}
}

// counts is words for a part of the Inventory.
func counts(
	values func(*inventory.Counts) map[string]int64,
) func(*Sample, func(string, Value)) {
	return func(s *Sample, yield func(string, Value)) {
		if s.Inventory == nil {
			return
		}
		for word, n := range values(s.Inventory) {
			yield(word, Value{Number: float64(n)})
		}
	}
}
