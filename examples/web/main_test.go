package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Both streams end with the key, and each client learns that.
func TestRun(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(t.TempDir(), &out))
	for _, want := range []string{
		"events: data: 1",
		"socket: hello",
		"the events ended: unexpected EOF",
		"the socket ended: StatusPolicyViolation",
		"the API key has ended",
		"another request: 401 Unauthorized",
	} {
		require.Contains(t, out.String(), want)
	}
}
