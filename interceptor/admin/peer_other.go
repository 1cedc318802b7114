//go:build !darwin && !freebsd && !linux

package admin

import "errors"

func peerOfSocket(int) (peerUser, error) { return peerUser{}, errors.ErrUnsupported }
