package promkeys_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/stretchr/testify/require"
)

// serve serves the metrics of a registry until the end of the test, and returns host:port.
func serve(t testing.TB, registry *prometheus.Registry) string {
	t.Helper()
	s := httptest.NewServer(promhttp.HandlerFor(registry,
		promhttp.HandlerOpts{EnableOpenMetrics: true}))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

// A target is a server that Prometheus scrapes.
type target struct{ job, addr string }

// A promServer is a running Prometheus.
type promServer struct {
	url    string
	client http.Client
}

// startPrometheus runs Prometheus until the end of the test. It scrapes the targets twice a second,
// and evaluates the rules as often. If there is no Prometheus, the test is skipped.
func startPrometheus(t *testing.T, rules string, targets ...target) *promServer {
	t.Helper()
	program := lookPath(t, "prometheus")
	dir := t.TempDir()
	config := "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\n" +
		"rule_files: [rules.yaml]\nscrape_configs:\n"
	for _, target := range targets {
		config += fmt.Sprintf("  - {job_name: %s, static_configs: [{targets: ['%s']}]}\n",
			target.job, target.addr)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "rules.yaml"), []byte(rules), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(config), 0o600))
	for range 5 {
		if p := tryPrometheus(t, program, dir); p != nil {
			return p
		}
	}
	require.Fail(t, "Prometheus did not start")
	return nil
}

// tryPrometheus returns nil if Prometheus ends before it is ready, because another program was
// faster to take the port.
func tryPrometheus(t *testing.T, program, dir string) *promServer {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := listener.Addr().String()
	require.NoError(t, listener.Close())
	var log bytes.Buffer
	cmd := exec.Command(program, "--config.file=config.yaml", "--storage.tsdb.path=data",
		"--web.listen-address="+addr)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &log, &log
	require.NoError(t, cmd.Start())
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Log(log.String())
		}
	})
	p := &promServer{url: "http://" + addr,
		client: http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	for range 600 {
		select {
		case <-ended:
			return nil
		case <-time.After(100 * time.Millisecond):
		}
		if r, err := p.client.Get(p.url + "/-/ready"); err == nil {
			_ = r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return p
			}
		}
	}
	require.Fail(t, "Prometheus is not ready", log.String())
	return nil
}

// get calls the API of Prometheus, and decodes the data of the answer.
func (p *promServer) get(t testing.TB, path string, query url.Values, data any) {
	t.Helper()
	r, err := p.client.Get(p.url + "/api/v1/" + path + "?" + query.Encode())
	require.NoError(t, err)
	defer r.Body.Close()
	answer := struct {
		Status, Error string
		Data          any
	}{Data: data}
	require.NoError(t, json.NewDecoder(r.Body).Decode(&answer))
	require.Equal(t, "success", answer.Status, "%v: %s", query, answer.Error)
}

// A series is one element of the result of an expression.
type series struct {
	Metric map[string]string
	Value  [2]any
}

func (s series) number(t testing.TB) float64 {
	t.Helper()
	f, err := strconv.ParseFloat(s.Value[1].(string), 64)
	require.NoError(t, err)
	return f
}

// query evaluates an expression now.
func (p *promServer) query(t testing.TB, expr string) []series {
	t.Helper()
	var data struct{ Result []series }
	p.get(t, "query", url.Values{"query": {expr}}, &data)
	return data.Result
}

// A rule is what Prometheus says of an alert.
type rule struct {
	Name, Health, LastError string
	Annotations             map[string]string
	Alerts                  []struct {
		Labels map[string]string
		State  string
	}
}

func (p *promServer) rules(t testing.TB) []rule {
	t.Helper()
	var data struct{ Groups []struct{ Rules []rule } }
	p.get(t, "rules", nil, &data)
	require.Len(t, data.Groups, 1)
	return data.Groups[0].Rules
}

func readFile(t testing.TB, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	require.NoError(t, err)
	return string(text)
}

var metricNames = regexp.MustCompile(`\bapikeys_[a-z_]+`)

// A panel is a panel of the dashboard.
type panel struct {
	ID          int
	Type, Title string
	Description string
	GridPos     struct{ X, Y, W, H int }
	Targets     []struct{ RefID, Expr, LegendFormat string }
}

func readDashboard(t testing.TB) []panel {
	t.Helper()
	var dashboard struct{ Panels []panel }
	require.NoError(t, json.Unmarshal([]byte(readFile(t, "dashboard.json")), &dashboard))
	return dashboard.Panels
}

// withoutVariables returns an expression of the dashboard as Grafana sends it.
func withoutVariables(expr string) string {
	return strings.NewReplacer("$job", ".+", "$instance", ".+", "$__rate_interval", "5s").
		Replace(expr)
}
