package main

import (
	"fmt"
	"os"
	"time"
)

// A progress shows the current activity in one line of a terminal. If the output is not a terminal,
// a progress writes nothing.
type progress struct {
	to    *os.File // nil if there is no terminal
	shown time.Time
}

func newProgress(f *os.File) *progress {
	info, err := f.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 || os.Getenv("TERM") == "dumb" {
		return &progress{}
	}
	return &progress{to: f}
}

// show replaces the line at most five times per second, because writing takes time too.
func (p *progress) show(text string) {
	if p.to == nil || time.Since(p.shown) < 200*time.Millisecond {
		return
	}
	p.shown = time.Now()
	fmt.Fprintf(p.to, "\r\x1b[K%.100s", text)
}

func (p *progress) clear() {
	if p.to != nil {
		fmt.Fprint(p.to, "\r\x1b[K")
	}
}
