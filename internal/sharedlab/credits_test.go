package sharedlab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// spending is what a spender spends, and the file for the number of calls that were admitted.
type spending struct {
	Endpoints   []string
	Token, File string
}

func init() { children["spender"] = runSpender }

// runSpender makes calls in 64 goroutines until the key has no credits left.
func runSpender(text string, parent <-chan struct{}) error {
	var job spending
	if err := json.Unmarshal([]byte(text), &job); err != nil {
		return err
	}
	ctx := context.Background()
	client, err := clientv3.New(clientv3.Config{Endpoints: job.Endpoints})
	if err != nil {
		return err
	}
	b, err := etcdstore.Open(ctx, client, "/keys/", nil)
	if err != nil {
		return err
	}
	store, err := keystore.New(b, nil)
	if err != nil {
		return err
	}
	var admitted atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for {
				_, err := store.Verify(ctx, job.Token)
				if errors.As(err, new(*keystore.CreditsError)) {
					return
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				admitted.Add(1)
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	if err := os.WriteFile(job.File, fmt.Append(nil, admitted.Load()), 0o600); err != nil {
		return err
	}
	fmt.Println(ready)
	<-parent
	return store.Close()
}

// Three processes with 64 goroutines each spend one balance in etcd: exactly the balance.
func TestProcessesShareCredits(t *testing.T) {
	const credits = 100_000
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	b, err := etcdstore.Open(t.Context(), l.Client(t), "/keys/", nil)
	require.NoError(t, err)
	store, err := keystore.New(b, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	issued, err := store.Create(t.Context(),
		keystore.Spec{Name: "a", Credits: &keystore.Credits{Remaining: credits}})
	require.NoError(t, err)
	dir := t.TempDir()
	file := func(n int) string { return filepath.Join(dir, fmt.Sprint(n)) }
	var spenders []*process
	for n := range 3 {
		job := spending{l.Endpoints(), issued.Secret.Reveal(), file(n)}
		p, err := startProcess("spender", job, (*exec.Cmd).Start)
		require.NoError(t, err)
		t.Cleanup(func() { p.end((*process).stop) })
		spenders = append(spenders, p)
	}
	total := 0
	for n, p := range spenders {
		require.NoError(t, p.wait())
		text, err := os.ReadFile(file(n))
		require.NoError(t, err)
		var admitted int
		_, err = fmt.Sscan(string(text), &admitted)
		require.NoError(t, err)
		total += admitted
	}
	require.Equal(t, credits, total)
}
