package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func backupCommand() *cli.Command {
	return &cli.Command{
		Name: "backup", Category: groupStore, ArgsUsage: "FILE|-",
		Usage: "write a backup of all keys to a new file",
		Description: "A backup has the digests of the secrets, and no events. The file appears " +
			"under its name when it is complete. - means stdout.",
		UsageText: "apikeyctl backup keys-2026-12-01.backup",
		Action:    withServer(backup),
	}
}

func restoreCommand() *cli.Command {
	return &cli.Command{
		Name: restoreName, Category: groupStore, ArgsUsage: "FILE|-",
		Usage: "add the keys of a backup to the store",
		Description: "A key that is revoked or purged in the store remains so. The backup does not" +
			" know what was revoked after it was made. On a terminal, restore asks first. Without a " +
			"terminal, and with - for stdin, give --yes.",
		UsageText: "apikeyctl restore keys-2026-12-01.backup",
		Action:    withServer(restore),
	}
}

func exportCommand() *cli.Command {
	return &cli.Command{
		Name: "export", Category: groupStore, ArgsUsage: "FILE|-",
		Usage: "write all keys as csv or jsonl to a new file, without digests",
		Description: "The end of the name, .csv or .jsonl, is the format. - means stdout, as jsonl" +
			" unless --format says otherwise. A key in jsonl is as list -o jsonl prints " +
			"it; csv has no metadata. In csv, a text that begins with = + - @ ' or a tab has an " +
			"apostrophe before it, so that no spreadsheet takes the text for a formula: a program " +
			"removes the apostrophe that begins a cell, or reads jsonl.",
		UsageText: "apikeyctl export keys.csv --owner acme",
		Flags: append(filterFlags(),
			&cli.StringFlag{Name: "format", Usage: "write `FORMAT`: csv or jsonl"}),
		Action: withServer(export),
	}
}

// A written is the result of a backup, of an export or of a restore.
type written struct {
	File  string `json:"file"`
	Bytes int64  `json:"bytes,omitempty"`
	Keys  int    `json:"keys,omitempty"`
}

func (w written) ident() string { return w.File }
func (w written) row() []field {
	return []field{{"FILE", w.File}, {"BYTES", strconv.FormatInt(w.Bytes, 10)}}
}
func (w written) whole() []field { return w.row() }

// A target is the file that a command writes, or stdout.
type target struct {
	w    io.Writer
	file *os.File // nil: w is stdout
	path string
	size int64 // in bytes, so far

	committed bool
}

// createTarget opens the file of an argument. The file has another name until commit.
func (c *call) createTarget(arg string) (*target, error) {
	if arg == "-" {
		if isTerminal(c.out.stdout) {
			return nil, usage("stdout is a terminal: name a file, or send stdout into a file or a program")
		}
		return &target{w: c.out.stdout, path: arg}, nil
	}
	if _, err := os.Lstat(arg); err == nil {
		return nil, usage("%s exists, and is not replaced: name a new file", arg)
	}
	file, err := os.CreateTemp(filepath.Dir(arg), "."+filepath.Base(arg)+"-") // has mode 0600
	if err != nil {
		return nil, usage("%v: name a new file in a directory that you can write to", err)
	}
	return &target{w: file, file: file, path: arg}, nil
}

func (t *target) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	t.size += int64(n)
	switch {
	case err == nil:
		return n, nil
	case t.file == nil:
		return n, writeFailed(err)
	default:
		return n, local("cannot write the file: %v", err)
	}
}

// commit gives the file its name.
func (t *target) commit() error {
	if t.file == nil {
		return nil
	}
	err := errors.Join(t.file.Sync(), t.file.Close())
	if err == nil {
		err = os.Rename(t.file.Name(), t.path)
	}
	if err != nil {
		return local("cannot write the file: %v", err)
	}
	t.committed = true
	syncDir(filepath.Dir(t.path))
	return nil
}

// drop removes the file of a target that was not committed.
func (t *target) drop() {
	if t.file != nil && !t.committed {
		t.file.Close()
		_ = os.Remove(t.file.Name())
	}
}

// wrote prints the result of a command that has written a target: to stderr if stdout has the data.
func (c *call) wrote(t *target, w written, amount string) error {
	if t.file == nil {
		c.note("wrote %s to stdout", amount)
		return nil
	}
	return c.out.said(w, fmt.Sprintf("wrote %s to %s", amount, w.File))
}

func backup(ctx context.Context, c *call) (err error) {
	arg, err := c.oneArg("a file or -")
	if err != nil {
		return err
	}
	t, err := c.createTarget(arg)
	if err != nil {
		return err
	}
	defer t.drop()
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	c.left = "there is no backup: run the same command again"
	stream, err := c.store.Backup(ctx, new(adminpb.BackupRequest))
	if err != nil {
		return c.failed(ctx, err)
	}
	bar := c.progress("written", true)
	defer bar.end()
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return c.failed(ctx, err)
		}
		if _, err := t.Write(r.Data); err != nil {
			return err
		}
		bar.at(t.size, 0)
	}
	bar.end()
	if err := t.commit(); err != nil {
		return err
	}
	return c.wrote(t, written{File: arg, Bytes: t.size}, sizeText(t.size))
}

func restore(ctx context.Context, c *call) (err error) {
	arg, err := c.oneArg("a file or -")
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		return usage("restore has no --dry-run: restore into a new directory with --dir, and look there")
	}
	var in io.Reader = os.Stdin
	size := int64(0)
	if arg != "-" {
		file, err := os.Open(arg)
		if err != nil {
			return usage("%v: name a backup", err)
		}
		defer file.Close()
		if info, err := file.Stat(); err == nil {
			size = info.Size()
		}
		in = file
	}
	if ask := !c.Bool("yes"); ask && (arg == "-" || !c.canAsk()) {
		return usage("there is no terminal to ask whether to restore: give --yes")
	} else if ask {
		question := fmt.Sprintf("This adds the keys of %s to %s. What was revoked after the backup "+
			"was made, and is unknown there, is admitted again.", arg, c.place)
		if err := c.ask(ctx, question, "restore"); err != nil {
			return err
		}
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	c.left = "some keys may be restored: run the same command again, which is safe"
	n, err := c.send(ctx, in, size)
	if err != nil {
		f := failureOf(err)
		if arg != "-" && (f.code == codes.InvalidArgument || f.reason == "BACKUP_CORRUPT") {
			f.message = arg + " cannot be restored: " + f.message
		}
		return err
	}
	return c.out.said(written{File: arg, Bytes: n}, fmt.Sprintf("restored %s", arg))
}

// partSize is the size of the parts of a backup, in bytes.
const partSize = 64 << 10

// send sends a backup to the server, and returns its size after the server has restored the backup.
func (c *call) send(ctx context.Context, in io.Reader, size int64) (n int64, err error) {
	stream, err := c.store.Restore(ctx)
	if err != nil {
		return 0, c.failed(ctx, err)
	}
	bar := c.progress("sent", true)
	defer bar.end()
	for part := make([]byte, partSize); ; {
		read, err := io.ReadFull(in, part)
		if read > 0 {
			if stream.Send(&adminpb.RestoreRequest{Data: part[:read]}) != nil {
				break // CloseAndRecv has the error
			}
			n += int64(read)
			bar.at(n, size)
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return n, local("cannot read the backup: %v", err)
		}
	}
	_, err = stream.CloseAndRecv()
	return n, c.failed(ctx, err)
}

func export(ctx context.Context, c *call) (err error) {
	arg, err := c.oneArg("a file or -")
	if err != nil {
		return err
	}
	filter, _, err := c.filter()
	if err != nil {
		return err
	}
	format := c.String("format")
	if format == "" {
		format = strings.TrimPrefix(filepath.Ext(arg), ".")
	}
	if arg == "-" && format == "" {
		format = formatJSONL
	}
	if format != "csv" && format != formatJSONL {
		return usage("the format of %s is not known: end the name in .csv or .jsonl, or give --format",
			arg)
	}
	t, err := c.createTarget(arg)
	if err != nil {
		return err
	}
	defer t.drop()
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	write := jsonlWriter(t)
	if format == "csv" {
		write = csvWriter(t)
	}
	bar := c.progress("written", false)
	defer bar.end()
	n, lost := 0, 0
	for m, err := range c.allKeys(ctx, &adminpb.ListKeysRequest{Filter: filter}, 0, &lost) {
		if err != nil {
			return err
		}
		k := keyOf(m)
		if err := write(&k); err != nil {
			return err
		}
		n++
		bar.at(int64(n), 0)
	}
	bar.end()
	if err := write(nil); err != nil {
		return err
	}
	if err := t.commit(); err != nil {
		return err
	}
	err = c.wrote(t, written{File: arg, Bytes: t.size, Keys: n}, plural(n, "key"))
	return errors.Join(err, damaged(lost))
}

// jsonlWriter returns a function that writes a key. Nil means the end.
func jsonlWriter(w io.Writer) func(*key) error {
	return func(k *key) error {
		if k == nil {
			return nil
		}
		text, err := encode(k, "", "")
		if err == nil {
			_, err = w.Write(append(text, '\n'))
		}
		return err
	}
}

// csvWriter returns a function that writes a key after a line of headings. Nil means the end.
func csvWriter(w io.Writer) func(*key) error {
	out := csv.NewWriter(w)
	head := false
	return func(k *key) error {
		if !head {
			head = true
			_ = out.Write([]string{"id", "name", "owner", "state", "scopes", "allowed_networks",
				"rate_limit", "start_time", "expire_time", "create_time", "last_use_time",
				"disable_time", "disable_reason", "revoke_time", "revoke_reason", "hint",
				"credits", "refill"})
		}
		if k == nil {
			out.Flush()
			return out.Error()
		}
		remaining, refill := "", ""
		if k.Credits != nil {
			remaining = strconv.FormatInt(k.Credits.Remaining, 10)
			refill = k.Credits.Refill.String()
		}
		return out.Write([]string{k.ID, csvText(k.Name), csvText(k.Owner), k.State,
			csvText(strings.Join(k.Scopes, " ")), strings.Join(k.AllowedNetworks, " "),
			k.RateLimit.String(), csvTime(k.StartTime), csvTime(k.ExpireTime), csvTime(k.CreateTime),
			csvTime(k.LastUseTime), csvTime(k.DisableTime), csvText(k.DisableReason),
			csvTime(k.RevokeTime), csvText(k.RevokeReason), k.Hint, remaining, refill})
	}
}

// csvText returns the cell for a text that people chose. A spreadsheet takes a cell that begins
// with one of the characters below for a formula, and a formula can send the other cells to a
// stranger: see "CSV Injection" of OWASP. So an apostrophe goes before the character, which the
// spreadsheet shows as text. An apostrophe goes before an apostrophe too, so a program gets every
// text back: if the cell begins with an apostrophe, the program removes the apostrophe.
func csvText(text string) string {
	if first, _ := utf8.DecodeRuneInString(text); strings.ContainsRune("=+-@\t\r\n'＝＋－＠", first) {
		return "'" + text
	}
	return text
}

func csvTime(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}
