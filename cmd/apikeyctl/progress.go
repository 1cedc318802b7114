package main

import (
	"fmt"
	"time"

	"github.com/schollz/progressbar/v3"
)

// A progress shows on stderr how far a long command is: a bar on a terminal, or else a line every
// five seconds. With -q, a progress shows nothing.
type progress struct {
	call  *call
	verb  string // revoked, written
	bytes bool   // count bytes, and not keys
	bar   *progressbar.ProgressBar
	last  time.Time // of the line before
}

const progressEvery = 5 * time.Second

func (c *call) progress(verb string, bytes bool) *progress {
	p := &progress{call: c, verb: verb, bytes: bytes, last: time.Now()}
	if isTerminal(c.out.stderr) && c.out.format != formatID {
		p.bar = progressbar.NewOptions64(-1,
			progressbar.OptionSetWriter(c.out.stderr),
			progressbar.OptionSetDescription(verb),
			progressbar.OptionShowCount(),
			progressbar.OptionShowBytes(bytes),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionClearOnFinish(),
			progressbar.OptionSetElapsedTime(false),
			progressbar.OptionFullWidth(),
			progressbar.OptionSetSpinnerChangeInterval(0), // no goroutine prints after end
		)
	}
	return p
}

// at shows that done of total is done. A total of 0 is not known.
func (p *progress) at(done, total int64) {
	switch {
	case p.bar != nil:
		if total > 0 && p.bar.GetMax64() != total {
			p.bar.ChangeMax64(total)
		}
		_ = p.bar.Set64(done)
	case p.call.out.format != formatID && time.Since(p.last) >= progressEvery:
		p.last = time.Now()
		p.call.note("%s %s", p.verb, p.amount(done, total))
	}
}

func (p *progress) amount(done, total int64) string {
	switch {
	case p.bytes:
		return sizeText(done)
	case total > 0:
		return fmt.Sprintf("%d of %s", done, plural(total, "key"))
	default:
		return plural(done, "key")
	}
}

// end removes the bar. A second end has no effect.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Clear()
		p.bar = nil
	}
}

// sizeText writes a number of bytes for people: 1.5 MiB.
func sizeText(n int64) string {
	const unit = 1024
	if n < unit {
		return plural(n, "byte")
	}
	value, i := float64(n)/unit, 0
	for value >= unit && i < len("KMGT")-1 {
		value, i = value/unit, i+1
	}
	return fmt.Sprintf("%.1f %ciB", value, "KMGT"[i])
}
