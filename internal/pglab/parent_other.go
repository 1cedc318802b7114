//go:build !linux

package pglab

import "syscall"

func endWithParent(*syscall.SysProcAttr) {}
