package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// Credits are the credits of a key as apikeyctl prints them.
type credits struct {
	Remaining int64   `json:"remaining"`
	Refill    *refill `json:"refill"`
}

// One of the fields other than Amount is set.
type refill struct {
	Amount   int64   `json:"amount"`
	Every    float64 `json:"every_seconds,omitzero"`
	Daily    bool    `json:"daily,omitzero"`
	MonthDay int32   `json:"month_day,omitzero"`
}

func creditsOf(m *adminpb.Credits) *credits {
	if m == nil {
		return nil
	}
	c := &credits{Remaining: m.Remaining}
	if r := m.Refill; r != nil {
		c.Refill = &refill{r.Amount, r.GetEvery().AsDuration().Seconds(), r.GetDaily(),
			r.GetMonthDay()}
	}
	return c
}

// String returns the credits with the refill: 950, refill 1000/month:31.
func (c *credits) String() string {
	if c == nil {
		return ""
	}
	text := strconv.FormatInt(c.Remaining, 10)
	if c.Refill != nil {
		text += ", refill " + c.Refill.String()
	}
	return text
}

// String returns the refill as --refill takes it: 1000/month:31.
func (r *refill) String() string {
	switch {
	case r == nil:
		return ""
	case r.Daily:
		return fmt.Sprintf("%d/day", r.Amount)
	case r.MonthDay != 0:
		return fmt.Sprintf("%d/month:%d", r.Amount, r.MonthDay)
	default:
		return fmt.Sprintf("%d/%v", r.Amount, time.Duration(r.Every*float64(time.Second)))
	}
}

// refillFlag belongs to the flag with the credits that remain now.
func refillFlag(credits string) cli.Flag {
	return &cli.StringFlag{Name: "refill", Usage: "with --" + credits + ": set the credits anew by " +
		"`REFILL`: 1000/day and 1000/month at 00:00 UTC, 1000/month:31 on another day than the " +
		"first, 1000/36h each 36 hours"}
}

// creditsFlag returns the credits of a flag and of --refill, or nil if neither is given.
func (c *call) creditsFlag(flag string) (*adminpb.Credits, error) {
	if !c.IsSet(flag) {
		if c.IsSet("refill") {
			return nil, usage("--refill needs --%s, the credits that remain until then", flag)
		}
		return nil, nil
	}
	n, err := strconv.ParseInt(c.String(flag), 10, 64)
	if err != nil || n < 0 {
		return nil, usage("--%s cannot be used: write a number from 0 on", flag)
	}
	m := &adminpb.Credits{Remaining: n}
	if c.IsSet("refill") {
		m.Refill, err = parseRefill(c.String("refill"))
	}
	return m, err
}

// parseRefill reads 1000/day, 1000/month, 1000/month:31 or 1000/36h.
func parseRefill(text string) (*adminpb.Refill, error) {
	wrong := usage("--refill cannot be used: write 1000/day, 1000/month, 1000/month:31 or 1000/36h")
	number, when, ok := strings.Cut(text, "/")
	amount, err := strconv.ParseInt(number, 10, 64)
	if !ok || err != nil || amount < 1 {
		return nil, wrong
	}
	r := &adminpb.Refill{Amount: amount}
	month, day, hasDay := strings.Cut(when, ":")
	switch {
	case when == "day":
		r.When = &adminpb.Refill_Daily{Daily: true}
	case month == "month":
		if !hasDay {
			day = "1"
		}
		n, err := strconv.ParseInt(day, 10, 32)
		if err != nil || n < 1 || n > 31 {
			return nil, wrong
		}
		r.When = &adminpb.Refill_MonthDay{MonthDay: int32(n)}
	default:
		every, err := parseSpan(when)
		if err != nil {
			return nil, wrong
		}
		r.When = &adminpb.Refill_Every{Every: durationpb.New(every)}
	}
	return r, nil
}

func creditsCommand() *cli.Command {
	return &cli.Command{
		Name: "credits", Category: groupKeys, ArgsUsage: "ID",
		Usage: "print how often a key may still be used, or change it",
		Description: "Without a flag, the command changes nothing. A key without credits is not " +
			"limited. --set replaces the credits that remained, and the refill: without --refill, the " +
			"credits are not set anew.",
		UsageText: "apikeyctl credits 01k9x3v7q2f8hr6m5w0c4tzbnd --set 1000 --refill 1000/month",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "set", Usage: "let `N` credits remain"},
			refillFlag("set"),
			&cli.StringFlag{Name: "add",
				Usage: "add `N` credits to those that remain; -N takes N away"},
			&cli.BoolFlag{Name: "unlimited", Usage: "do not limit the use of the key any more"},
			etagFlag(),
		},
		Action: withServer(changeCredits),
	}
}

func changeCredits(ctx context.Context, c *call) (err error) {
	name, err := c.keyArg()
	if err != nil {
		return err
	}
	set, err := c.creditsFlag("set")
	if err != nil {
		return err
	}
	changes := 0
	for _, flag := range []string{"set", "add", "unlimited"} {
		if c.IsSet(flag) {
			changes++
		}
	}
	if changes > 1 {
		return usage("give one of --set, --add and --unlimited")
	}
	var add int64
	if c.IsSet("add") {
		if add, err = strconv.ParseInt(c.String("add"), 10, 64); err != nil {
			return usage("--add cannot be used: write a number, such as 500 or -500")
		}
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	if changes == 0 || c.Bool("dry-run") {
		r, err := c.keys.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
		if err != nil {
			return c.failed(ctx, err)
		}
		if changes > 0 {
			return c.wouldBe(keyOf(r.Key), "changed")
		}
		if r.Key.GetCredits() == nil {
			c.note("the use of the key is not limited")
		}
		return c.out.one(keyOf(r.Key))
	}
	var key *adminpb.Key
	if c.IsSet("add") {
		c.left = "the credits may have been added: look before you add them again"
		var r *adminpb.AddCreditsResponse
		r, err = c.keys.AddCredits(ctx, &adminpb.AddCreditsRequest{Name: name, Add: add,
			Etag: c.String("etag"), RequestId: uuid.NewString()})
		key = r.GetKey()
	} else {
		request := &adminpb.SetCreditsRequest{Name: name, Etag: c.String("etag")}
		request.Limit = &adminpb.SetCreditsRequest_Unlimited{Unlimited: true}
		if set != nil {
			request.Limit = &adminpb.SetCreditsRequest_Credits{Credits: set}
		}
		c.left = "the credits may have been set: look before you set them again"
		var r *adminpb.SetCreditsResponse
		r, err = c.keys.SetCredits(ctx, request)
		key = r.GetKey()
	}
	if err != nil {
		return c.failed(ctx, err)
	}
	return c.out.one(keyOf(key))
}
