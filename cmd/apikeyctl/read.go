package main

import (
	"context"
	"iter"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func getCommand() *cli.Command {
	return &cli.Command{
		Name: "get", Category: groupKeys, ArgsUsage: "ID",
		Usage:     "print one key, without its secret",
		UsageText: "apikeyctl get 01k9x3v7q2f8hr6m5w0c4tzbnd -o json",
		Action:    withServer(get),
	}
}

func get(ctx context.Context, c *call) (err error) {
	name, err := c.keyArg()
	if err != nil {
		return err
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	r, err := c.keys.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	if err != nil {
		return c.failed(ctx, err)
	}
	return c.out.one(keyOf(r.Key))
}

// filterFlags are the flags that select keys.
func filterFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "owner", Usage: "keys of `OWNER`"},
		&cli.StringFlag{Name: "state",
			Usage: "keys in `STATE`: active, pending, expired, disabled or revoked"},
		&cli.StringFlag{Name: "scope", Usage: "keys that have `SCOPE`"},
		&cli.StringFlag{Name: "text", Usage: "keys with `TEXT` in the name, the owner or the ID"},
		&cli.StringFlag{Name: "created-before", Usage: "keys from before `TIME`, such as 365d"},
		&cli.StringFlag{Name: "expires-before",
			Usage: "keys that expire before `TIME`: 7d means within 7 days"},
		&cli.StringFlag{Name: "unused-since",
			Usage: "keys that are older than `TIME` and were not used since: 90d means for 90 days"},
	}
}

// filter returns the filter of the flags, and whether a flag is set.
func (c *call) filter() (f *adminpb.Filter, any bool, err error) {
	f = &adminpb.Filter{
		Owner: c.String("owner"), Scope: c.String("scope"), Text: c.String("text")}
	for _, flag := range filterFlags() {
		name := flag.Names()[0]
		if c.IsSet(name) && c.String(name) == "" {
			// An empty variable of a script must not select all keys.
			return nil, false, usage("--%s is empty: leave the flag out, or give a value", name)
		}
		any = any || c.IsSet(name)
	}
	if word := c.String("state"); word != "" {
		if f.State, err = stateOf(word); err != nil {
			return nil, false, err
		}
	}
	created, err := c.timeFlag("created-before", back)
	if err != nil {
		return nil, false, err
	}
	expires, err := c.timeFlag("expires-before", ahead)
	if err != nil {
		return nil, false, err
	}
	unused, err := c.timeFlag("unused-since", back)
	f.CreateTimeBefore, f.ExpireTimeBefore = timeProto(created), timeProto(expires)
	f.UnusedSince = timeProto(unused)
	return f, any, err
}

func listCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Category: groupKeys,
		Usage:     "print keys, in the order of their creation",
		UsageText: "apikeyctl list --owner acme --expires-before 7d",
		Flags: append(filterFlags(),
			&cli.BoolFlag{Name: "newest", Usage: "begin with the key that was created last"},
			&cli.IntFlag{Name: "limit", HideDefault: true, Usage: "print `N` keys at most"}),
		Action: withServer(listKeys),
	}
}

// limitFlag returns the number that --limit gives, or 0 if there is no --limit.
func (c *call) limitFlag() (int, error) {
	limit := c.Int("limit")
	if limit < 0 || c.IsSet("limit") && limit == 0 {
		return 0, usage("--limit cannot be used: write a number from 1 on")
	}
	return limit, nil
}

// pageSize is the number of keys or events in one answer of the server, at most.
const pageSize = 1000

func listKeys(ctx context.Context, c *call) (err error) {
	if err := c.noArgs(); err != nil {
		return err
	}
	filter, _, err := c.filter()
	if err != nil {
		return err
	}
	limit, err := c.limitFlag()
	if err != nil {
		return err
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	request := &adminpb.ListKeysRequest{Filter: filter, NewestFirst: c.Bool("newest")}
	out := c.out.list()
	lost := 0
	for m, err := range c.allKeys(ctx, request, limit, &lost) {
		if err != nil {
			_ = out.close() // what came before the error
			return err
		}
		if err := out.add(keyOf(m)); err != nil {
			return err
		}
	}
	if err := out.close(); err != nil {
		return err
	}
	if out.n == 0 && c.out.format == formatTable {
		c.note("no key is selected")
	}
	return damaged(lost)
}

// allKeys returns the keys of all pages of a list, at most limit if limit is not 0. lost is
// increased for each key that cannot be read.
func (c *call) allKeys(
	ctx context.Context, r *adminpb.ListKeysRequest, limit int, lost *int,
) iter.Seq2[*adminpb.Key, error] {
	return func(yield func(*adminpb.Key, error) bool) {
		c.left = "the list is not complete"
		for n := 0; ; {
			r.PageSize = pageSize
			if limit > 0 {
				r.PageSize = int32(min(limit-n, pageSize))
			}
			page, err := c.keys.ListKeys(ctx, r)
			if err != nil {
				yield(nil, c.failed(ctx, err))
				return
			}
			for _, m := range page.Keys {
				if !yield(m, nil) {
					return
				}
			}
			c.noteDamage(page.Damage, lost)
			n += len(page.Keys)
			r.PageToken = page.NextPageToken
			if r.PageToken == "" || limit > 0 && n >= limit {
				return
			}
		}
	}
}

// noteDamage prints the sentences about data that cannot be read.
func (c *call) noteDamage(sentences []string, lost *int) {
	*lost += len(sentences)
	for _, sentence := range sentences {
		c.note("apikeyctl: %s", sentence)
	}
}

// damaged returns the failure of a list that lacks something.
func damaged(lost int) error {
	if lost == 0 {
		return nil
	}
	return &failure{exitServer, codes.DataLoss, "STORE_CORRUPT",
		`some of the stored data is damaged, and the list lacks it: run "apikeyctl check"`}
}
