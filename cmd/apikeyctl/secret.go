package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"
)

// secretFlags are the flags of the commands that print a secret.
func secretFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "out", Category: groupSecret,
			Usage: "write the secret to the new `FILE`, which only you can read, and not to stdout"},
		&cli.StringFlag{Name: "out-env", Category: groupSecret,
			Usage: "write `NAME`=secret instead of the secret alone"},
	}
}

const groupSecret = "The secret"

// A secretSink takes the secret of a new key. The sink is opened before the key is made, because
// the server shows a secret only once.
type secretSink struct {
	file  *os.File // nil: stdout
	env   string   // the name of the variable, or empty
	saved bool     // the file has the secret
}

var envName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// openSecret opens the sink that the flags name.
func (c *call) openSecret() (*secretSink, error) {
	s := &secretSink{env: c.String("out-env")}
	if s.env != "" && !envName.MatchString(s.env) {
		return nil, usage("--out-env is not the name of a variable: write, for example, API_KEY")
	}
	path := c.String("out")
	switch {
	case c.Bool("dry-run"):
		return s, nil // there will be no secret
	case path == "" && c.out.format == formatID && s.env == "":
		return nil, usage("-q and -o id print no secret, and the secret of a key is shown only " +
			"once: give --out FILE too")
	case path == "" && isNull(c.out.stdout):
		return nil, usage("the standard output is %s, and the secret of a key is shown only once: "+
			"give --out FILE", os.DevNull)
	case path == "":
		return s, nil
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil, usage("--out: %s exists, and is not replaced: name a new file", path)
	}
	if err != nil {
		return nil, usage("--out: %v: name a new file in a directory that you can write to", err)
	}
	s.file = file
	return s, nil
}

// isNull reports whether a file is the null device. The Go runtime opens the null device for a
// standard output that is closed.
func isNull(file *os.File) bool {
	info, err := file.Stat()
	if err != nil {
		return true
	}
	null, err := os.Stat(os.DevNull)
	return err == nil && os.SameFile(info, null)
}

// drop removes the file of a sink that got no secret.
func (s *secretSink) drop() {
	if s.file != nil && !s.saved {
		s.file.Close()
		_ = os.Remove(s.file.Name())
	}
}

// An issuedKey is a key with its new secret.
type issuedKey struct {
	key
	Secret string `json:"secret"`
}

// deliver prints a key that has a new secret, and the secret. did says what was done: made,
// rotated.
func (c *call) deliver(s *secretSink, did string, k key, secret string) error {
	text := secret
	if s.env != "" {
		text = s.env + "=" + secret
	}
	if s.file != nil {
		if err := s.save(text); err != nil {
			return secretLost(did, k, err)
		}
		return c.issued(s, k)
	}
	if err := c.show(k, text, secret); err != nil {
		return secretLost(did, k, err)
	}
	return nil
}

func secretLost(did string, k key, cause error) error {
	return &failure{exitUsage, codes.Unknown, "SECRET_LOST", fmt.Sprintf(
		`the key %s is %s, but its secret could not be written: %v: make a new secret with `+
			`"apikeyctl rotate %s"`, k.label(), did, cause, k.ID)}
}

// show prints a key and its secret. The table of the key goes to stderr, so that stdout has the
// secret alone.
func (c *call) show(k key, text, secret string) error {
	switch c.out.format {
	case formatTable:
		_ = writeFields(c.out.stderr, k.whole())
		c.note("The secret is shown only once:")
		return c.out.line(text)
	case formatID:
		if err := c.out.line(k.ID); err != nil {
			return err
		}
		return c.out.line(text)
	default:
		return c.out.one(issuedKey{k, secret})
	}
}

// issued prints a key whose secret is in a file.
func (c *call) issued(s *secretSink, k key) error {
	if c.out.format != formatTable {
		return c.out.one(k)
	}
	_ = writeFields(c.out.stderr, k.whole())
	c.note("The secret is in %s, and is not shown again.", s.file.Name())
	return nil
}

// save writes the secret to the disk.
func (s *secretSink) save(text string) error {
	_, err := s.file.WriteString(text + "\n")
	err = errors.Join(err, s.file.Sync(), s.file.Close())
	if err != nil {
		return errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	s.saved = true
	syncDir(filepath.Dir(s.file.Name()))
	return nil
}

// syncDir makes the name of a new file durable, on systems that can sync a directory.
func syncDir(dir string) {
	if d, err := os.Open(dir); err == nil {
		_ = d.Sync()
		d.Close()
	}
}
