package interceptor

import (
	"fmt"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A rule states which callers may call a method. The zero rule accepts every valid key.
type rule struct {
	public    bool
	optional  bool // a call without a credential is accepted, without a key
	missing   bool // RequireRules was given, and the method has no rule
	scopes    []string
	anyOf     bool // the key needs one of the scopes, not all
	fromProto bool // from RulesFrom: the server may lack the method

	cost int64 // in credits; set by forMethod
}

// allows returns nil if the key has the scopes of the rule, or else a *Refusal.
func (r rule) allows(k *keystore.Key) error {
	if err := admission.CheckScopes(k, r.scopes, r.anyOf); err != nil {
		return &Refusal{KeyID: k.ID, err: err}
	}
	return nil
}

// A ruleSet holds the rules of a server.
type ruleSet struct {
	methods  map[string]rule // by full method
	services map[string]rule // by "/pkg.Service"
	required bool            // RequireRules was given

	costs map[string]int64 // of Cost, by full method and by "/pkg.Service"
}

func newRuleSet() ruleSet {
	return ruleSet{methods: make(map[string]rule), services: make(map[string]rule),
		costs: make(map[string]int64)}
}

// add adds a rule for one method, or for all methods of a service ("/pkg.Service/*").
func (s *ruleSet) add(fullMethod string, r rule) error {
	name, isService, err := ruleName(fullMethod)
	if err != nil {
		return err
	}
	rules := s.methods
	if isService {
		rules = s.services
	}
	if _, ok := rules[name]; ok {
		return fmt.Errorf("%q already has a rule: give each method one rule", fullMethod)
	}
	rules[name] = r
	return nil
}

// ruleName returns the name under which a ruleSet keeps what an option says of a method, or of all
// methods of a service ("/pkg.Service/*").
func ruleName(fullMethod string) (name string, isService bool, err error) {
	service, method, ok := splitMethod(fullMethod)
	if !ok {
		return "", false, fmt.Errorf("%q is not a full method name: write /package.Service/Method",
			fullMethod)
	}
	if method == "*" {
		return service, true, nil
	}
	return fullMethod, false, nil
}

// forMethod returns the rule for a method, with the cost of a call.
func (s *ruleSet) forMethod(fullMethod string) rule {
	r := s.accessTo(fullMethod)
	r.cost = s.costOf(fullMethod)
	return r
}

// costOf returns the cost of a call of a method: that of Cost for the method itself, or else for
// its service, or else one credit.
func (s *ruleSet) costOf(fullMethod string) int64 {
	if len(s.costs) == 0 {
		return 1
	}
	if cost, ok := s.costs[fullMethod]; ok {
		return cost
	}
	if service, _, ok := splitMethod(fullMethod); ok {
		if cost, ok := s.costs[service]; ok {
			return cost
		}
	}
	return 1
}

// accessTo returns the rule for a method: the rule for the method itself, or else the rule for its
// service, or else the default rule. Names must be exactly equal. So a name that the server would
// interpret differently does not match a Public rule, and needs a key (compare CVE-2026-33186).
func (s *ruleSet) accessTo(fullMethod string) rule {
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

// names reports whether a rule names the method itself.
func (s *ruleSet) names(fullMethod string) bool {
	_, ok := s.methods[fullMethod]
	return ok
}
