//go:build unix

package main

import (
	"bytes"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The manual page has every command, flag and variable, and is without a fault for groff.
func TestMan(t *testing.T) {
	w := newWorld(t)
	page := w.ctl("man").stdout
	root := newCommand()
	for _, cmd := range root.Commands {
		require.Contains(t, page, `.SS "apikeyctl `+roff(strings.TrimSpace(cmd.Name+" "+cmd.ArgsUsage)))
		require.Contains(t, page, roff("$ apikeyctl "+cmd.Name))
		for _, flag := range cmd.Flags {
			require.Contains(t, page, roff("--"+flag.Names()[0]))
		}
	}
	for _, flag := range root.Flags {
		require.Contains(t, page, roff("--"+flag.Names()[0]))
	}
	for _, name := range []string{"SOCKET", "ADDR", "CA", "KEY", "KEY_FILE", "DIR", "PEPPER_FILE",
		"OUTPUT"} {
		require.Contains(t, page, "APIKEYCTL_"+name)
	}
	groff, err := exec.LookPath("groff")
	if err != nil {
		t.Skip("NOT RUN: groff, which checks the form of the page, is not installed")
	}
	cmd := exec.Command(groff, "-man", "-ww", "-Kutf8", "-Tutf8", "-P-c")
	cmd.Stdin = strings.NewReader(page)
	var out, faults bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &faults
	require.NoError(t, cmd.Run())
	require.Empty(t, faults.String())
	shown := regexp.MustCompile(".\x08").ReplaceAllString(out.String(), "") // bold is typed twice
	for _, text := range []string{"--unused-since TIME", "[$APIKEYCTL_OUTPUT]",
		`$ apikeyctl revoke-all --owner acme --reason "contract ended"`} {
		require.True(t, strings.Contains(shown, text), text)
	}
}

func TestRoff(t *testing.T) {
	require.Equal(t, `\&.B \(dqa\(dq \-\-x \e \(aqb\(aq`, roff(`.B "a" --x \ 'b'`))
}
