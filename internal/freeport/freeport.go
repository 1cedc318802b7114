// Package freeport finds ports for the servers that tests, examples and benchmarks start.
package freeport

import (
	"fmt"
	"math/rand/v2"
	"net"
)

// The ports are below those that systems give to programs that ask for any port: Linux gives ports
// from 32,768 on, and other systems from 49,152 on. So none of these programs takes a port before
// the server of the caller does.
const (
	first = 10_000
	last  = 29_999
)

// Port returns a port of 127.0.0.1 that no process uses now.
func Port() (int, error) {
	ports, err := Ports(1)
	if err != nil {
		return 0, err
	}
	return ports[0], nil
}

// Ports returns n different ports of 127.0.0.1 that no process uses now.
func Ports(n int) ([]int, error) {
	var ports []int
	for failed := 0; len(ports) < n; {
		port := first + rand.IntN(last-first+1)
		l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
		switch {
		case err == nil:
			defer l.Close() // not before all ports are found, so the ports differ
			ports = append(ports, port)
		case failed == 100:
			return nil, err
		default:
			failed++
		}
	}
	return ports, nil
}
