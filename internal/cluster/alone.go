package cluster

import (
	"context"
	"errors"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// ErrNotAlone is returned by Alone if the table has the record of another process.
var ErrNotAlone = errors.New("cluster: another process has the store open")

// Alone returns a Check. An Apply with the Check conflicts if another process has joined after the
// call of Alone, because each process that joins writes the header. If the table has the record of
// another process already, Alone returns ErrNotAlone. A process that crashed has a record until
// another process evicts it.
func (c *Cluster) Alone(ctx context.Context) (backend.Change, error) {
	c.mu.Lock()
	m := c.member
	c.mu.Unlock()
	if m == nil {
		return backend.Change{}, ErrNoMembership
	}
	// The header first: a process that joins between the two reads moves the header.
	h, err := m.readHeader(ctx)
	if err != nil {
		return backend.Change{}, err
	}
	from, to := []byte{memberSpace}, []byte{memberSpace + 1}
	for e, err := range c.cfg.Backend.Scan(ctx, from, to) {
		if err != nil {
			return backend.Change{}, err
		}
		if len(e.Key) == memberKeyLen && string(e.Key) != string(m.memberKey()) {
			return backend.Change{}, ErrNotAlone
		}
	}
	return backend.Change{Key: []byte{memberSpace}, Expect: h.revision, Check: true}, nil
}
