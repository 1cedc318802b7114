//go:build race

package keystore

const RaceEnabled = true
