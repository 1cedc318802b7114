package interceptor

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc"
)

// A ServiceInfoProvider lists the services of a server, as *grpc.Server does.
type ServiceInfoProvider interface {
	GetServiceInfo() map[string]grpc.ServiceInfo
}

// Check returns an error if the rules and the server do not fit together:
//
//   - A rule names a method, or a service, that the server does not have: the name was misspelt, or
//     the method has been renamed, and the rule guards nothing. (Rules of RulesFrom may be of other
//     servers.)
//   - With RequireRules, a method of the server has no rule, and every call of it is refused.
//   - The server has streams that need a key, and nobody called Stream or ServerOptions; or unary
//     methods that need a key, and nobody called Unary or ServerOptions. Check does not see whether
//     the server got what these returned.
//
// Call Check after all services are registered, before Serve. If the server passes calls on with a
// grpc.UnknownServiceHandler, name what it passes on in proxied: full methods, or services, as
// "/package.Service/*".
func (a *Authenticator) Check(s ServiceInfoProvider, proxied ...string) error {
	known := make(map[string]bool)    // services, and methods
	streams := make(map[string]bool)  // by method: whether Stream guards the method, or else Unary
	unlisted := make(map[string]bool) // services whose methods are not known
	for service, info := range s.GetServiceInfo() {
		known["/"+service] = true
		for _, m := range info.Methods {
			name := "/" + service + "/" + m.Name
			known[name] = true
			streams[name] = m.IsClientStream || m.IsServerStream
		}
	}
	for _, name := range proxied {
		service, method, ok := splitMethod(name)
		if !ok {
			return fmt.Errorf("interceptor: Check: %q is neither a full method name "+
				"nor a service, as /package.Service/*", name)
		}
		known[service] = true
		streams[name] = true // gRPC treats every call of an UnknownServiceHandler as a stream
		if method == "*" {
			unlisted[service] = true
		} else {
			known[name] = true
		}
	}
	var unknown, ruleless, openUnary, openStreams []string
	for name, r := range a.rules.methods {
		if service, _, _ := splitMethod(name); !known[name] && !unlisted[service] && !r.fromProto {
			unknown = append(unknown, name)
		}
	}
	for name := range a.rules.services {
		if !known[name] {
			unknown = append(unknown, name+"/*")
		}
	}
	for name, stream := range streams {
		r := a.rules.forMethod(name)
		switch {
		case r.public:
		case stream && !a.streamInUse.Load():
			openStreams = append(openStreams, name)
		case !stream && !a.unaryInUse.Load():
			openUnary = append(openUnary, name)
		}
		if r.missing && !strings.HasSuffix(name, "/*") {
			ruleless = append(ruleless, name)
		}
	}
	return errors.Join(
		listError(unknown, "rules for what the server does not have: %s: "+
			"correct the names, or call Check after registering"),
		listError(ruleless, "methods without a rule, which RequireRules refuses to everyone: %s: "+
			"give each a rule, such as Public, Require or AnyKey"),
		listError(openUnary, "the interceptor of Unary is not in use, "+
			"so that these methods need no key: %s: give grpc.NewServer the ServerOptions"),
		listError(openStreams, "the interceptor of Stream is not in use, "+
			"so that these streams need no key: %s: give grpc.NewServer the ServerOptions"))
}

// listError returns nil if there are no names.
func listError(names []string, format string) error {
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return fmt.Errorf("interceptor: "+format, strings.Join(names, ", "))
}
