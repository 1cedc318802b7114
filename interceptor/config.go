package interceptor

import (
	"log/slog"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/failures"
)

// A config holds what Options set. New builds the Authenticator from a complete config.
type config struct {
	credentials credentialReader
	rules       ruleSet
	extensions  []protoreflect.ExtensionType // of RulesFrom
	proxies     admission.Proxies
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
	if err := c.credentials.headers.SetDefault(&c.proxies); err != nil {
		return nil, err
	}
	return c, nil
}
