package httpkeys_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
)

// A network is a RoundTripper that records the requests that would be sent.
type network struct {
	sent      []*http.Request
	redirects map[string]string
}

func (n *network) RoundTrip(r *http.Request) (*http.Response, error) {
	n.sent = append(n.sent, r)
	response := &http.Response{StatusCode: 200, Body: http.NoBody, Header: http.Header{}, Request: r}
	if to, ok := n.redirects[r.URL.String()]; ok {
		response.StatusCode = http.StatusTemporaryRedirect
		response.Header.Set("Location", to)
	}
	return response, nil
}

func key(context.Context) (string, error) { return " k_secret\n", nil }

// The key goes to the named hosts over https, and nowhere else, also after redirects.
func TestTransportSendsTheKeyToItsHosts(t *testing.T) {
	base := &network{redirects: map[string]string{
		"https://api.example.com/away":    "https://cdn.example.net/file",
		"https://cdn.example.net/back":    "https://api.example.com/again",
		"https://api.example.com/plain":   "http://api.example.com/plain",
		"https://api.example.com/port":    "https://api.example.com:8443/",
		"https://api.example.com/sub":     "https://evil.api.example.com/",
		"https://api.example.com/within":  "/elsewhere",
		"https://api.example.com/another": "https://API.example.com:443/upper",
	}}
	client := &http.Client{Transport: &httpkeys.Transport{Base: base, Source: key,
		Hosts: []string{"api.example.com", "[::1]:9000"}}}
	for _, c := range []struct {
		url     string
		withKey []bool // of each request that is sent
		err     string
	}{
		{"https://api.example.com/", []bool{true}, ""},
		{"https://api.example.com:443/", []bool{true}, ""},
		{"https://[::1]:9000/", []bool{true}, ""},
		{"https://[::1]/", []bool{false}, ""},
		{"https://other.example.com/", []bool{false}, ""},
		{"https://api.example.com.evil.net/", []bool{false}, ""},
		{"https://api.example.com@evil.net/", []bool{false}, ""},
		{"http://api.example.com:443/", []bool{false}, ""},
		{"http://api.example.com/", nil, "not sent to api.example.com over http: use https"},
		{"http://other.example.com/", []bool{false}, ""},
		{"https://api.example.com/away", []bool{true, false}, ""},
		{"https://cdn.example.net/back", []bool{false, true}, ""},
		{"https://api.example.com/plain", []bool{true}, "use https"},
		{"https://api.example.com/port", []bool{true, false}, ""},
		{"https://api.example.com/sub", []bool{true, false}, ""},
		{"https://api.example.com/within", []bool{true, true}, ""},
		{"https://api.example.com/another", []bool{true, true}, ""},
	} {
		base.sent = nil
		response, err := client.Do(request(t, "GET", c.url, "", nil))
		if c.err == "" {
			require.NoError(t, err, c.url)
			require.NotEqual(t, "Bearer k_secret", response.Request.Header.Get("Authorization"))
		} else {
			require.ErrorContains(t, err, c.err, c.url)
			require.NotContains(t, err.Error(), "k_secret")
		}
		require.Len(t, base.sent, len(c.withKey), c.url)
		for i, r := range base.sent {
			sent := r.Header.Get("Authorization") == "Bearer k_secret"
			require.Equal(t, c.withKey[i], sent, "%s: request %d", c.url, i)
		}
	}
}

func TestTransportErrors(t *testing.T) {
	failed := errors.New("no secret manager")
	hosts := []string{"api.example.com"}
	source := func(text string, err error) func(context.Context) (string, error) {
		return func(context.Context) (string, error) { return text, err }
	}
	for _, c := range []struct {
		transport *httpkeys.Transport
		want      string
	}{
		{&httpkeys.Transport{Hosts: hosts}, "Source is nil"},
		{&httpkeys.Transport{Source: key}, "Hosts is empty"},
		{&httpkeys.Transport{Source: source("", failed), Hosts: hosts}, "no secret manager"},
		{&httpkeys.Transport{Source: source(" \n", nil), Hosts: hosts}, "the API key is empty"},
		{&httpkeys.Transport{Source: source("Bearer k_secret", nil), Hosts: hosts}, "white space"},
		{&httpkeys.Transport{Source: source("k_secret\r\nX: y", nil), Hosts: hosts}, "white space"},
		{&httpkeys.Transport{Source: source("“k_secret”", nil), Hosts: hosts}, "printable ASCII"},
	} {
		base := &network{}
		c.transport.Base = base
		body := &closing{Reader: strings.NewReader("x")}
		_, err := c.transport.RoundTrip(request(t, "POST", "https://api.example.com/", "", body))
		require.ErrorContains(t, err, c.want)
		require.NotContains(t, err.Error(), "k_secret")
		require.Empty(t, base.sent, "nothing is sent")
		require.True(t, body.closed, "RoundTrip closes the body")
	}
}

type closing struct {
	io.Reader
	closed bool
}

func (c *closing) Close() error { c.closed = true; return nil }

// The Transport changes nothing of the request, and does not replace a credential of the caller.
func TestTransportLeavesTheRequest(t *testing.T) {
	base := &network{}
	tr := &httpkeys.Transport{Base: base, Source: key, Hosts: []string{"localhost:80"},
		Header: "X-Api-Key", AllowInsecure: true}
	r := &http.Request{Method: "GET", URL: &url.URL{Scheme: "http", Host: "localhost", Path: "/"}}
	_, err := tr.RoundTrip(r)
	require.NoError(t, err)
	require.Nil(t, r.Header)
	require.Equal(t, "k_secret", base.sent[0].Header.Get("X-Api-Key"))
	own := request(t, "GET", "http://localhost/", "", nil)
	own.Header.Set("X-Api-Key", "k_own")
	_, err = tr.RoundTrip(own)
	require.NoError(t, err)
	require.Equal(t, []string{"k_own"}, base.sent[1].Header.Values("X-Api-Key"))
	require.NotContains(t, fmt.Sprintf("%+v", tr), "k_secret")
}
