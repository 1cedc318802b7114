package peers

import "context"

// startNoAuth starts the peer with the least possible cost: clients send credentials, and the
// server ignores the credentials.
func startNoAuth(context.Context, string) (*Peer, error) {
	p := &Peer{How: "no interceptor; clients send credentials, and the server ignores them"}
	p.credentials(issue())
	return p, nil
}
