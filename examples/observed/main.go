// Observed is a server that is observed by logs, traces and metrics, among the interceptors that
// servers commonly use. Run it in this folder:
//
//	go run .
//
// Observed makes traffic for a minute, revokes a key under load, and draws the panels of the
// Grafana dashboard into panels.svg, from what a Prometheus has scraped. Observed needs the program
// prometheus.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// inventoryEvery is how often the keys are counted. The first count is immediate.
const inventoryEvery = 10 * time.Minute

func main() {
	var c config
	flag.DurationVar(&c.duration, "duration", time.Minute, "how long to make traffic")
	flag.StringVar(&c.out, "out", "panels.svg", "the file for the picture")
	flag.StringVar(&c.dashboard, "dashboard", "../../keystore/promkeys/dashboard.json",
		"the dashboard to draw")
	flag.Parse()
	c.report = os.Stdout
	if err := run(context.Background(), c); err != nil {
		fmt.Fprintln(os.Stderr, "observed:", err)
		os.Exit(1)
	}
}

type config struct {
	duration       time.Duration
	out, dashboard string
	report         io.Writer
}

// run does what the comment of the package says.
func run(ctx context.Context, c config) (err error) {
	panels, err := readDashboard(c.dashboard)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "observed")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	logFile, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	defer logFile.Close()
	logger := slog.New(slog.NewJSONHandler(logFile, nil))
	store, err := keystore.Open(filepath.Join(dir, "keys"), &keystore.Options{Logger: logger})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()

	spans := new(lastCut)
	tracers := sdktrace.NewTracerProvider(sdktrace.WithBatcher(spans))
	defer func() { err = errors.Join(err, tracers.Shutdown(context.Background())) }()
	registry := prometheus.NewRegistry()
	server, stop, err := newServer(store, registry, tracers, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	var serving sync.WaitGroup
	defer serving.Wait()
	grpcListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	serving.Go(func() { _ = server.Serve(grpcListener) })
	defer server.Stop()
	webListener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	web := &http.Server{Handler: promhttp.HandlerFor(registry,
		promhttp.HandlerOpts{EnableOpenMetrics: true})}
	serving.Go(func() { _ = web.Serve(webListener) })
	defer web.Close()

	scraper, err := startPrometheus(ctx, dir, webListener.Addr().String())
	if err != nil {
		return err
	}
	defer scraper.stop()
	calls, err := startTraffic(ctx, store, grpcListener.Addr().String())
	if err != nil {
		return err
	}
	defer calls.stop()

	from := time.Now()
	fmt.Fprintf(c.report, "Traffic for %v, with a revocation in the middle.\n", c.duration)
	if err := sleep(ctx, c.duration/2); err != nil {
		return err
	}
	mark := time.Now()
	report, err := calls.revoke()
	if err != nil {
		return err
	}
	fmt.Fprintln(c.report, report)
	if err := sleep(ctx, c.duration-time.Since(from)); err != nil {
		return err
	}
	to := time.Now()
	if err := scraper.evaluate(panels, from, to); err != nil {
		return err
	}
	if err := os.WriteFile(c.out, []byte(draw(panels, from, to, mark)), 0o600); err != nil {
		return err
	}
	if err := tracers.ForceFlush(ctx); err != nil {
		return err
	}
	fmt.Fprintf(c.report, "A span of a stream that the revocation ended:\n%s", spans)
	if err := showRefusal(c.report, logFile.Name()); err != nil {
		return err
	}
	fmt.Fprintf(c.report, "The panels are in %s.\n", c.out)
	return nil
}

// sleep returns after d, or when ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
