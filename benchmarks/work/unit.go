package work

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A Unit is the unit of a figure. A Unit defines how the report formats the figure.
type Unit string

// The units.
const (
	Times    Unit = "×"
	Percent  Unit = "%"
	Nanos    Unit = "ns"
	Rate     Unit = "/s"
	Bytes    Unit = "B"
	PerKey   Unit = "B a key"
	Count    Unit = ""
	PerMsg   Unit = "a message"
	MoreThan Unit = "ns more"

	Writes         Unit = "writes/s"
	BytesPerSecond Unit = "B/s"
	OfACore        Unit = "% of a core"
)

// Format returns the value with three significant digits and the unit.
func (u Unit) Format(v float64) string {
	switch u {
	case Times:
		return digits(v) + " ×"
	case Percent:
		return strconv.FormatFloat(v, 'f', -1, 64) + " %"
	case Nanos:
		return duration(v)
	case MoreThan:
		return duration(v) + " more"
	case Rate:
		return digits(v) + " /s"
	case Bytes:
		switch {
		case math.Abs(v) >= 1<<30:
			return digits(v/(1<<30)) + " GiB"
		case math.Abs(v) >= 1<<20:
			return digits(v/(1<<20)) + " MiB"
		default:
			return digits(v/(1<<10)) + " KiB"
		}
	case Count:
		return digits(v)
	default:
		return digits(v) + " " + string(u)
	}
}

func duration(ns float64) string {
	switch abs := math.Abs(ns); {
	case abs >= 1e9:
		return digits(ns/1e9) + " s"
	case abs >= 1e6:
		return digits(ns/1e6) + " ms"
	case abs >= 1e3:
		return digits(ns/1e3) + " µs"
	default:
		return digits(ns) + " ns"
	}
}

// digits returns v with three significant digits, and separates groups of thousands: 0.0123, 1.23,
// 12.3, 123, 12,300.
func digits(v float64) string {
	if v == 0 {
		return "0"
	}
	decimals := 2 - int(math.Floor(math.Log10(math.Abs(v))))
	if decimals > 0 {
		text := strconv.FormatFloat(v, 'f', min(decimals, 6), 64)
		if strings.Contains(text, ".") {
			text = strings.TrimRight(strings.TrimRight(text, "0"), ".")
		}
		return text
	}
	unit := math.Pow10(-decimals)
	whole := strconv.FormatFloat(math.Abs(math.Round(v/unit)*unit), 'f', 0, 64)
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if v < 0 {
		whole = "-" + whole
	}
	return whole
}

// Spread returns the text of a range, such as that of the quartiles.
func (u Unit) Spread(low, high float64) string {
	return fmt.Sprintf("%s – %s", u.Format(low), u.Format(high))
}
