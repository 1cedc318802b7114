package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An event is a change of a key as apikeyctl prints it.
type event struct {
	Cursor   string    `json:"cursor"`
	Time     time.Time `json:"time"`
	KeyID    string    `json:"key_id"`
	Revision int64     `json:"revision"`
	Action   string    `json:"action"`
	Actor    string    `json:"actor"`
	Reason   string    `json:"reason"`

	// For the action credits. Nil means that the use of the key is not limited.
	CreditsBefore *credits `json:"credits_before"`
	Credits       *credits `json:"credits"`
}

func eventOf(m *adminpb.Event) event {
	return event{
		Cursor:   m.GetCursor(),
		Time:     m.GetTime().AsTime(),
		KeyID:    strings.TrimPrefix(m.GetKey(), namePrefix),
		Revision: m.GetRevision(),
		Action:   m.GetAction(),
		Actor:    m.GetActor(),
		Reason:   m.GetReason(),

		CreditsBefore: creditsOf(m.GetCreditsBefore()),
		Credits:       creditsOf(m.GetCredits()),
	}
}

func (e event) ident() string { return e.Cursor }

// row has the exact time: in an audit, the order and the moment matter.
func (e event) row() []field {
	return []field{
		{"TIME", e.Time.UTC().Format(time.RFC3339)},
		{"ACTION", e.Action},
		{"KEY", e.KeyID},
		{"ACTOR", e.Actor},
		{"REASON", e.Reason},
	}
}

func (e event) whole() []field { return append(e.row(), field{"CURSOR", e.Cursor}) }

// line is the row of an event that is printed before the next event is known.
func (e event) line() string {
	return fmt.Sprintf("%s  %-7s  %s  %-16s  %s", e.Time.UTC().Format(time.RFC3339), e.Action,
		e.KeyID, printable(e.Actor), printable(e.Reason))
}

func eventsCommand() *cli.Command {
	return &cli.Command{
		Name: "events", Category: groupAudit, ArgsUsage: "[ID]",
		Usage:       "print the changes of all keys, or of one key: what, when, by whom and why",
		Description: "The ID of an event, for -q and for watch --after, is its cursor.",
		UsageText:   "apikeyctl events --since 24h --action revoke",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "since", Usage: "changes since `TIME`, such as 24h or 2026-12-01"},
			&cli.StringFlag{Name: "until", Usage: "changes before `TIME`"},
			&cli.StringFlag{Name: "actor", Usage: "changes that `ACTOR` made, such as unix:root(0)"},
			&cli.StringFlag{Name: "action", Usage: "changes of the kind `ACTION`: " + actionNames()},
			&cli.BoolFlag{Name: "newest", Usage: "begin with the last change"},
			&cli.IntFlag{Name: "limit", HideDefault: true,
				Usage: "print the first `N` changes; with --newest, the last N"},
		},
		Action: withServer(events),
	}
}

// actions are the values of --action.
var actions = []keystore.Action{
	keystore.ActionCreate, keystore.ActionUpdate, keystore.ActionRotate, keystore.ActionDisable,
	keystore.ActionEnable, keystore.ActionRevoke, keystore.ActionCredits, keystore.ActionRehash,
	keystore.ActionRestore, keystore.ActionImport, keystore.ActionPurge,
}

func actionNames() string {
	var names []string
	for _, a := range actions {
		names = append(names, string(a))
	}
	return either(names)
}

func events(ctx context.Context, c *call) (err error) {
	name, err := c.optionalKey()
	if err != nil {
		return err
	}
	since, err := c.timeFlag("since", back)
	if err != nil {
		return err
	}
	until, err := c.timeFlag("until", back)
	if err != nil {
		return err
	}
	action := c.String("action")
	if action != "" && !slices.Contains(actions, keystore.Action(action)) {
		return usage("--action cannot be used: write %s", actionNames())
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
	c.left = "the list is not complete"
	request := &adminpb.ListEventsRequest{
		Key: name, Actor: c.String("actor"), Action: action,
		StartTime: timeProto(since), EndTime: timeProto(until), NewestFirst: c.Bool("newest"),
	}
	out := c.out.list()
	lost := 0
	for {
		request.PageSize = pageSize
		if limit > 0 {
			request.PageSize = int32(min(limit-out.n, pageSize))
		}
		page, err := c.keys.ListEvents(ctx, request)
		if err != nil {
			_ = out.close()
			return c.failed(ctx, err)
		}
		for _, m := range page.Events {
			if err := out.add(eventOf(m)); err != nil {
				return err
			}
		}
		c.noteDamage(page.Damage, &lost)
		request.PageToken = page.NextPageToken
		if request.PageToken == "" || limit > 0 && out.n >= limit {
			break
		}
	}
	if err := out.close(); err != nil {
		return err
	}
	if out.n == 0 && c.out.format == formatTable {
		c.note("no change is selected")
	}
	return damaged(lost)
}

// optionalKey returns the name of the key whose ID is the only argument, or an empty name.
func (c *call) optionalKey() (string, error) {
	if !c.Args().Present() {
		return "", nil
	}
	return c.keyArg()
}

func watchCommand() *cli.Command {
	return &cli.Command{
		Name: "watch", Category: groupAudit, ArgsUsage: "[ID]",
		Usage: "print the changes of all keys, or of one key, as they are made",
		Description: "If the connection breaks, watch connects again, misses no change and repeats" +
			" none. An interrupt ends watch, and prints how to continue.",
		UsageText: "apikeyctl watch -o jsonl",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "after", Usage: "begin after the change with `CURSOR`; 0 means " +
				"with the first change", DefaultText: "now"},
		},
		Action: withServer(watch),
	}
}

func watch(ctx context.Context, c *call) (err error) {
	name, err := c.optionalKey()
	if err != nil {
		return err
	}
	if c.out.format == formatJSON {
		c.out.format = formatJSONL // an array would have no end
	}
	c.left = "no change is missed"
	w := &watcher{call: c, request: &adminpb.WatchEventsRequest{Key: name, After: c.String("after")}}
	wait := firstWait
	for {
		seen, err := w.follow(ctx)
		switch {
		case ctx.Err() != nil && w.request.After != "":
			return interrupted(fmt.Sprintf("to continue, give --after %s", w.request.After))
		case ctx.Err() != nil:
			return interrupted("no change was seen")
		case !w.connected || !isTransient(err):
			return err
		case seen:
			wait = firstWait
		}
		c.note("apikeyctl: %v. Trying again", failureOf(err))
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, 10*time.Second)
	}
}

const firstWait = 500 * time.Millisecond

// A watcher follows the changes over one connection after the other.
type watcher struct {
	*call
	request   *adminpb.WatchEventsRequest
	connected bool // there was a connection
	header    bool // the header of the table was printed
}

// follow prints changes until the connection breaks. seen says that the server has answered.
func (w *watcher) follow(ctx context.Context) (seen bool, err error) {
	done, err := w.dial(ctx)
	if err != nil {
		return false, err
	}
	defer done(&err)
	stream, err := w.keys.WatchEvents(ctx, w.request)
	if err != nil {
		return false, w.failed(ctx, err)
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return seen, w.failed(ctx, err)
		}
		seen, w.connected = true, true
		for _, m := range r.Events {
			if err := w.print(eventOf(m)); err != nil {
				return seen, err
			}
		}
		for _, sentence := range r.Damage {
			w.note("apikeyctl: %s", sentence)
		}
		w.request.After = r.Cursor
	}
}

func (w *watcher) print(e event) error {
	if w.out.format != formatTable {
		return w.out.one(e)
	}
	if !w.header {
		w.header = true
		head := fmt.Sprintf("%-20s  %-7s  %-26s  %-16s  %s", "TIME", "ACTION", "KEY", "ACTOR",
			"REASON")
		if err := w.out.line(head); err != nil {
			return err
		}
	}
	return w.out.line(e.line())
}

// isTransient reports whether the server may answer later.
func isTransient(err error) bool { return failureOf(err).code == codes.Unavailable }
