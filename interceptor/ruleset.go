package interceptor

import (
	"fmt"

	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A rule says who may call a method. The zero rule is: whoever has a valid key.
type rule struct {
	public       bool
	optional     bool // without a credential, the caller is nobody
	missing      bool // no rule names the method, and RequireRules wants one
	scopes       []string
	anyOf        bool           // one of the scopes is enough
	fromProto    bool           // read from a .proto: the server may lack the method
	deniedStatus *status.Status // for a key that lacks them
}

// allows returns nil, or what to tell a caller with a key that lacks a scope.
func (r rule) allows(k *keystore.Key) error {
	if len(r.scopes) == 0 {
		return nil
	}
	for _, s := range r.scopes {
		if k.HasScope(s) == r.anyOf { // one that it has is enough, or one that it lacks
			if r.anyOf {
				return nil
			}
			return &Refusal{KeyID: k.ID, err: &scopeError{r.deniedStatus}}
		}
	}
	if r.anyOf {
		return &Refusal{KeyID: k.ID, err: &scopeError{r.deniedStatus}}
	}
	return nil
}

// A ruleSet holds the rules of a server.
type ruleSet struct {
	methods  map[string]rule // by full method
	services map[string]rule // by "/pkg.Service"
	required bool            // RequireRules was given
}

func newRuleSet() ruleSet {
	return ruleSet{methods: make(map[string]rule), services: make(map[string]rule)}
}

// add adds the rule for one method, or for one service.
func (s *ruleSet) add(fullMethod string, r rule) error {
	service, method, ok := splitMethod(fullMethod)
	if !ok {
		return fmt.Errorf("%q is not a full method name: write it as /package.Service/Method", fullMethod)
	}
	rules, name := s.methods, fullMethod
	if method == "*" {
		rules, name = s.services, service
	}
	if _, ok := rules[name]; ok {
		return fmt.Errorf("%q has a rule already: give each method one", fullMethod)
	}
	if len(r.scopes) > 0 {
		r.deniedStatus = scopeStatus(r.scopes)
	}
	rules[name] = r
	return nil
}

// forMethod returns the rule for a method: its own, or else its service's, or else that it needs a key
// or a rule. Names match to the letter, so that one which the server would read differently needs a
// key too (compare CVE-2026-33186).
func (s *ruleSet) forMethod(fullMethod string) rule {
	if r, ok := s.methods[fullMethod]; ok {
		return r
	}
	if len(s.services) > 0 {
		if service, _, ok := splitMethod(fullMethod); ok {
			if r, ok := s.services[service]; ok {
				return r
			}
		}
	}
	return rule{missing: s.required}
}
