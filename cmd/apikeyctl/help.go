package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v3"
	"golang.org/x/term"
)

// printHelp prints the help of apikeyctl, or of one command. printHelp replaces the template of
// cli: it wraps the lines, and has the groups in their order.
func printHelp(w io.Writer, _ string, data any) {
	cmd, ok := data.(*cli.Command)
	if !ok {
		return
	}
	h := helpWriter{w, helpWidth()}
	if cmd.Root() == cmd {
		h.root(cmd)
	} else {
		h.command(cmd)
	}
}

// helpWidth returns the width of the lines: that of the window, but 100 at most.
func helpWidth() int {
	const widest = 100
	if columns, _, err := term.GetSize(int(os.Stdout.Fd())); err == nil && columns < widest {
		return max(columns, 20)
	}
	return widest
}

var (
	commandGroups = []string{groupKeys, groupMany, groupAudit, groupStore, groupTool}
	flagGroups    = []string{groupPlace, groupOutput, groupSafety}
)

const (
	aboutTimes = "A time is a duration (90d, 2w, 12h), a date (2026-12-31, which begins at midnight " +
		"UTC) or in the form of RFC 3339. Each flag says whether a duration leads ahead or back; " +
		"+7d always leads ahead, and -7d back."
	exitCodes = "0 done; 1 the command line, or this machine; 2 the server; 3 no such key; 4 not " +
		"permitted; 5 the directory is open elsewhere; 6 the key or the selection has changed; 130 " +
		"interrupted."
)

type helpWriter struct {
	w     io.Writer
	width int
}

func (h helpWriter) root(root *cli.Command) {
	h.text(0, "apikeyctl manages the API keys of a server.")
	h.text(0, "")
	h.text(2, "apikeyctl COMMAND [flags] [arguments]")
	for _, group := range commandGroups {
		h.text(0, "")
		h.text(0, group)
		for _, cmd := range root.VisibleCommands() {
			if cmd.Category == group {
				h.entry(12, cmd.Name, cmd.Usage)
			}
		}
	}
	for _, group := range flagGroups {
		h.text(0, "")
		h.text(0, group)
		for _, flag := range root.VisibleFlags() {
			if c, ok := flag.(cli.CategorizableFlag); ok && c.GetCategory() == group {
				h.flag(flag)
			}
		}
	}
	h.text(0, "")
	h.text(0, aboutTimes)
	h.text(0, "")
	h.text(0, "Exit codes: "+exitCodes)
	h.text(0, "")
	h.text(0, `"apikeyctl COMMAND --help" shows the flags of a command, and an example.`)
}

func (h helpWriter) command(cmd *cli.Command) {
	h.text(0, cmd.FullName()+": "+cmd.Usage+".")
	h.text(0, "")
	line := cmd.FullName()
	if cmd.ArgsUsage != "" {
		line += " " + cmd.ArgsUsage
	}
	h.text(2, line+" [flags]")
	if cmd.Description != "" {
		h.text(0, "")
		h.text(0, cmd.Description)
	}
	h.text(0, "")
	h.text(0, "Example")
	h.text(2, cmd.UsageText)
	if flags := cmd.VisibleFlags(); len(flags) > 0 {
		h.text(0, "")
		h.text(0, "Flags")
		for _, flag := range flags {
			h.flag(flag)
		}
	}
	h.text(0, "")
	h.text(0, `"apikeyctl --help" shows the flags that all commands have, and the exit codes.`)
}

func (h helpWriter) flag(flag cli.Flag) {
	if label, text, ok := describe(flag); ok {
		h.entry(24, label, text)
	}
}

// describe returns the names of a flag, with the placeholder that the usage has in back quotes, and
// what the flag does.
func describe(flag cli.Flag) (label, text string, ok bool) {
	doc, ok := flag.(cli.DocGenerationFlag)
	if !ok {
		return "", "", false
	}
	before, quoted, _ := strings.Cut(doc.GetUsage(), "`")
	placeholder, after, _ := strings.Cut(quoted, "`")
	var names []string
	for _, name := range flag.Names() {
		hyphens := "--"
		if len(name) == 1 {
			hyphens = "-"
		}
		names = append(names, hyphens+name)
	}
	label = strings.Join(names, ", ")
	if placeholder != "" {
		label += " " + placeholder
	}
	text = before + placeholder + after
	if value := doc.GetValue(); doc.TakesValue() && value != "" && doc.IsDefaultVisible() {
		text += " [default " + strings.Trim(value, `"`) + "]"
	}
	for _, env := range doc.GetEnvVars() {
		text += " [$" + env + "]"
	}
	return label, text, true
}

// entry prints a label, and beside it a text. In a narrow window, the text is below the label.
func (h helpWriter) entry(column int, label, text string) {
	indent := column + 4
	if indent+30 > h.width {
		h.text(2, label)
		h.text(6, text)
		return
	}
	if len(label) > column {
		h.text(2, label)
		label = ""
	}
	for i, line := range wrapText(text, h.width-indent) {
		if i > 0 {
			label = ""
		}
		fmt.Fprintf(h.w, "  %-*s  %s\n", column, label, line)
	}
}

func (h helpWriter) text(indent int, text string) {
	for _, line := range wrapText(text, h.width-indent) {
		fmt.Fprintln(h.w, strings.TrimRight(strings.Repeat(" ", indent)+line, " "))
	}
}

// wrapText returns the lines of a text that are no longer than width, unless a word is.
func wrapText(text string, width int) []string {
	lines := []string{""}
	for _, word := range strings.Fields(text) {
		last := &lines[len(lines)-1]
		switch {
		case *last == "":
			*last = word
		case len(*last)+1+len(word) <= width:
			*last += " " + word
		default:
			lines = append(lines, word)
		}
	}
	return lines
}
