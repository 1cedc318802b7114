package sharedlab

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Another program writes into the membership table of a store in etcd. The processes of the store
// remove a member record without a revision. Without such a process, New says what to do.
func TestDamagedMembershipTable(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client, prefix := l.Client(t), newPrefix()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	member := prefix + "\x00m" + string(make([]byte, 16))
	damage := func(key string) {
		_, err := client.Put(ctx, key, "damage")
		require.NoError(t, err)
	}
	start := func(timeout time.Duration) (*keystore.Store, error) {
		b := open(t, client, prefix)
		s, err := keystore.New(b, &keystore.Options{Freshness: time.Second, Timeout: timeout})
		if err == nil {
			t.Cleanup(func() { _ = s.Close() })
		}
		return s, err
	}

	a, err := start(patience)
	require.NoError(t, err)
	damage(member)
	b, err := start(patience)
	require.NoError(t, err, "the other process removes the damaged record")
	issued, err := b.Create(ctx, keystore.Spec{Name: "test"})
	require.NoError(t, err)
	require.NoError(t, a.Revoke(ctx, issued.Key.ID, ""))
	n := 0
	for _, err := range b.Events(ctx, keystore.EventQuery{}) {
		require.NoError(t, err)
		n++
	}
	require.Equal(t, 2, n)
	require.NoError(t, a.Close())
	require.NoError(t, b.Close())

	damage(member)
	_, err = start(5 * time.Second) // all the time: another process could remove the record
	require.ErrorIs(t, err, backend.ErrCorrupt)
	require.ErrorContains(t, err, "stop all processes of the store, and delete the entry")
	_, err = client.Delete(ctx, member)
	require.NoError(t, err)

	damage(prefix + "\x00m")
	_, err = start(patience)
	require.ErrorIs(t, err, backend.ErrCorrupt)
	require.ErrorContains(t, err, `delete the entry "m"`)
	_, err = client.Delete(ctx, prefix+"\x00m")
	require.NoError(t, err)
	a, err = start(patience)
	require.NoError(t, err)
	require.NoError(t, a.Close())
}
