package main

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// The groups of commands in the help.
const (
	groupKeys  = "Keys"
	groupMany  = "Many keys"
	groupAudit = "Audit"
	groupStore = "The store"
	groupTool  = "This program"
)

const groupOutput = "Output"

// newCommand returns the command apikeyctl.
func newCommand() *cli.Command {
	cli.HelpPrinter = printHelp
	root := &cli.Command{
		Name:                            "apikeyctl",
		Usage:                           "manage the API keys of a server",
		HideHelpCommand:                 true,
		DisableSliceFlagSeparator:       true,
		EnableShellCompletion:           true,
		ConfigureShellCompletionCommand: completionCommand,
		Flags: append(placeFlags(),
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Category: groupOutput,
				Value: formatTable, Sources: cli.EnvVars("APIKEYCTL_OUTPUT"),
				Usage: "print a `FORMAT`: table, json, jsonl (one JSON document on a line) or id"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Category: groupOutput,
				Usage: "print the IDs alone: -o id"},
			&cli.BoolFlag{Name: "dry-run", Category: groupSafety,
				Usage: "make every check, and say what would change; change nothing"},
			&cli.BoolFlag{Name: "yes", Category: groupSafety,
				Usage: "do not ask before many keys change"},
			&cli.StringFlag{Name: "timeout", Category: groupSafety, Value: "30s",
				Usage: "the longest `DURATION` of one call. If not given, commands that read the " +
					"whole store have no limit"},
		),
		Commands: []*cli.Command{
			createCommand(), getCommand(), listCommand(), updateCommand(), rotateCommand(),
			disableCommand(), enableCommand(), revokeCommand(), creditsCommand(),
			lookupCommand(),
			revokeAllCommand(), purgeCommand(),
			eventsCommand(), watchCommand(),
			statsCommand(), backupCommand(), restoreCommand(), importCommand(), exportCommand(),
			checkCommand(),
			manCommand(), versionCommand(),
		},
		// Without an Action, cli exits with 3 for an unknown command.
		Action: func(_ context.Context, cmd *cli.Command) error {
			switch cmd.Args().First() {
			case "", "help":
				return cli.ShowRootCommandHelp(cmd)
			default:
				return unknownCommand(cmd)
			}
		},
		ExitErrHandler: func(context.Context, *cli.Command, error) {}, // run reports the error
		OnUsageError:   onUsageError,
	}
	for _, cmd := range root.Commands {
		cmd.DisableSliceFlagSeparator = true // words separates
		cmd.OnUsageError = onUsageError
	}
	return root
}

const groupSafety = "Safety"

// plainWord is a word that holds no secret: a failure may repeat it.
var plainWord = regexp.MustCompile(`^[a-z][a-z-]{0,20}$`)

func unknownCommand(cmd *cli.Command) error {
	name := cmd.Args().First()
	if !plainWord.MatchString(name) {
		return usage(`an argument is not the name of a command: see "apikeyctl --help"`)
	}
	return usage(`there is no command %s%s: "apikeyctl --help" lists the commands`, name,
		didYouMean(name, cli.SuggestCommand(cmd.Commands, name)))
}

var (
	unknownFlag = regexp.MustCompile(`flag provided but not defined: -(.*)`)
	badFlag     = regexp.MustCompile(`for flag -([a-z-]+):`)
	emptyFlag   = regexp.MustCompile(`flag needs an argument: --?([a-z-]+)`)
)

// onUsageError returns the failure for an error of the flags. The texts of cli repeat what was
// given, which may be a secret.
func onUsageError(_ context.Context, cmd *cli.Command, err error, _ bool) error {
	help := fmt.Sprintf("see %q", cmd.FullName()+" --help")
	text := err.Error()
	if m := unknownFlag.FindStringSubmatch(text); m != nil {
		if !plainWord.MatchString(m[1]) {
			return usage("a flag is not known: %s", help)
		}
		flags := slices.Concat(cmd.Flags, cmd.Root().Flags)
		return usage("there is no flag --%s%s: %s", m[1],
			didYouMean(m[1], cli.SuggestFlag(flags, m[1], false)), help)
	}
	if m := badFlag.FindStringSubmatch(text); m != nil {
		return usage("the value of --%s cannot be used: %s", m[1], help)
	}
	if m := emptyFlag.FindStringSubmatch(text); m != nil {
		return usage("--%s has no value: %s", m[1], help)
	}
	return usage("the command line cannot be used: %s", help)
}

// didYouMean returns the words about a similar name, if the name is similar enough.
func didYouMean(name, similar string) string {
	if bare := strings.TrimLeft(similar, "-"); bare == "" || bare[0] != name[0] {
		return ""
	}
	return fmt.Sprintf(" (did you mean %s?)", similar)
}

func upperFirst(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// A call is one run of a command.
type call struct {
	*cli.Command // the flags and the arguments
	out          *output
	place        place
	timeout      time.Duration
	keys         adminpb.KeyServiceClient
	store        adminpb.StoreServiceClient

	// left says what the command leaves if it ends now without an answer, and what to do then.
	left string
}

// newCall returns the call of a command, without a connection.
func newCall(cmd *cli.Command) (*call, error) {
	c := &call{Command: cmd, left: "nothing was changed"}
	c.out = &output{cmd.String("output"), os.Stdout, os.Stderr}
	if cmd.Bool("quiet") {
		c.out.format = formatID
	}
	switch c.out.format {
	case formatTable, formatJSON, formatJSONL, formatID:
	default:
		return nil, usage("-o cannot be used: write table, json, jsonl or id")
	}
	var err error
	if c.timeout, err = parseSpan(cmd.String("timeout")); err != nil || c.timeout == 0 {
		return nil, usage("--timeout cannot be used: write a duration such as 30s or 5m")
	}
	return c, nil
}

// withServer returns the action of a command that needs the service.
func withServer(do func(context.Context, *call) error) cli.ActionFunc {
	return func(ctx context.Context, cmd *cli.Command) (err error) {
		c, err := newCall(cmd)
		if err != nil {
			return err
		}
		if c.place, err = placeOf(cmd); err != nil {
			return err
		}
		return do(ctx, c)
	}
}

// dial connects to the service, and returns the function that ends the connection. A command checks
// its arguments before.
func (c *call) dial(ctx context.Context) (done func(*error), err error) {
	conn, err := c.connect(ctx)
	if err != nil {
		return nil, err
	}
	c.keys = adminpb.NewKeyServiceClient(conn)
	c.store = adminpb.NewStoreServiceClient(conn)
	return func(err *error) {
		if failed := conn.close(); *err == nil && failed != nil {
			*err = local("%v: look at the store with apikeyctl check", failed)
		}
	}, nil
}

// wholeStore has the calls that read the whole store, and may take long.
var wholeStore = map[string]bool{
	adminpb.StoreService_PurgeKeys_FullMethodName:      true,
	adminpb.StoreService_CheckIntegrity_FullMethodName: true,
}

// limit ends a call after the timeout.
func (c *call) limit(
	ctx context.Context, method string, request, response any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	if !wholeStore[method] || c.IsSet("timeout") {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	return invoke(ctx, method, request, response, conn, opts...)
}

// repeatable has the calls that can be repeated if the answer was lost: they change nothing, or
// have a request_id.
var repeatable = map[string]bool{
	adminpb.KeyService_CreateKey_FullMethodName:  true,
	adminpb.KeyService_RotateKey_FullMethodName:  true,
	adminpb.KeyService_GetKey_FullMethodName:     true,
	adminpb.KeyService_ListKeys_FullMethodName:   true,
	adminpb.KeyService_ListEvents_FullMethodName: true,
	adminpb.KeyService_LookupKey_FullMethodName:  true,
	adminpb.StoreService_GetStats_FullMethodName: true,
}

// repeat repeats a call whose answer was lost with the connection. An error of the service is an
// answer.
func (c *call) repeat(
	ctx context.Context, method string, request, response any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	const attempts = 4
	wait := 200 * time.Millisecond
	for attempt := 1; ; attempt++ {
		err := invoke(ctx, method, request, response, conn, opts...)
		if attempt == attempts || !repeatable[method] || err == nil ||
			failureOf(err).code != codes.Unavailable || failureOf(err).reason != "" {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
		wait *= 3
	}
}

// note prints a sentence to stderr, for the user and not for a program.
func (c *call) note(format string, args ...any) {
	fmt.Fprintf(c.out.stderr, "%s\n", printable(fmt.Sprintf(format, args...)))
}

// noArgs refuses arguments.
func (c *call) noArgs() error {
	if c.Args().Present() {
		return usage("%s takes no arguments besides its flags: see %q", c.Name,
			c.FullName()+" --help")
	}
	return nil
}

// oneArg returns the only argument. what names the argument.
func (c *call) oneArg(what string) (string, error) {
	if c.Args().Len() != 1 {
		return "", usage("%s takes one argument, %s: see %q", c.Name, what,
			c.FullName()+" --help")
	}
	return c.Args().First(), nil
}

// keyArg returns the name of the key whose ID is the only argument.
func (c *call) keyArg() (string, error) {
	id, err := c.oneArg("the ID of a key")
	if err != nil {
		return "", err
	}
	return nameOf(id)
}

// keyArgs returns the names of the keys whose IDs are the arguments, at least one.
func (c *call) keyArgs() ([]string, error) {
	if !c.Args().Present() {
		return nil, usage(`%s needs the ID of a key: "apikeyctl list" shows the IDs`, c.Name)
	}
	var names []string
	for _, id := range c.Args().Slice() {
		name, err := nameOf(id)
		if err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	return names, nil
}

// timeFlag returns the time of a flag, and nil if the flag is not given.
func (c *call) timeFlag(name string, d direction) (*time.Time, error) {
	text := c.String(name)
	if text == "" {
		return nil, nil
	}
	t, err := parseTime(text, time.Now(), d)
	if err != nil {
		return nil, usage("--%s cannot be used: %v", name, err)
	}
	return &t, nil
}

// words returns the values of a flag that can be repeated, and can hold several values with commas.
func (c *call) words(name string) []string {
	var words []string
	for _, value := range c.StringSlice(name) {
		for word := range strings.SplitSeq(value, ",") {
			if word = strings.TrimSpace(word); word != "" {
				words = append(words, word)
			}
		}
	}
	return words
}

// completionCommand completes the command that cli makes.
func completionCommand(cmd *cli.Command) {
	cmd.Hidden, cmd.Category = false, groupTool
	cmd.Usage = "print the completion script for bash, zsh, fish or pwsh"
	cmd.ArgsUsage = "SHELL"
	cmd.Description = ""
	cmd.UsageText = "source <(apikeyctl completion bash)"
	cmd.OnUsageError = onUsageError
	// Without an Action, cli exits with 3 for an unknown shell.
	cmd.Action = func(context.Context, *cli.Command) error {
		return usage("the shell is not known: write bash, zsh, fish or pwsh")
	}
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name: "version", Category: groupTool,
		Usage:     "print the version of apikeyctl",
		UsageText: "apikeyctl version",
		Action: func(_ context.Context, cmd *cli.Command) error {
			c, err := newCall(cmd)
			if err != nil {
				return err
			}
			if err := c.noArgs(); err != nil {
				return err
			}
			v := versionNow()
			return c.out.said(v, fmt.Sprintf("apikeyctl %s, %s", v.Version, v.Go))
		},
	}
}

func versionNow() version {
	if info, ok := debug.ReadBuildInfo(); ok {
		return version{info.Main.Version, info.GoVersion}
	}
	return version{Version: "unknown"}
}

type version struct {
	Version string `json:"version"`
	Go      string `json:"go"`
}

func (v version) ident() string  { return v.Version }
func (v version) row() []field   { return []field{{"VERSION", v.Version}, {"GO", v.Go}} }
func (v version) whole() []field { return v.row() }
