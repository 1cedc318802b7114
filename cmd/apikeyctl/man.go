package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/urfave/cli/v3"
)

func manCommand() *cli.Command {
	return &cli.Command{
		Name: "man", Category: groupTool,
		Usage:     "print the manual page",
		UsageText: "apikeyctl man | man -l -",
		Action: func(_ context.Context, cmd *cli.Command) error {
			c, err := newCall(cmd)
			if err != nil {
				return err
			}
			if err := c.noArgs(); err != nil {
				return err
			}
			return writeFailed(writeMan(c.out.stdout, cmd.Root()))
		},
	}
}

// writeMan writes the manual page of apikeyctl, in the macros of man(7): the same words as the
// help, in the same groups. The module urfave/cli-docs would link two more modules into apikeyctl,
// and would show neither the groups nor the examples.
func writeMan(w io.Writer, root *cli.Command) error {
	m := manWriter{bufio.NewWriter(w)}
	m.macro("TH", "APIKEYCTL", "1", "", "apikeyctl "+versionNow().Version, "API keys")
	m.section("NAME")
	m.text("apikeyctl - " + root.Usage)
	m.section("SYNOPSIS")
	m.text("apikeyctl COMMAND [flags] [arguments]")
	m.section("DESCRIPTION")
	m.text("apikeyctl manages the API keys of a server that serves the package interceptor/admin, " +
		"on a unix socket or over TLS, or the keys in a directory that no process has open. Results go " +
		"to stdout, and everything else to stderr.")
	for _, group := range commandGroups {
		m.section(strings.ToUpper(group))
		for _, cmd := range root.VisibleCommands() {
			if cmd.Category == group {
				m.command(cmd)
			}
		}
	}
	m.section("FLAGS OF EVERY COMMAND")
	for _, group := range flagGroups {
		m.macro("SS", group)
		for _, flag := range root.VisibleFlags() {
			if c, ok := flag.(cli.CategorizableFlag); ok && c.GetCategory() == group {
				m.flag(flag)
			}
		}
	}
	m.section("TIMES")
	m.text(aboutTimes)
	m.section("ENVIRONMENT")
	m.text("A flag of the command line goes before its variable. APIKEYCTL_KEY has the key for " +
		"--addr itself; --key-file and its variable go before it.")
	for _, name := range variables(root) {
		m.text(name)
	}
	m.section("EXIT STATUS")
	m.text(exitCodes)
	return m.w.Flush()
}

var variable = regexp.MustCompile(`\$(APIKEYCTL_[A-Z_]+)`)

// variables returns the variables of the flags, and their flags.
func variables(root *cli.Command) (all []string) {
	for _, flag := range root.VisibleFlags() {
		label, text, _ := describe(flag)
		for _, m := range variable.FindAllStringSubmatch(text, -1) {
			name, _, _ := strings.Cut(label, ",")
			all = append(all, m[1]+": "+strings.Fields(name)[0])
		}
	}
	return all
}

type manWriter struct{ w *bufio.Writer }

// macro writes a line that begins with a macro of man(7).
func (m manWriter) macro(name string, args ...string) {
	fmt.Fprintf(m.w, ".%s", name)
	for _, arg := range args {
		fmt.Fprintf(m.w, ` "%s"`, roff(arg))
	}
	fmt.Fprintln(m.w)
}

func (m manWriter) section(title string) { m.macro("SH", title) }

// text writes a paragraph.
func (m manWriter) text(text string) {
	m.macro("PP")
	fmt.Fprintln(m.w, roff(text))
}

func (m manWriter) command(cmd *cli.Command) {
	m.macro("SS", strings.TrimSpace(cmd.FullName()+" "+cmd.ArgsUsage)+" [flags]")
	m.text(upperFirst(cmd.Usage) + ".")
	if cmd.Description != "" {
		m.text(cmd.Description)
	}
	for _, flag := range cmd.VisibleFlags() {
		if flag.Names()[0] != "help" {
			m.flag(flag)
		}
	}
	m.macro("PP")
	m.macro("EX")
	fmt.Fprintln(m.w, roff("$ "+cmd.UsageText))
	m.macro("EE")
}

func (m manWriter) flag(flag cli.Flag) {
	if label, text, ok := describe(flag); ok {
		m.macro("TP")
		m.macro("B", label)
		fmt.Fprintln(m.w, roff(text))
	}
}

// roff returns a text in which no character is a command of roff. A hyphen stays a hyphen, so that
// a reader can copy a flag.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, `"`, `\(dq`, "-", `\-`, "`", `\(ga`, "'", `\(aq`,
		"^", `\(ha`, "~", `\(ti`).Replace(text)
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}
