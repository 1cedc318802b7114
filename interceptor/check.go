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

// Check returns an error if the rules do not match the methods of the server. Call Check after all
// services are registered, before Serve. Check finds these mistakes:
//
//   - A rule or a Cost names a method or a service that the server does not have. The name is
//     misspelt, or the method was renamed, so the rule protects nothing. (Check ignores rules of
//     RulesFrom, which may belong to other servers.)
//   - With RequireRules, a method of the server has no rule, so every call of the method is
//     refused.
//   - The server has streams that need a key, but neither Stream nor ServerOptions was called. Or
//     the server has unary methods that need a key, but neither Unary nor ServerOptions was called.
//     Check cannot see whether the server got the interceptors.
//
// If the server forwards calls with a grpc.UnknownServiceHandler, name the forwarded methods in
// proxied: full method names, or services, as in "/package.Service/*".
func (a *Authenticator) Check(s ServiceInfoProvider, proxied ...string) error {
	m, err := methodsOf(s, proxied)
	if err != nil {
		return err
	}
	var unknown, ruleless, openUnary, openStreams []string
	for name, r := range a.rules.methods {
		if !m.has(name) && !r.fromProto {
			unknown = append(unknown, name)
		}
	}
	for name := range a.rules.services {
		if !m.has(name) {
			unknown = append(unknown, name+"/*")
		}
	}
	for name := range a.rules.costs {
		if m.has(name) {
			continue
		}
		if _, _, isMethod := splitMethod(name); !isMethod {
			name += "/*"
		}
		unknown = append(unknown, name)
	}
	for name, stream := range m.streams {
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
	slices.Sort(unknown)
	unknown = slices.Compact(unknown) // a name may have a rule and a Cost
	return errors.Join(
		listError(unknown, "rules for methods that the server does not have: %s: "+
			"correct the names, or call Check after all services are registered"),
		listError(ruleless,
			"RequireRules refuses every call of these methods, which have no rule: %s: "+
				"give each method a rule, such as Public, Require or AnyKey"),
		listError(openUnary, "the interceptor of Unary is not in use, "+
			"so these methods need no key: %s: give the ServerOptions to grpc.NewServer"),
		listError(openStreams, "the interceptor of Stream is not in use, "+
			"so these streams need no key: %s: give the ServerOptions to grpc.NewServer"))
}

// serverMethods are the methods that a server has. The name of a service is "/package.Service".
type serverMethods struct {
	known    map[string]bool // services and methods
	streams  map[string]bool // by method: whether the method is a stream
	unlisted map[string]bool // services whose method names are not known
}

// methodsOf returns the methods of a server, and the methods that the server forwards.
func methodsOf(s ServiceInfoProvider, proxied []string) (*serverMethods, error) {
	m := &serverMethods{
		known:    make(map[string]bool),
		streams:  make(map[string]bool),
		unlisted: make(map[string]bool),
	}
	for service, info := range s.GetServiceInfo() {
		m.known["/"+service] = true
		for _, method := range info.Methods {
			name := "/" + service + "/" + method.Name
			m.known[name] = true
			m.streams[name] = method.IsClientStream || method.IsServerStream
		}
	}
	for _, name := range proxied {
		service, method, ok := splitMethod(name)
		if !ok {
			return nil, fmt.Errorf("interceptor: Check: %q is neither a full method name "+
				"nor a service: write /package.Service/Method or /package.Service/*", name)
		}
		m.known[service] = true
		m.streams[name] = true // gRPC treats every call of an UnknownServiceHandler as a stream
		if method == "*" {
			m.unlisted[service] = true
		} else {
			m.known[name] = true
		}
	}
	return m, nil
}

// has reports whether the server has a service or a method, or may have the method.
func (m *serverMethods) has(name string) bool {
	service, _, isMethod := splitMethod(name)
	return m.known[name] || isMethod && m.unlisted[service]
}

// listError returns an error that lists the names, or nil if there are no names.
func listError(names []string, format string) error {
	if len(names) == 0 {
		return nil
	}
	slices.Sort(names)
	return fmt.Errorf("interceptor: "+format, strings.Join(names, ", "))
}
