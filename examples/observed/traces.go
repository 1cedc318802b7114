package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// A lastCut is an exporter of spans. It keeps the last span of a stream that ended with its key.
type lastCut struct {
	mu   sync.Mutex
	span sdktrace.ReadOnlySpan // nil: none
}

func (l *lastCut) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, span := range spans {
		for _, event := range span.Events() {
			if event.Name == "apikey.stream.ended" {
				l.span = span
			}
		}
	}
	return nil
}

func (l *lastCut) Shutdown(context.Context) error { return nil }

// String returns the span in lines.
func (l *lastCut) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.span == nil {
		return "  none\n"
	}
	var s strings.Builder
	fmt.Fprintf(&s, "  %s, %v\n", l.span.Name(),
		l.span.EndTime().Sub(l.span.StartTime()).Round(1e6))
	for _, a := range l.span.Attributes() {
		if strings.HasPrefix(string(a.Key), "apikey.") || a.Key == "rpc.response.status_code" {
			fmt.Fprintf(&s, "    %s = %s\n", a.Key, a.Value.String())
		}
	}
	for _, event := range l.span.Events() {
		fmt.Fprintf(&s, "    event %s\n", event.Name)
		for _, a := range event.Attributes {
			fmt.Fprintf(&s, "      %s = %s\n", a.Key, a.Value.String())
		}
	}
	return s.String()
}

// showRefusal writes the first line of the log about a stream that ended with its key.
func showRefusal(w io.Writer, logFile string) error {
	f, err := os.Open(logFile)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "ended with its API key") {
			fmt.Fprintf(w, "The line of the log:\n  %s\n", lines.Text())
			break
		}
	}
	return lines.Err()
}
