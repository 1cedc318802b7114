package httpkeys

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
)

// A Transport sends an API key with the requests of an HTTP client:
//
//	client := &http.Client{Transport: &httpkeys.Transport{
//		Source: func(context.Context) (string, error) { return os.Getenv("API_KEY"), nil },
//		Hosts:  []string{"api.example.com"},
//	}}
//
// The Transport sends the key over https alone, and to the Hosts alone. So a redirect to another
// host does not carry the key. (An http.Client removes the headers of a request on such a redirect,
// but calls its Transport again.) A request to another host is sent without a key. A request to one
// of the Hosts over plain http returns an error, and nothing is sent.
//
// A Transport is safe for concurrent use. Do not change the fields after the first request.
type Transport struct {
	// Base sends the requests. If Base is nil, http.DefaultTransport does.
	Base http.RoundTripper
	// Source returns the key for each request to one of the Hosts. Source gets the context of the
	// request, and must be safe for concurrent use. White space around the key is removed. The text
	// of an error is passed on, so the text must not contain the key. A nil Source is an error of
	// each request.
	Source func(context.Context) (string, error)
	// Hosts are the hosts that get the key: names or addresses, with a port unless the port is that
	// of the scheme, such as "api.example.com" or "[::1]:8443". Upper and lower case do not matter.
	// There are no wildcards. Without Hosts, each request returns an error.
	Hosts []string
	// Header is the name of the header for the key. Empty is Authorization. In Authorization, the
	// key follows the scheme Bearer; any other header has the key alone. A request that has the
	// header already is sent as it is, without a call of Source.
	Header string
	// AllowInsecure sends the key over plain http too. Every host on the way can then read the key
	// and use it. Use AllowInsecure for tests, and for links that are secured otherwise.
	AllowInsecure bool
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	withKey, err := t.addKey(r)
	if err != nil {
		if r.Body != nil {
			_ = r.Body.Close() // as the interface http.RoundTripper demands
		}
		return nil, err
	}
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	response, err := base.RoundTrip(withKey)
	if response != nil {
		response.Request = r // so that no program prints the key with the response
	}
	return response, err
}

// CloseIdleConnections lets http.Client.CloseIdleConnections reach the Base.
func (t *Transport) CloseIdleConnections() {
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	if c, ok := base.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// addKey returns the request, or a copy that has the key.
func (t *Transport) addKey(r *http.Request) (*http.Request, error) {
	switch {
	case t.Source == nil:
		return nil, errors.New("httpkeys: Transport: Source is nil: set the source of the API key")
	case len(t.Hosts) == 0:
		return nil, errors.New("httpkeys: Transport: Hosts is empty: name the hosts that get the key")
	case r.URL == nil || !t.isHost(r):
		return r, nil
	}
	name := t.Header
	if name == "" {
		name = "Authorization"
	}
	if len(r.Header.Values(name)) > 0 {
		return r, nil
	}
	if r.URL.Scheme != "https" && !t.AllowInsecure {
		return nil, fmt.Errorf("httpkeys: Transport: the API key is not sent to %s over %s: "+
			"use https", r.URL.Host, r.URL.Scheme)
	}
	text, err := t.Source(r.Context())
	if err != nil {
		return nil, fmt.Errorf("httpkeys: Transport: the source of the API key failed: %w", err)
	}
	key := strings.TrimSpace(text)
	if err := checkKey(key); err != nil {
		return nil, fmt.Errorf("httpkeys: Transport: %w", err)
	}
	if strings.EqualFold(name, "Authorization") {
		key = "Bearer " + key
	}
	r = r.Clone(r.Context())
	if r.Header == nil {
		r.Header = make(http.Header)
	}
	r.Header.Set(name, key)
	return r, nil
}

// checkKey returns an error if the text cannot be a key. The error does not quote the text.
func checkKey(key string) error {
	switch {
	case key == "":
		return errors.New("the API key is empty: " +
			"check the variable or the file that the key comes from")
	case strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }):
		return errors.New("the API key contains white space, or characters other than " +
			"printable ASCII: give the key alone, without a scheme such as Bearer")
	}
	return nil
}

// isHost reports whether the request goes to one of the Hosts.
func (t *Transport) isHost(r *http.Request) bool {
	to := withPort(r.URL.Host, r.URL.Scheme)
	for _, host := range t.Hosts {
		if strings.EqualFold(withPort(host, r.URL.Scheme), to) {
			return true
		}
	}
	return false
}

// withPort returns the host with its port, or with the port of the scheme.
func withPort(host, scheme string) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	port := "80"
	if scheme == "https" {
		port = "443"
	}
	return net.JoinHostPort(strings.Trim(host, "[]"), port)
}
