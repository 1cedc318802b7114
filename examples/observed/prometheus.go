package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// A prometheusServer is a running Prometheus.
type prometheusServer struct {
	url   string
	cmd   *exec.Cmd
	log   *bytes.Buffer
	ended chan struct{}
}

// step is how often Prometheus scrapes, and the distance of two points of a line.
const step = 500 * time.Millisecond

var errNoPrometheus = errors.New("there is no program prometheus: install Debian's package " +
	"prometheus, or put the program of another distribution into PATH")

// startPrometheus starts Prometheus, which scrapes the target and keeps its data in dir.
func startPrometheus(ctx context.Context, dir, target string) (*prometheusServer, error) {
	program, err := exec.LookPath("prometheus")
	if err != nil {
		return nil, errNoPrometheus
	}
	config := fmt.Sprintf("global: {scrape_interval: %s}\nscrape_configs:\n"+
		"  - {job_name: observed, static_configs: [{targets: ['%s']}]}\n", step, target)
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yaml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	port, err := freeport.Port()
	if err != nil {
		return nil, err
	}
	addr := fmt.Sprint("127.0.0.1:", port)
	p := &prometheusServer{url: "http://" + addr, log: new(bytes.Buffer),
		ended: make(chan struct{})}
	p.cmd = exec.Command(program, "--config.file=prometheus.yaml", "--storage.tsdb.path=data",
		"--web.listen-address="+addr)
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, p.log, p.log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.ended)
	}()
	for {
		select {
		case <-p.ended:
			return nil, fmt.Errorf("prometheus ended: %s", p.log)
		case <-ctx.Done():
			p.stop()
			return nil, ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
		r, err := http.Get(p.url + "/-/ready")
		if err != nil {
			continue
		}
		_ = r.Body.Close()
		if r.StatusCode == http.StatusOK {
			return p, nil
		}
	}
}

func (p *prometheusServer) stop() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// A line is a series of a panel.
type line struct {
	legend string
	points []point
}

type point struct {
	at    time.Time
	value float64
}

// lines evaluates an expression of the dashboard for each step of a time. legend is the format of
// the legend, as in Grafana: the value of a label replaces {{label}}.
func (p *prometheusServer) lines(expr, legend string, from, to time.Time) ([]line, error) {
	expr = strings.NewReplacer("$job", ".+", "$instance", ".+", "$__rate_interval", "3s").
		Replace(expr)
	seconds := func(t time.Time) string {
		return strconv.FormatFloat(float64(t.UnixMilli())/1000, 'f', 3, 64)
	}
	r, err := http.Get(p.url + "/api/v1/query_range?" + url.Values{
		"query": {expr}, "start": {seconds(from)}, "end": {seconds(to)},
		"step": {fmt.Sprint(step.Seconds())},
	}.Encode())
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct {
			Result []struct {
				Metric map[string]string
				Values [][2]any
			}
		}
	}
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Status != "success" {
		return nil, fmt.Errorf("%s: %s", expr, answer.Error)
	}
	var lines []line
	for _, series := range answer.Data.Result {
		l := line{legend: legend}
		for name, value := range series.Metric {
			l.legend = strings.ReplaceAll(l.legend, "{{"+name+"}}", value)
		}
		for _, v := range series.Values {
			at, _ := v[0].(float64)
			text, _ := v[1].(string)
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return nil, err
			}
			l.points = append(l.points, point{time.UnixMilli(int64(at * 1000)), value})
		}
		lines = append(lines, l)
	}
	return lines, nil
}

// A panel is a panel of the dashboard, with the lines that its expressions have.
type panel struct {
	Type, Title string
	GridPos     struct{ X, Y, W, H int }
	FieldConfig struct{ Defaults struct{ Unit string } }
	Targets     []struct{ Expr, LegendFormat string }

	lines []line
}

// readDashboard returns the panels of a dashboard of Grafana.
func readDashboard(file string) ([]*panel, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var dashboard struct{ Panels []*panel }
	if err := json.Unmarshal(text, &dashboard); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return dashboard.Panels, nil
}

// evaluate fills in the lines of the panels.
func (p *prometheusServer) evaluate(panels []*panel, from, to time.Time) error {
	for _, panel := range panels {
		for _, target := range panel.Targets {
			lines, err := p.lines(target.Expr, target.LegendFormat, from, to)
			if err != nil {
				return fmt.Errorf("panel %q: %w", panel.Title, err)
			}
			panel.lines = append(panel.lines, lines...)
		}
	}
	return nil
}
