//go:build !linux

package sharedlab

// awaitStop does nothing: elsewhere than on Linux, a child may run a little after SIGSTOP.
func awaitStop(int) error { return nil }
