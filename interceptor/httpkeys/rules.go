package httpkeys

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path"
	"strings"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

// A rule states which callers may send a request. The zero rule accepts every valid key. A rule is
// the handler of its pattern in the ServeMux of a ruleSet.
type rule struct {
	pattern  string // "" is the default rule
	public   bool
	optional bool // a request without a credential is accepted, without a key
	missing  bool // RequireRules was given, and no pattern matches
	scopes   []string
	anyOf    bool  // the key needs one of the scopes, not all
	cost     int64 // in credits; only in the ruleSet of the costs
}

// ServeHTTP makes a rule a handler. No ServeMux calls it.
func (*rule) ServeHTTP(http.ResponseWriter, *http.Request) {}

// A ruleSet finds the rule of a request.
//
// A rule must not be avoided by a path that a router reads in another way than the ServeMux of the
// ruleSet. There are several ways to read a path: ServeMux splits the escaped path, many routers
// split the unescaped path, some routers resolve ".." while others do not, and some routers take
// double slashes as they are. So find refuses a path with dot segments, a path that has different
// rules in its escaped and its unescaped form, and a path that has different rules with and without
// its double slashes. For the same reason, find refuses a CONNECT request that has different rules
// as it is and cleaned: see matchConnect. In "GET http:admin/x HTTP/1.1", the path is empty for a
// ServeMux, but a proxy requests admin/x. So find refuses such a request too.
type ruleSet struct {
	mux       *http.ServeMux
	byPattern map[string]*rule
	other     rule // for requests that match no pattern
}

func newRuleSet() ruleSet {
	return ruleSet{mux: http.NewServeMux(), byPattern: make(map[string]*rule)}
}

// add adds the rule for a pattern.
func (s *ruleSet) add(pattern string, r rule) (err error) {
	if _, ok := s.byPattern[pattern]; ok {
		return fmt.Errorf("%q already has a rule: give each pattern one rule", pattern)
	}
	defer func() {
		// Handle panics if the pattern is malformed, or conflicts with another.
		if p := recover(); p != nil {
			err = fmt.Errorf("%q is not a pattern of http.ServeMux, or conflicts with another "+
				"pattern: %v", pattern, p)
		}
	}()
	r.pattern = pattern
	s.mux.Handle(pattern, &r)
	s.byPattern[pattern] = &r
	return nil
}

// find returns the rule for a request. The error is admission.ErrPath.
func (s *ruleSet) find(r *http.Request) (*rule, error) {
	if len(s.byPattern) == 0 {
		return &s.other, nil
	}
	if hasDotSegment(r.URL.Path) || r.URL.Opaque != "" {
		return &s.other, admission.ErrPath
	}
	found := s.match(r)
	if s.readsTwoWays(r, found) {
		return &s.other, admission.ErrPath
	}
	if strings.Contains(r.URL.Path, "//") {
		filled := *r
		filled.URL = &url.URL{Host: r.URL.Host, Path: fillEmpty(r.URL.Path)}
		if s.match(&filled) != found {
			return &s.other, admission.ErrPath
		}
	}
	if r.URL.RawPath != "" {
		unescaped := *r
		unescaped.URL = &url.URL{Host: r.URL.Host, Path: cleanPath(r.URL.Path)}
		if s.match(&unescaped) != found {
			return &s.other, admission.ErrPath
		}
	}
	if found == nil {
		found = &s.other
	}
	return found, nil
}

// match returns the rule of the pattern that the ServeMux chooses, or nil. If the ServeMux would
// redirect the request, to a path with a slash at the end or without double slashes, match returns
// the rule of the new path.
func (s *ruleSet) match(r *http.Request) *rule {
	if r.Method == http.MethodConnect {
		return s.matchConnect(r)
	}
	handler, pattern := s.mux.Handler(r)
	if found, ok := handler.(*rule); ok {
		return found
	}
	return s.byPattern[pattern]
}

// matchConnect is match for the method CONNECT. A ServeMux takes the path of CONNECT as it is, with
// double slashes, and the host with its port. The handler may read both in the usual way. So
// matchConnect finds the rule that another method would have, and find asks readsTwoWays.
func (s *ruleSet) matchConnect(r *http.Request) *rule {
	escaped := cleanPath(r.URL.EscapedPath())
	unescaped, err := url.PathUnescape(escaped)
	if err != nil {
		return nil
	}
	usual := *r
	if host, _, err := net.SplitHostPort(r.Host); err == nil {
		usual.Host = host
	}
	usual.URL = &url.URL{Host: usual.Host, Path: unescaped, RawPath: escaped}
	return s.matchAsIs(&usual)
}

// readsTwoWays reports whether a ServeMux would choose another rule for a CONNECT request than
// matchConnect. For an empty path, as in "CONNECT example.com:443", a ServeMux chooses no handler.
func (s *ruleSet) readsTwoWays(r *http.Request, found *rule) bool {
	return r.Method == http.MethodConnect && r.URL.Path != "" && s.matchAsIs(r) != found
}

// matchAsIs returns the rule of a CONNECT request whose path and host are not to be cleaned.
func (s *ruleSet) matchAsIs(r *http.Request) *rule {
	handler, pattern := s.mux.Handler(r)
	if found, ok := handler.(*rule); ok {
		return found
	}
	if pattern == "" {
		return nil
	}
	// The ServeMux would redirect the request to the path with a slash at the end. For CONNECT, the
	// ServeMux returns this path in place of the pattern.
	slash := *r
	slash.URL = &url.URL{Host: r.URL.Host, Path: r.URL.Path + "/", RawPath: r.URL.EscapedPath() + "/"}
	handler, _ = s.mux.Handler(&slash)
	found, _ := handler.(*rule)
	return found
}

// cleanPath returns the path without double slashes, as a ServeMux cleans the paths of requests.
func cleanPath(p string) string {
	clean := path.Clean("/" + p)
	if strings.HasSuffix(p, "/") && clean != "/" {
		clean += "/"
	}
	return clean
}

// fillEmpty returns the path with a segment that no pattern names in the place of each empty
// segment. So the path matches the patterns that a router finds if it takes empty segments as
// segments.
func fillEmpty(p string) string {
	for strings.Contains(p, "//") {
		p = strings.ReplaceAll(p, "//", "/\x00/")
	}
	return p
}

// hasDotSegment reports whether one of the segments of the path is "." or "..".
func hasDotSegment(p string) bool {
	if !strings.Contains(p, ".") {
		return false
	}
	for segment := range strings.SplitSeq(p, "/") {
		if segment == "." || segment == ".." {
			return true
		}
	}
	return false
}
