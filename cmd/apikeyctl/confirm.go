package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/term"
)

func isTerminal(file *os.File) bool { return term.IsTerminal(int(file.Fd())) }

// canAsk reports whether there is a person to ask.
func (c *call) canAsk() bool { return isTerminal(os.Stdin) && isTerminal(c.out.stderr) }

// ask asks the user to type an answer. Another answer is a failure. question says what will happen.
func (c *call) ask(ctx context.Context, question, answer string) error {
	fmt.Fprintf(c.out.stderr, "%s\nType %s to continue: ", printable(question), answer)
	line, err := readLine(ctx)
	switch {
	case ctx.Err() != nil:
		fmt.Fprintln(c.out.stderr)
		return interrupted("nothing was changed")
	case err != nil || strings.TrimSpace(line) != answer:
		return usage("nothing was changed, because %s was not typed", answer)
	}
	return nil
}

// askNumber asks for a number, so that a user does not change many keys by accident.
func (c *call) askNumber(ctx context.Context, question string, n int64) error {
	return c.ask(ctx, question, strconv.FormatInt(n, 10))
}

// readLine reads a line from stdin, until ctx ends. The process ends soon after ctx, and with the
// process the goroutine.
func readLine(ctx context.Context) (string, error) {
	type result struct {
		line string
		err  error
	}
	read := make(chan result, 1)
	go func() {
		line, err := bufio.NewReader(os.Stdin).ReadString('\n')
		read <- result{line, err}
	}()
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case r := <-read:
		return r.line, r.err
	}
}
