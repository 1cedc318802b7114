package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v3"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

func reasonFlag() cli.Flag {
	return &cli.StringFlag{Name: "reason", Usage: "the `REASON`, for the audit"}
}

// reason returns the reason, which has to be given.
func (c *call) reason() (string, error) {
	reason := c.String("reason")
	if strings.TrimSpace(reason) == "" {
		return "", usage("there is no reason: give --reason, so that others know later")
	}
	return reason, nil
}

func disableCommand() *cli.Command {
	return &cli.Command{
		Name: "disable", Category: groupKeys, ArgsUsage: "ID...",
		Usage:       "refuse keys until enable, and end their streams",
		Description: "The streams have ended when the command ends.",
		UsageText:   `apikeyctl disable 01k9x3v7q2f8hr6m5w0c4tzbnd --reason "invoice 4711"`,
		Flags:       []cli.Flag{reasonFlag()},
		Action: withServer(func(ctx context.Context, c *call) error {
			reason, err := c.reason()
			if err != nil {
				return err
			}
			return c.each(ctx, "disabled", func(name string) (*adminpb.Key, int32, error) {
				r, err := c.keys.DisableKey(ctx,
					&adminpb.DisableKeyRequest{Name: name, Reason: reason})
				return r.GetKey(), r.GetEndedStreams(), err
			})
		}),
	}
}

func enableCommand() *cli.Command {
	return &cli.Command{
		Name: "enable", Category: groupKeys, ArgsUsage: "ID...",
		Usage:     "admit disabled keys again",
		UsageText: "apikeyctl enable 01k9x3v7q2f8hr6m5w0c4tzbnd",
		Action: withServer(func(ctx context.Context, c *call) error {
			return c.each(ctx, "enabled", func(name string) (*adminpb.Key, int32, error) {
				r, err := c.keys.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: name})
				return r.GetKey(), 0, err
			})
		}),
	}
}

func revokeCommand() *cli.Command {
	return &cli.Command{
		Name: "revoke", Category: groupKeys, ArgsUsage: "ID...",
		Usage: "end keys for good, and end their streams",
		Description: "The streams have ended when the command ends. Nothing revives a revoked key." +
			" To revoke a revoked key is no error.",
		UsageText: "apikeyctl revoke 01k9x3v7q2f8hr6m5w0c4tzbnd --reason leaked",
		Flags:     []cli.Flag{reasonFlag()},
		Action: withServer(func(ctx context.Context, c *call) error {
			reason, err := c.reason()
			if err != nil {
				return err
			}
			return c.each(ctx, "revoked", func(name string) (*adminpb.Key, int32, error) {
				r, err := c.keys.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name, Reason: reason})
				return r.GetKey(), r.GetEndedStreams(), err
			})
		}),
	}
}

// A stoppedKey is a key after a change that may have ended streams.
type stoppedKey struct {
	key
	EndedStreams int32 `json:"ended_streams"`
}

// each makes a change of each key that the arguments name, and prints what was done. If one key
// fails, each continues with the others, and returns the first failure. done is the participle of
// the change.
func (c *call) each(
	ctx context.Context, done string, change func(name string) (*adminpb.Key, int32, error),
) (err error) {
	names, err := c.keyArgs()
	if err != nil {
		return err
	}
	close, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer close(&err)
	if c.Bool("dry-run") {
		c.note("no key was %s, because of --dry-run", done)
		change = func(name string) (*adminpb.Key, int32, error) {
			r, err := c.keys.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
			return r.GetKey(), 0, err
		}
	}
	out := c.out.list()
	var first error
	for i, name := range names {
		c.left = fmt.Sprintf("%d of %d keys are %s: run the same command again, which is "+
			"safe", i, len(names), done)
		m, ended, err := change(name)
		if err = c.failed(ctx, err); err == nil {
			err = out.addSaid(c.stopped(m, ended, done))
			if err != nil {
				return err
			}
			continue
		}
		if first != nil {
			failureOf(err).report(c.out.stderr, c.out.format)
		} else {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(first, out.close())
}

// stopped returns the record of a changed key, and the sentence about the key.
func (c *call) stopped(m *adminpb.Key, ended int32, done string) (record, string) {
	k := stoppedKey{keyOf(m), ended}
	streams := plural(ended, "stream") + " ended"
	if c.Bool("dry-run") {
		done, streams = "not "+done, plural(k.LiveStreams, "stream")+" would end"
	}
	if done == "enabled" || done == "not enabled" {
		return k, fmt.Sprintf("%s %s", done, k.label())
	}
	return k, fmt.Sprintf("%s %s: %s", done, k.label(), streams)
}
