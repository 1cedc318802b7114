// Package promkeys is for servers that Prometheus watches: it collects the metrics of a
// keystore.Store, and has alerts and a Grafana dashboard for them.
//
//	collector, err := promkeys.NewCollector(store, nil)
//	prometheus.MustRegister(collector)
//
// Everything is read from Store.Stats when Prometheus scrapes, so Verify does no work for a metric.
// No label ever has a text from outside: neither the ID, the name or the owner of a key, nor an
// address. Logs and traces have the IDs of keys.
//
// The files rules.yaml and dashboard.json, beside this package, are the alerts and the dashboard.
// README.md lists the metrics with all values of their labels, and says for each alert what to do.
package promkeys
