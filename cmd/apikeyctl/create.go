package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

const (
	createName  = "create"  // makes a store in an empty directory, and a token
	restoreName = "restore" // makes a store in an empty directory
	rotateName  = "rotate"  // makes a token
	lookupName  = "lookup"
)

func createCommand() *cli.Command {
	return &cli.Command{
		Name: createName, Category: groupKeys,
		Usage: "make a key, and print its secret once",
		Description: "The table of the key goes to stderr, and the secret alone to stdout. The " +
			"server keeps only a digest, so the secret cannot be shown again. With --dir, the options " +
			"of the server, such as MaxLifetime, do not apply, except --prefix and --pepper-file.",
		UsageText: "apikeyctl create --name ci --owner acme --scope orders:read --expires 90d",
		Flags: append(append(specFlags(),
			&cli.StringFlag{Name: "credits", Usage: "admit `N` calls altogether"},
			refillFlag("credits")), secretFlags()...),
		Action: withServer(create),
	}
}

// specFlags are the flags for the fields of a key.
func specFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "name", Usage: "the `NAME` by which people recognize the key"},
		&cli.StringFlag{Name: "owner", Usage: "the `OWNER` of the key, such as a customer"},
		&cli.StringSliceFlag{Name: "scope", Aliases: []string{"scopes"},
			Usage: "permit `SCOPE`, such as orders:read or orders:*; repeat, or separate with commas"},
		&cli.StringFlag{Name: "expires", Usage: "admit the key until `TIME`, such as 90d"},
		&cli.StringFlag{Name: "not-before", Usage: "admit the key from `TIME` on"},
		&cli.StringSliceFlag{Name: "network",
			Usage: "admit the key from `NETWORK` only, such as 192.0.2.0/24; repeat, or use commas"},
		&cli.StringFlag{Name: "rate",
			Usage: "admit `RATE` calls, such as 10/s:20 (10 in a second, 20 immediately) or 600/m"},
		&cli.StringSliceFlag{Name: "meta", Usage: "keep `KEY=VALUE` with the key; repeat"},
	}
}

// specFields has the flags of specFlags in the order of the message, with the fields of the
// message.
var specFields = []struct{ flag, path string }{
	{"name", "display_name"}, {"owner", "owner"}, {"scope", "scopes"}, {"meta", "metadata"},
	{"expires", "expire_time"}, {"not-before", "start_time"}, {"network", "allowed_networks"},
	{"rate", "rate_limit"},
}

// spec returns the fields of a key that the flags set.
func (c *call) spec() (*adminpb.Key, error) {
	k := &adminpb.Key{
		DisplayName:     c.String("name"),
		Owner:           c.String("owner"),
		Scopes:          c.words("scope"),
		AllowedNetworks: c.words("network"),
	}
	expires, err := c.timeFlag("expires", ahead)
	if err != nil {
		return nil, err
	}
	start, err := c.timeFlag("not-before", ahead)
	if err != nil {
		return nil, err
	}
	k.ExpireTime, k.StartTime = timeProto(expires), timeProto(start)
	if text := c.String("rate"); text != "" {
		if k.RateLimit, err = parseRate(text); err != nil {
			return nil, err
		}
	}
	for _, pair := range c.StringSlice("meta") {
		name, value, ok := strings.Cut(pair, "=")
		if !ok || name == "" {
			return nil, usage("--meta cannot be used: write KEY=VALUE, once for each")
		}
		if k.Metadata == nil {
			k.Metadata = make(map[string]string)
		}
		k.Metadata[name] = value
	}
	return k, nil
}

func timeProto(t *time.Time) *timestamppb.Timestamp {
	if t == nil {
		return nil
	}
	return timestamppb.New(*t)
}

// parseRate reads 10/s:20, or 600/m with the burst of one second.
func parseRate(text string) (*adminpb.RateLimit, error) {
	wrong := usage("--rate cannot be used: write 10/s:20 for 10 calls in a second and 20 immediately")
	rate, burst, hasBurst := strings.Cut(text, ":")
	number, unit, ok := strings.Cut(rate, "/")
	per, known := map[string]float64{"s": 1, "m": 60, "h": 3600}[unit]
	n, err := strconv.ParseFloat(number, 64)
	if !ok || !known || err != nil || !(n > 0) || math.IsInf(n, 0) {
		return nil, wrong
	}
	limit := &adminpb.RateLimit{PerSecond: n / per, Burst: 1}
	if !hasBurst {
		limit.Burst = int32(min(max(1, math.Ceil(limit.PerSecond)), math.MaxInt32))
		return limit, nil
	}
	b, err := strconv.ParseInt(burst, 10, 32)
	if err != nil || b < 1 {
		return nil, wrong
	}
	limit.Burst = int32(b)
	return limit, nil
}

func create(ctx context.Context, c *call) (err error) {
	if err := c.noArgs(); err != nil {
		return err
	}
	spec, err := c.spec()
	if err != nil {
		return err
	}
	if spec.Credits, err = c.creditsFlag("credits"); err != nil {
		return err
	}
	if spec.DisplayName == "" {
		return usage("the key has no name: give --name")
	}
	secret, err := c.openSecret()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			secret.drop()
		}
	}()
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	c.left = `the key may have been made, and its secret is lost: look with "apikeyctl ` +
		`list --newest", and revoke it`
	r, err := c.keys.CreateKey(ctx, &adminpb.CreateKeyRequest{
		Key: spec, RequestId: uuid.NewString(), ValidateOnly: c.Bool("dry-run")})
	if err != nil {
		return c.failed(ctx, err)
	}
	k := keyOf(r.Key)
	if c.Bool("dry-run") {
		return c.wouldBe(k, "made")
	}
	return c.deliver(secret, "made", k, r.Secret)
}

// wouldBe prints a key as a change would leave it.
func (c *call) wouldBe(k key, done string) error {
	c.note("nothing was %s, because of --dry-run", done)
	return c.out.one(k)
}

func updateCommand() *cli.Command {
	return &cli.Command{
		Name: "update", Category: groupKeys, ArgsUsage: "ID",
		Usage: "change the fields of a key",
		Description: "A flag replaces its field. With fewer rights than before, the key's streams " +
			"end before the command does.",
		UsageText: "apikeyctl update 01k9x3v7q2f8hr6m5w0c4tzbnd --expires 30d --clear network",
		Flags: append(specFlags(),
			&cli.StringSliceFlag{Name: "clear", Usage: "empty `FIELD`: owner, scope, expires, " +
				"not-before, network, rate or meta; repeat, or separate with commas"},
			etagFlag()),
		Action: withServer(update),
	}
}

func etagFlag() cli.Flag {
	return &cli.StringFlag{Name: "etag",
		Usage: "change the key only if it still has `ETAG`, which get prints"}
}

func update(ctx context.Context, c *call) (err error) {
	name, err := c.keyArg()
	if err != nil {
		return err
	}
	spec, err := c.spec()
	if err != nil {
		return err
	}
	spec.Name, spec.Etag = name, c.String("etag")
	mask, err := c.mask()
	if err != nil {
		return err
	}
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	c.left = fmt.Sprintf(`the key may have been changed: look with "apikeyctl get %s"`,
		strings.TrimPrefix(name, namePrefix))
	r, err := c.keys.UpdateKey(ctx, &adminpb.UpdateKeyRequest{
		Key: spec, UpdateMask: mask, ValidateOnly: c.Bool("dry-run")})
	if err != nil {
		return c.failed(ctx, err)
	}
	k := keyOf(r.Key)
	if c.Bool("dry-run") {
		return c.wouldBe(k, "changed")
	}
	return c.out.one(k)
}

// mask returns the fields that an update changes.
func (c *call) mask() (*fieldmaskpb.FieldMask, error) {
	mask := new(fieldmaskpb.FieldMask)
	cleared := c.words("clear")
	for _, f := range specFields {
		clear := slices.Contains(cleared, f.flag)
		switch {
		case clear && f.flag == "name":
			return nil, usage("--clear name cannot be used: a key has a name")
		case clear && c.IsSet(f.flag):
			return nil, usage("--%s and --clear %s contradict each other: give one of them", f.flag,
				f.flag)
		case clear || c.IsSet(f.flag):
			mask.Paths = append(mask.Paths, f.path)
		}
		cleared = slices.DeleteFunc(cleared, func(word string) bool { return word == f.flag })
	}
	switch {
	case len(cleared) > 0:
		return nil, usage("--clear names a field that a key does not have: write owner, scope, " +
			"expires, not-before, network, rate or meta")
	case len(mask.Paths) == 0:
		return nil, usage("there is nothing to change: give a flag for each field, or --clear FIELD")
	}
	return mask, nil
}

func rotateCommand() *cli.Command {
	return &cli.Command{
		Name: rotateName, Category: groupKeys, ArgsUsage: "ID",
		Usage: "give a key a new secret, and print the secret once",
		Description: "Without --grace, the old secret and its streams end before the command does." +
			" The table of the key goes to stderr, and the secret alone to stdout.",
		UsageText: "apikeyctl rotate 01k9x3v7q2f8hr6m5w0c4tzbnd --grace 24h --out ci.key",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "grace", Usage: "admit the old secret for `DURATION`, such as 24h"},
			etagFlag(),
		}, secretFlags()...),
		Action: withServer(rotate),
	}
}

func rotate(ctx context.Context, c *call) (err error) {
	name, err := c.keyArg()
	if err != nil {
		return err
	}
	var grace time.Duration
	if text := c.String("grace"); text != "" {
		if grace, err = parseSpan(text); err != nil {
			return usage("--grace cannot be used: %v", err)
		}
	}
	secret, err := c.openSecret()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			secret.drop()
		}
	}()
	done, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer done(&err)
	if c.Bool("dry-run") {
		r, err := c.keys.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
		if err != nil {
			return c.failed(ctx, err)
		}
		return c.wouldBe(keyOf(r.Key), "rotated")
	}
	id := strings.TrimPrefix(name, namePrefix)
	c.left = fmt.Sprintf(`the key may have a new secret, which is lost: make another one `+
		`with "apikeyctl rotate %s"`, id)
	r, err := c.keys.RotateKey(ctx, &adminpb.RotateKeyRequest{
		Name: name, Grace: durationpb.New(grace), Etag: c.String("etag"),
		RequestId: uuid.NewString()})
	if err != nil {
		return c.failed(ctx, err)
	}
	if err := c.deliver(secret, "rotated", keyOf(r.Key), r.Secret); err != nil {
		return err
	}
	if r.NotEverywhere {
		c.note("another process of the store may refuse the new secret for a moment")
	}
	return nil
}
