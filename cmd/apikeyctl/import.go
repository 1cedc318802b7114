package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

func importCommand() *cli.Command {
	return &cli.Command{
		Name: "import", Category: groupStore, ArgsUsage: "FILE|-",
		Usage: "add the keys of another system to the store, so that their tokens work",
		Description: "The file is an export of the system, as csv or with a JSON object on each " +
			"line. The command opens the directory of --dir, which no server may have open. To import " +
			"without a stop of the server, or into etcd or PostgreSQL, let the server call " +
			"Store.Import. A row whose key was imported before changes nothing: run the command again " +
			"after an error, or for the keys that were added since. The server needs the formats of " +
			"the system in Options.Legacy. --dry-run counts, and changes nothing. - means stdin.",
		UsageText: "apikeyctl import --from sanctum tokens.csv --dir /var/lib/orders/keys",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "from", Usage: "the `SYSTEM` of the export: " + systemNames()},
			&cli.BoolFlag{Name: "allow-weak",
				Usage: "import tokens of fewer than 20 characters too"},
			&cli.BoolFlag{Name: "ignore-credits",
				Usage: "import keys with a limited number of uses, without the limit"},
		},
		Action: withServer(importKeys),
	}
}

func systemNames() string {
	var names []string
	for _, s := range importer.Systems() {
		names = append(names, s.Name())
	}
	return either(names)
}

// either returns words as in a, b or c.
func either(words []string) string {
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// An imported is the result of an import.
type imported struct {
	Rows      int            `json:"rows"`
	Imported  int            `json:"imported"`
	Unchanged int            `json:"unchanged"`
	Refused   int            `json:"refused"`
	Slow      int            `json:"slow_digests"`
	Metered   int            `json:"with_credits"`
	Problems  map[string]int `json:"problems"`
}

func (i imported) ident() string  { return strconv.Itoa(i.Imported) }
func (i imported) row() []field   { return []field{{"IMPORTED", strconv.Itoa(i.Imported)}} }
func (i imported) whole() []field { return i.row() }

func importKeys(ctx context.Context, c *call) (err error) {
	arg, err := c.oneArg("a file or -")
	if err != nil {
		return err
	}
	from := c.String("from")
	if from == "" {
		return usage("it is not known where the file is from: give --from with %s", systemNames())
	}
	system, ok := importer.Named(from)
	if !ok {
		return usage("--from names no system that is known: write %s", systemNames())
	}
	if c.place.dir == "" {
		return usage("import opens the directory of a store itself: stop the server, and give --dir. " +
			"To import without a stop, or into etcd or PostgreSQL, let the server call Store.Import: " +
			"see the guide examples/guides/import.md")
	}
	in := io.Reader(os.Stdin)
	if arg != "-" {
		file, err := os.Open(arg)
		if err != nil {
			return usage("%v: name an export", err)
		}
		defer file.Close()
		in = file
	}
	store, done, err := c.openForImport(system)
	if err != nil {
		return err
	}
	defer done(&err)
	c.left = "some keys may be imported: run the same command again, which is safe"
	bar := c.progress("read", false)
	defer bar.end()
	var problems problemList
	result, err := store.Import(keystore.WithActor(ctx, localUser()),
		system.Read(in, &importer.Options{IgnoreCredits: c.Bool("ignore-credits")}),
		&keystore.ImportOptions{
			DryRun: c.Bool("dry-run"), AllowWeak: c.Bool("allow-weak"), Problem: problems.add,
			Progress: func(rows int) { bar.at(int64(rows), 0) },
		})
	bar.end()
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return interrupted(c.left)
	case errors.Is(err, keystore.ErrUnavailable), errors.Is(err, keystore.ErrCorrupt):
		return &failure{exitServer, codes.Unavailable, "IMPORT_FAILED", textOf(err) + ": " + c.left}
	case result.Rows == 0:
		return local("cannot read the export: %v", textOf(err))
	default:
		return local("cannot read the export: %v: %s", textOf(err), c.left)
	}
	problems.print(c)
	return c.sayImported(result, &problems)
}

// sayImported prints what an import has done. If rows were refused, sayImported returns a failure.
func (c *call) sayImported(result keystore.ImportResult, problems *problemList) error {
	if result.Slow > 0 {
		c.note("%s have a slow digest: the first use of each may take more than a second, and one runs "+
			"at a time", plural(result.Slow, "key"))
	}
	if result.Metered > 0 {
		c.note("%s with credits: what is used in the other system from the export on is not counted",
			plural(result.Metered, "key"))
	}
	verb := "imported"
	if c.Bool("dry-run") {
		verb = "would import"
	}
	err := c.out.said(imported{result.Rows, result.Imported, result.Unchanged, result.Refused,
		result.Slow, result.Metered, result.Problems}, fmt.Sprintf(
		"%s %s of %s, %d were there before, %d refused%s",
		verb, plural(result.Imported, "key"), plural(result.Rows, "row"), result.Unchanged,
		result.Refused, problems.counts()))
	if err == nil && result.Refused > 0 {
		return &failure{exitUsage, codes.InvalidArgument, "ROWS_REFUSED", fmt.Sprintf(
			"%s not imported: correct the export, or give the clients of these rows new keys, and run "+
				"the same command again", plural(result.Refused, "row"))}
	}
	return err
}

// openForImport opens the store. A dry run does not make a store: if the directory has no store,
// the run uses a store in a directory for temporary files.
func (c *call) openForImport(
	system importer.System,
) (store *keystore.Store, done func(*error), err error) {
	current, err := hasherOf(c.peppers())
	if err != nil {
		return nil, nil, err
	}
	hasher, err := hashing.Keyring(current, hashing.SHA256(), hashing.SHA512(),
		hashing.PBKDF2SHA256(), sha2cryptForm{})
	if err != nil {
		return nil, nil, local("%v", err)
	}
	dir, temp := c.place.dir, ""
	if entries, _ := os.ReadDir(dir); c.Bool("dry-run") && len(entries) == 0 {
		if temp, err = os.MkdirTemp("", "apikeyctl-"); err != nil {
			return nil, nil, local("%v: set TMPDIR to a directory that you can write to", err)
		}
		dir = temp
	}
	store, err = c.openStore(dir, &keystore.Options{Hasher: hasher, Legacy: system.Formats()})
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(temp))
	}
	return store, func(err *error) {
		failed := store.Close()
		if temp != "" {
			failed = errors.Join(failed, os.RemoveAll(temp))
		}
		if *err == nil && failed != nil {
			*err = local("%v: look at the store with apikeyctl check", failed)
		}
	}, nil
}

// sha2cryptForm takes the place of the hasher of the module hashing/sha2crypt, which this program
// does not link. The type knows the form of a digest, so that digests can be imported,
// and matches nothing.
type sha2cryptForm struct{}

func (sha2cryptForm) Slow() bool { return true }

func (sha2cryptForm) Digest(string) hashing.Digest {
	return hashing.Digest{Scheme: "sha2-crypt", Sum: []byte("$")}
}

func (sha2cryptForm) Match(hashing.Digest, string) hashing.Result { return hashing.Mismatch }

// WellFormed checks less than the hasher does: the import has no other check of this form.
func (sha2cryptForm) WellFormed(sum []byte) bool {
	parts := strings.Split(string(sum), "$")
	if len(parts) == 5 && strings.HasPrefix(parts[2], "rounds=") {
		n, err := strconv.Atoi(parts[2][len("rounds="):])
		if err != nil || n < 1000 || n > 5_000_000 {
			return false
		}
		parts = slices.Delete(parts, 2, 3)
	}
	return len(parts) == 4 && parts[0] == "" && len(parts[2]) <= 16 &&
		(parts[1] == "5" && len(parts[3]) == 43 || parts[1] == "6" && len(parts[3]) == 86)
}

// localUser is the actor of a change that this program itself makes, as package admin names the
// user of a socket.
func localUser() string {
	if u, err := user.Current(); err == nil {
		return fmt.Sprintf("unix:%.128s(%s)", u.Username, u.Uid)
	}
	return fmt.Sprintf("unix:%d", os.Getuid())
}

// A problemList has the problems of an import: the first few of each reason, and the numbers.
type problemList struct {
	shown map[string][]string
	all   map[string]int
}

const shownProblems = 10

func (l *problemList) add(p *keystore.ImportProblem) {
	if l.all == nil {
		l.all, l.shown = make(map[string]int), make(map[string][]string)
	}
	l.all[p.Reason]++
	if len(l.shown[p.Reason]) < shownProblems {
		l.shown[p.Reason] = append(l.shown[p.Reason], p.Error())
	}
}

func (l *problemList) print(c *call) {
	for _, reason := range slices.Sorted(maps.Keys(l.all)) {
		for _, text := range l.shown[reason] {
			c.note("%s", text)
		}
		if more := l.all[reason] - len(l.shown[reason]); more > 0 {
			c.note("and %s with the problem %s", plural(more, "more row"), reason)
		}
	}
}

// counts returns the numbers by reason, in brackets.
func (l *problemList) counts() string {
	var parts []string
	for _, reason := range slices.Sorted(maps.Keys(l.all)) {
		parts = append(parts, fmt.Sprintf("%d %s", l.all[reason], reason))
	}
	if parts == nil {
		return ""
	}
	return " (" + strings.Join(parts, ", ") + ")"
}
