package interceptor

import (
	"fmt"
	"log/slog"
	"slices"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/grpc-api-key/grpc-api-key/internal/failures"
)

// A config holds what Options set. New builds the Authenticator from a complete config.
type config struct {
	credentials credentialReader
	rules       ruleSet
	extensions  []protoreflect.ExtensionType // of RulesFrom
	proxies     proxies
	failures    *failures.Limit // nil: LimitFailures was not given
	mapper      ErrorMapper     // nil: the caller gets the default status
	logger      *slog.Logger    // nil: LogRefusals was not given
	observers   observers       // of Observe

	limitMessages, cancelUnary bool
}

// newConfig applies the options, adds the defaults, and checks that the options fit together.
func newConfig(opts []Option) (*config, error) {
	c := &config{rules: newRuleSet()}
	for _, o := range opts {
		if o.apply == nil {
			continue // the zero Option
		}
		if err := o.apply(c); err != nil {
			return nil, err
		}
	}
	if err := c.readRules(); err != nil {
		return nil, err
	}
	headers := &c.credentials.headers
	if len(*headers) == 0 {
		*headers = []header{{name: "authorization", schemes: []string{"Bearer"}}}
	}
	holdsBoth := func(h header) bool { return h.name == c.proxies.header }
	if slices.ContainsFunc(*headers, holdsBoth) {
		return nil, fmt.Errorf("the header %q cannot hold both the key and the caller's address",
			c.proxies.header)
	}
	return c, nil
}
