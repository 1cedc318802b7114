//go:build !linux

package peers

import "os/exec"

func own(*exec.Cmd) {}

// unprivileged does nothing, because the benchmarks do not run as root on other systems.
func unprivileged(string) (func(*exec.Cmd), error) { return func(*exec.Cmd) {}, nil }
