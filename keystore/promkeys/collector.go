package promkeys

import (
	"errors"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/internal/storemetrics"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Options are the settings of a Collector. Nil and the zero value are valid.
type Options struct {
	// Inventory makes the Collector count the keys of the store, at most once in this time, in the
	// background: how many keys there are in each state, how many expire soon, and how many are not
	// used. Each count reads every key, so Inventory must be at least 10 minutes. If several
	// processes have the store open, one of them is enough. 0 means no inventory.
	//
	// A key counts as unused if no use is known. After a crash, uses of the last minutes are not
	// known: see keystore.Query.UnusedSince.
	Inventory time.Duration
}

// A Collector collects the metrics of a store when Prometheus scrapes. A Collector is a
// prometheus.Collector, and safe for concurrent use.
type Collector struct {
	store     *keystore.Store
	inventory *inventory.Inventory // nil: none
	metrics   []metric
}

type metric struct {
	storemetrics.Metric
	desc *prometheus.Desc
}

// NewCollector returns a Collector for a store. NewCollector registers nothing: register the
// Collector, and unregister the Collector before Close of the store, or leave it: after Close,
// apikeys_up is 0. To collect several stores of one process, register each Collector with
// prometheus.WrapRegistererWith and a label that you choose.
//
// NewCollector returns an error if the store is nil, or if an option is unusable.
func NewCollector(store *keystore.Store, opts *Options) (*Collector, error) {
	if store == nil {
		return nil, errors.New("promkeys: NewCollector: the store is nil")
	}
	c := &Collector{store: store}
	if opts != nil && opts.Inventory != 0 {
		var err error
		if c.inventory, err = storemetrics.NewInventory(store, opts.Inventory); err != nil {
			return nil, fmt.Errorf("promkeys: NewCollector: Options.Inventory %w", err)
		}
	}
	for _, m := range storemetrics.Metrics {
		var labels []string
		if m.Label != "" {
			labels = []string{m.Label}
		}
		c.metrics = append(c.metrics,
			metric{m, prometheus.NewDesc(m.Prometheus, m.Help, labels, nil)})
	}
	return c, nil
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(descs chan<- *prometheus.Desc) {
	for _, m := range c.metrics {
		descs <- m.desc
	}
}

// Collect implements prometheus.Collector. Collect does not use the storage.
func (c *Collector) Collect(out chan<- prometheus.Metric) {
	sample := storemetrics.Take(c.store, c.inventory)
	for _, m := range c.metrics {
		m.Read(sample, func(word string, v storemetrics.Value) {
			var labels []string
			if m.Label != "" {
				labels = []string{word}
			}
			switch m.Kind {
			case storemetrics.Counter:
				out <- prometheus.MustNewConstMetric(m.desc, prometheus.CounterValue, v.Number,
					labels...)
			case storemetrics.Level, storemetrics.Gauge:
				out <- prometheus.MustNewConstMetric(m.desc, prometheus.GaugeValue, v.Number,
					labels...)
			case storemetrics.Histogram:
				buckets := make(map[float64]uint64, len(v.Durations.AtMost))
				for bound, n := range v.Durations.AtMost {
					buckets[bound.Seconds()] = n
				}
				out <- prometheus.MustNewConstHistogram(m.desc, v.Durations.Count,
					v.Durations.Sum.Seconds(), buckets, labels...)
			}
		})
	}
}
