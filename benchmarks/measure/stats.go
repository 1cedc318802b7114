package measure

import "slices"

// Quantile returns the q-quantile of the values, with linear interpolation between neighbours.
// Quantile returns 0 if there are no values.
func Quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// Median returns the median of the values.
func Median(values []float64) float64 { return Quantile(values, 0.5) }

// Ratios returns a[i]/b[i] for each round i.
func Ratios(a, b []float64) []float64 {
	return pairs(a, b, func(a, b float64) float64 { return a / b })
}

// Differences returns a[i]-b[i] for each round i.
func Differences(a, b []float64) []float64 {
	return pairs(a, b, func(a, b float64) float64 { return a - b })
}

func pairs(a, b []float64, f func(a, b float64) float64) []float64 {
	var out []float64
	for i := range min(len(a), len(b)) {
		out = append(out, f(a[i], b[i]))
	}
	return out
}

// Scaled returns each value multiplied by f.
func Scaled(values []float64, f float64) []float64 {
	out := slices.Clone(values)
	for i := range out {
		out[i] *= f
	}
	return out
}
