//go:build !linux

package sharedlab

import "errors"

func runStore(string, <-chan struct{}) error {
	return errors.New("the store processes of the laboratory need Linux")
}
