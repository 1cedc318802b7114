package main

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var daysAndWeeks = regexp.MustCompile(`\d+[dw]`)

// parseSpan reads a duration that may have days and weeks: 90d, 2w, 1d12h, 30m. A day has 24 hours.
func parseSpan(text string) (time.Duration, error) {
	inHours := daysAndWeeks.ReplaceAllStringFunc(text, func(part string) string {
		n, err := strconv.ParseInt(part[:len(part)-1], 10, 32)
		if err != nil {
			return part // ParseDuration refuses the part
		}
		if part[len(part)-1] == 'w' {
			n *= 7
		}
		return strconv.FormatInt(n*24, 10) + "h"
	})
	d, err := time.ParseDuration(inHours)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("write a duration such as 90d, 2w or 12h")
	}
	return d, nil
}

// A direction says which way a duration without a sign leads from now.
type direction time.Duration

const (
	ahead direction = 1
	back  direction = -1
)

// parseTime reads a time: a duration from now, a date, which means midnight UTC, or a time in the
// form of RFC 3339. A duration with a + or a - leads ahead or back.
func parseTime(text string, now time.Time, d direction) (time.Time, error) {
	switch {
	case strings.HasPrefix(text, "+"):
		text, d = text[1:], ahead
	case strings.HasPrefix(text, "-"):
		text, d = text[1:], back
	default:
		for _, layout := range []string{time.RFC3339, time.DateOnly} {
			if t, err := time.Parse(layout, text); err == nil {
				return t, nil
			}
		}
	}
	span, err := parseSpan(text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w, a date such as 2026-12-31, or a time such as "+
			"2026-12-31T18:00:00Z", err)
	}
	return now.Add(time.Duration(d) * span), nil
}

// relative writes a time for a table: in 90d, 3h ago. Nil means that there is no time.
func relative(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return relativeTo(*t, time.Now())
}

func relativeTo(t, now time.Time) string {
	switch d := t.Sub(now); {
	case d >= time.Second:
		return "in " + spanText(d)
	case d <= -time.Second:
		return spanText(-d) + " ago"
	default:
		return "now"
	}
}

// spanText writes a duration in its largest unit, rounded.
func spanText(d time.Duration) string {
	const day = 24 * time.Hour
	for _, u := range []struct {
		size, least time.Duration
		letter      string
	}{
		{365 * day, 2 * 365 * day, "y"}, {day, 2 * day, "d"}, {time.Hour, time.Hour, "h"},
		{time.Minute, time.Minute, "m"},
	} {
		if d >= u.least {
			return fmt.Sprintf("%d%s", d.Round(u.size)/u.size, u.letter)
		}
	}
	return fmt.Sprintf("%ds", d.Round(time.Second)/time.Second)
}

// lastUse writes the minute of a last use for a table: now, if the minute is not over. Nil means
// that no use is known.
func lastUse(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return lastUseTo(*t, time.Now())
}

func lastUseTo(t, now time.Time) string {
	if now.Sub(t) < time.Minute {
		return "now"
	}
	return relativeTo(t, now)
}

// exactUse writes the minute of a last use, and how long ago the minute was.
func exactUse(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return fmt.Sprintf("%s (%s)", t.UTC().Format("2006-01-02T15:04Z07:00"), lastUse(t))
}

// exact writes a time, and how far away the time is.
func exact(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return fmt.Sprintf("%s (%s)", t.UTC().Format(time.RFC3339), relative(t))
}
