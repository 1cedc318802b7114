package freeport

import (
	"fmt"
	"net"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestPorts(t *testing.T) {
	ports, err := Ports(500)
	require.NoError(t, err)
	require.Len(t, ports, 500)
	slices.Sort(ports)
	require.Len(t, slices.Compact(ports), 500, "a port was returned twice")
	for _, port := range ports {
		require.GreaterOrEqual(t, port, first)
		require.LessOrEqual(t, port, last)
	}
	port, err := Port()
	require.NoError(t, err)
	l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", port))
	require.NoError(t, err)
	require.NoError(t, l.Close())
}
