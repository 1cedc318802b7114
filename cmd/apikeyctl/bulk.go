package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func revokeAllCommand() *cli.Command {
	return &cli.Command{
		Name: "revoke-all", Category: groupMany,
		Usage: "end all keys that a filter selects, for good, and end their streams",
		Description: "On a terminal, revoke-all shows how many keys of which owners it would " +
			"revoke, and asks for the number. Without a terminal, give --yes and --expect" +
			" N: if the filter selects more than N keys, none is revoked. After a " +
			"failure, run the same command again for the rest.",
		UsageText: `apikeyctl revoke-all --owner acme --reason "contract ended"`,
		Flags: append(filterFlags(),
			&cli.BoolFlag{Name: "all", Usage: "select every key, without a filter"},
			reasonFlag(),
			&cli.StringFlag{Name: "expect", Usage: "revoke nothing if more than `N` keys are selected"},
		),
		Action: withServer(revokeAll),
	}
}

func revokeAll(ctx context.Context, c *call) (err error) {
	request, err := c.batch()
	if err != nil {
		return err
	}
	ask := c.canAsk() && !c.Bool("yes")
	if !c.Bool("dry-run") && !c.canAsk() && (!c.Bool("yes") || request.Expected == nil) {
		return usage("there is no terminal to ask for the number of keys: give --yes and --expect N; " +
			"--dry-run shows the keys")
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	if c.Bool("dry-run") {
		return c.preview(ctx, request)
	}
	if ask || request.Expected == nil {
		s, err := c.selection(ctx, request)
		if err != nil {
			return err
		}
		if s.keys == 0 {
			return c.noneSelected()
		}
		if ask {
			if err := c.askNumber(ctx, s.question(), s.keys); err != nil {
				return err
			}
		}
		request.Expected = &s.keys
	}
	return c.revokeBatch(ctx, request)
}

// batch returns the request that the flags describe.
func (c *call) batch() (*adminpb.BatchRevokeKeysRequest, error) {
	if err := c.noArgs(); err != nil {
		return nil, err
	}
	filter, filtered, err := c.filter()
	switch all := c.Bool("all"); {
	case err != nil:
		return nil, err
	case all && filtered:
		return nil, usage("--all and a filter contradict each other: give one of them")
	case !all && !filtered:
		return nil, usage("no key is selected: give a filter such as --owner, or --all for every key")
	}
	reason, err := c.reason()
	if err != nil {
		return nil, err
	}
	request := &adminpb.BatchRevokeKeysRequest{Filter: filter, All: c.Bool("all"), Reason: reason}
	if text := c.String("expect"); text != "" {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || n < 0 {
			return nil, usage("--expect cannot be used: write the number of keys")
		}
		request.Expected = &n
	}
	return request, nil
}

func (c *call) noneSelected() error {
	out := c.out.list()
	if c.out.format == formatTable {
		c.note("no key is selected")
	}
	return out.close()
}

// batchOf calls f for each response of a batch.
func (c *call) batchOf(
	ctx context.Context, request *adminpb.BatchRevokeKeysRequest,
	f func(*adminpb.BatchRevokeKeysResponse) error,
) error {
	stream, err := c.keys.BatchRevokeKeys(ctx, request)
	if err != nil {
		return c.failed(ctx, err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.failed(ctx, err)
		}
		if err := f(r); err != nil {
			return err
		}
	}
}

// preview prints the keys that a batch would revoke.
func (c *call) preview(ctx context.Context, request *adminpb.BatchRevokeKeysRequest) error {
	request.ValidateOnly = true
	out := c.out.list()
	err := c.batchOf(ctx, request, func(r *adminpb.BatchRevokeKeysResponse) error {
		return out.addBatch(r.Keys)
	})
	err = errors.Join(err, out.close())
	if err == nil {
		c.note("%s would be revoked; none was, because of --dry-run", plural(out.n, "key"))
	}
	return err
}

// A selection is what a batch would revoke.
type selection struct {
	keys   int64
	owners map[string]int
}

func (c *call) selection(
	ctx context.Context, request *adminpb.BatchRevokeKeysRequest,
) (*selection, error) {
	s := &selection{owners: make(map[string]int)}
	request.ValidateOnly = true
	defer func() { request.ValidateOnly = false }()
	err := c.batchOf(ctx, request, func(r *adminpb.BatchRevokeKeysResponse) error {
		s.keys = r.Done
		for _, k := range r.Keys {
			s.owners[k.Owner]++
		}
		return nil
	})
	return s, err
}

// maxOwners is how many owners a question names.
const maxOwners = 5

// question says what a batch would revoke: the number of keys, and the owners with the most keys.
func (s *selection) question() string {
	type count struct {
		owner string
		n     int
	}
	var counts []count
	for owner, n := range s.owners {
		counts = append(counts, count{owner, n})
	}
	slices.SortFunc(counts, func(a, b count) int {
		return cmp.Or(cmp.Compare(b.n, a.n), cmp.Compare(a.owner, b.owner))
	})
	var parts []string
	for i, c := range counts {
		if i == maxOwners {
			parts = append(parts, fmt.Sprintf("%d more", len(counts)-maxOwners))
			break
		}
		if c.owner == "" {
			c.owner = "no owner"
		}
		parts = append(parts, fmt.Sprintf("%s: %d", c.owner, c.n))
	}
	return fmt.Sprintf("This revokes %s of %s for good (%s), and ends their streams.",
		plural(s.keys, "key"), plural(len(counts), "owner"), strings.Join(parts, ", "))
}

// revokeBatch revokes the keys of a batch, and prints each key in the formats for programs.
func (c *call) revokeBatch(ctx context.Context, request *adminpb.BatchRevokeKeysRequest) error {
	out := c.out.list()
	bar := c.progress("revoked", false)
	var revoked, total int64
	c.left = "no key was revoked"
	err := c.batchOf(ctx, request, func(r *adminpb.BatchRevokeKeysResponse) error {
		revoked, total = r.Done, r.Total
		c.left = fmt.Sprintf("%d of %s were revoked: run the same command again for the rest",
			revoked, plural(total, "key"))
		bar.at(revoked, total)
		if c.out.format == formatTable {
			return nil
		}
		return out.addBatch(r.Keys)
	})
	bar.end()
	if err != nil {
		if f := failureOf(err); revoked > 0 && !strings.Contains(f.message, c.left) {
			f.message += ". " + upperFirst(c.left)
		}
		return errors.Join(err, out.close())
	}
	if c.out.format == formatTable {
		return c.out.line("revoked " + plural(revoked, "key"))
	}
	return out.close()
}

func purgeCommand() *cli.Command {
	return &cli.Command{
		Name: "purge", Category: groupMany,
		Usage: "remove keys that were revoked or have expired; their events remain",
		Description: "On a terminal, purge shows how many keys it would remove, and asks for the " +
			"number. Without a terminal, give --yes.",
		UsageText: "apikeyctl purge --before 365d",
		Flags: []cli.Flag{&cli.StringFlag{Name: "before",
			Usage: "remove keys that were revoked or had expired before `TIME`, such as 365d"}},
		Action: withServer(purge),
	}
}

// A purged is the result of a purge.
type purged struct {
	Purged int64 `json:"purged"`
	DryRun bool  `json:"dry_run"`
}

func (p purged) ident() string  { return strconv.FormatInt(p.Purged, 10) }
func (p purged) row() []field   { return []field{{"PURGED", p.ident()}} }
func (p purged) whole() []field { return p.row() }

func purge(ctx context.Context, c *call) (err error) {
	if err := c.noArgs(); err != nil {
		return err
	}
	before, err := c.timeFlag("before", back)
	switch {
	case err != nil:
		return err
	case before == nil:
		return usage("there is no time: give --before, such as --before 365d")
	case before.After(time.Now()):
		return usage("--before is in the future: give a time in the past, such as 365d")
	}
	dry := c.Bool("dry-run")
	ask := !dry && !c.Bool("yes")
	if ask && !c.canAsk() {
		return usage("there is no terminal to ask for the number of keys: give --yes; --dry-run " +
			"counts the keys")
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	request := &adminpb.PurgeKeysRequest{Before: timeProto(before), ValidateOnly: dry || ask}
	r, err := c.store.PurgeKeys(ctx, request)
	if err != nil {
		return c.failed(ctx, err)
	}
	if dry {
		return c.out.said(purged{r.Purged, true}, plural(r.Purged, "key")+
			" would be removed; none was, because of --dry-run")
	}
	if ask && r.Purged > 0 {
		question := fmt.Sprintf("This removes %s for good.", plural(r.Purged, "key"))
		if err := c.askNumber(ctx, question, r.Purged); err != nil {
			return err
		}
		request.ValidateOnly = false
		c.left = "some keys may be removed: run the same command again for the rest"
		if r, err = c.store.PurgeKeys(ctx, request); err != nil {
			return c.failed(ctx, err)
		}
	}
	return c.out.said(purged{r.Purged, false}, "removed "+plural(r.Purged, "key"))
}
