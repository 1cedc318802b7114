package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v3"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func lookupCommand() *cli.Command {
	return &cli.Command{
		Name: lookupName, Category: groupKeys,
		Usage: "print the key of a secret, and why the secret is refused",
		Description: "The secret comes from a prompt, from stdin or from a file: an argument would" +
			" be visible to other users. lookup does not count as a use of the key. With --dir, " +
			"lookup cannot compare a token of flask-api-key, but names the key of the token.",
		UsageText: "apikeyctl lookup --file leaked.txt",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "file", Usage: "read the secret from `FILE`"},
			&cli.StringFlag{Name: "from", Usage: "the IP `ADDRESS` that used the secret, for a key " +
				"with networks"},
		},
		Action: withServer(lookup),
	}
}

// A foundKey is the key of a secret, with the reason why the secret is refused.
type foundKey struct {
	key
	Refusal string `json:"refusal"`
}

func (k foundKey) whole() []field {
	admitted := "yes"
	if k.Refusal != "" {
		admitted = "no: " + k.Refusal
	}
	return append(k.key.whole(), field{"Admitted", admitted})
}

func lookup(ctx context.Context, c *call) (err error) {
	if c.Args().Present() {
		return usage("the secret of a key is no argument, because other users can see the arguments: " +
			"type the secret when asked, or give --file. If an argument was a real secret, rotate " +
			"its key")
	}
	token, err := c.token(ctx)
	if err != nil {
		return err
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	r, err := c.keys.LookupKey(ctx, &adminpb.LookupKeyRequest{
		Token: token, ClientAddress: c.String("from")})
	if err != nil {
		return c.failed(ctx, err)
	}
	if r.Key == nil {
		return unknownToken(r)
	}
	return c.out.one(foundKey{keyOf(r.Key), r.Refusal})
}

// unknownToken is the failure for a token that is the secret of no key.
func unknownToken(r *adminpb.LookupKeyResponse) error {
	text := "the secret is of no key of this store: look in the other stores"
	if r.Refusal == "malformed" {
		text = "the text is not the secret of a key: it was mistyped or cut off, or it is of another " +
			"program"
	}
	if id := strings.TrimPrefix(r.ClaimedName, namePrefix); id != "" {
		text += fmt.Sprintf(`. The text names the key %s, but anybody can write that: see `+
			`"apikeyctl get %s"`, id, id)
	}
	return &failure{exitNotFound, codes.NotFound, strings.ToUpper(r.Refusal), text}
}

// maxToken is more than the length of the longest token, in bytes.
const maxToken = 4096

// token reads the secret from the file, from a prompt, or from stdin.
func (c *call) token(ctx context.Context) (string, error) {
	var text string
	var err error
	switch path := c.String("file"); {
	case path != "":
		text, err = readToken(os.Open(path))
	case isTerminal(os.Stdin):
		text, err = c.prompt(ctx, "Secret (not shown): ")
	default:
		text, err = readToken(os.Stdin, nil)
	}
	if err != nil {
		var f *failure
		if errors.As(err, &f) {
			return "", f
		}
		return "", local("cannot read the secret: %v", err)
	}
	if text = strings.TrimSpace(text); text == "" {
		return "", usage("there is no secret: type it when asked, or give it on stdin or in --file")
	}
	return text, nil
}

func readToken(file *os.File, err error) (string, error) {
	if err != nil {
		return "", err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxToken))
	return string(text), err
}

// prompt reads a line from the terminal without showing it. The terminal shows nothing from before
// the question on, and again what is typed when prompt returns.
func (c *call) prompt(ctx context.Context, question string) (string, error) {
	fd := int(os.Stdin.Fd())
	before, err := term.MakeRaw(fd)
	if err != nil {
		return "", err
	}
	defer term.Restore(fd, before)
	screen := term.NewTerminal(struct {
		io.Reader
		io.Writer
	}{os.Stdin, c.out.stderr}, "")
	type result struct {
		text string
		err  error
	}
	read := make(chan result, 1)
	go func() {
		text, err := screen.ReadPassword(question)
		read <- result{text, err}
	}()
	select {
	case <-ctx.Done():
		return "", interrupted("nothing was read")
	case r := <-read:
		if errors.Is(r.err, io.EOF) {
			return "", interrupted("nothing was read") // Ctrl-C or Ctrl-D
		}
		return r.text, r.err
	}
}
