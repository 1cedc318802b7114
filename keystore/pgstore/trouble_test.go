package pgstore_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// A pool without a free connection delays reads, and neither changes nor feeds.
func TestExhaustedPool(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pool := newPool(t, server.URL("pool_max_conns", "1"))
	b := open(t, pool, "apikeys", alone)
	ctx := within(t, patience)
	taken, err := pool.Acquire(ctx)
	require.NoError(t, err)
	defer taken.Release()
	r := read(ctx, b, 0)
	r.next(t)
	require.NoError(t, put(ctx, b, "k", 0))
	require.Len(t, r.next(t).Changes, 1)
	_, err = b.Get(within(t, 50*time.Millisecond), []byte("k"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	for e, err := range b.Snapshot(ctx, nil, nil) {
		require.NoError(t, err)
		require.Equal(t, "k", string(e.Key))
	}
	taken.Release()
	_, err = b.Get(ctx, []byte("k"))
	require.NoError(t, err)
}

// A server restarts while a store is open: the feed ends with an error, and continues without a
// gap.
func TestRestart(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	r := read(ctx, b, 0)
	r.next(t)
	n := uint64(0)
	for _, stop := range []func(){server.Stop, server.Crash} {
		require.NoError(t, put(ctx, b, "k", n))
		last := r.next(t).Position
		stop()
		require.NotErrorIs(t, r.fails(t), backend.ErrGap)
		_, err := b.Get(ctx, []byte("k"))
		require.Error(t, err)
		require.NotErrorIs(t, err, backend.ErrNotFound)
		require.Error(t, put(ctx, b, "k", n+1))
		require.NoError(t, server.Start())
		require.NoError(t, put(ctx, b, "k", n+1), "the first change after the restart")
		r = read(ctx, b, last)
		batch := r.next(t)
		require.Equal(t, last+1, batch.Position)
		require.Equal(t, n+2, batch.Changes[0].Revision)
		n += 2
	}
}

// Timeouts of the server and of the role end reads of the pool, and neither a change nor a feed. No
// transaction lasts while the loop body of a snapshot runs.
func TestTimeouts(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL("statement_timeout", "50ms", "lock_timeout", "50ms",
		"idle_session_timeout", "50ms", "idle_in_transaction_session_timeout", "50ms",
		"default_transaction_isolation", "serializable")), "apikeys", alone)
	ctx := within(t, patience)
	r := read(ctx, b, 0)
	r.next(t)
	require.NoError(t, put(ctx, b, "a", 0))
	require.NoError(t, put(ctx, b, "b", 0))
	r.next(t)
	r.next(t)
	steps := 0
	for _, err := range b.Snapshot(ctx, nil, nil) {
		require.NoError(t, err)
		require.Equal(t, "0", server.Exec(t, "select count(*) from pg_stat_activity "+
			"where state like 'idle in transaction%'"), "a transaction lasts over the loop body")
		steps++
	}
	require.Equal(t, 2, steps)

	// Another program holds the lock of the changes for longer, and then a lock that reads need.
	other, err := pgx.Connect(ctx, server.URL())
	require.NoError(t, err)
	defer other.Close(ctx)
	tx, err := other.Begin(ctx)
	require.NoError(t, err)
	_, err = tx.Exec(ctx, "select from apikeys.head for update")
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- put(ctx, b, "a", 1) }()
	server.Await(t, "select count(*) > 0 from pg_stat_activity where wait_event_type = 'Lock' "+
		"and now() - query_start > interval '200 ms'", "t")
	_, err = tx.Exec(ctx, "lock table apikeys.entry")
	require.NoError(t, err)
	_, err = b.Get(ctx, []byte("a"))
	require.ErrorContains(t, err, "SQLSTATE")
	require.NotErrorIs(t, err, backend.ErrNotFound)
	require.NoError(t, tx.Rollback(ctx))
	require.NoError(t, <-done)
	require.Equal(t, uint64(2), r.next(t).Changes[0].Revision)
}

// A person cancels a statement, or ends a connection. The caller of a change gets an error, and the
// next change works.
func TestCanceledStatement(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	other, err := pgx.Connect(ctx, server.URL())
	require.NoError(t, err)
	defer other.Close(ctx)
	for _, end := range []string{"pg_cancel_backend", "pg_terminate_backend"} {
		tx, err := other.Begin(ctx)
		require.NoError(t, err)
		_, err = tx.Exec(ctx, "select from apikeys.head for update")
		require.NoError(t, err)
		done := make(chan error, 1)
		go func() { done <- put(ctx, b, "k", 0) }()
		const waiting = "from pg_stat_activity where wait_event_type = 'Lock'"
		server.Await(t, "select count(*) "+waiting, "1")
		server.Exec(t, "select "+end+"(pid) "+waiting)
		err = <-done
		require.ErrorContains(t, err, "pgstore: write: ")
		require.NotErrorIs(t, err, backend.ErrConflict)
		require.NoError(t, tx.Rollback(ctx))
	}
	require.NoError(t, put(ctx, b, "k", 0), "nothing was changed")
}

// A connection that is dead delays the callers of one group, and no others.
func TestDeadConnection(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	require.NoError(t, put(ctx, b, "k", 0))
	pid, err := strconv.Atoi(server.Exec(t, "select pid from pg_stat_activity where query like "+
		"'%apply%' and pid <> pg_backend_pid()"))
	require.NoError(t, err)
	require.NoError(t, syscall.Kill(pid, syscall.SIGSTOP))
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	patient, cancel := context.WithCancel(context.Background())
	defer cancel()
	stuck := make(chan error, 1)
	go func() { stuck <- put(patient, b, "stuck", 0) }()
	for n := range uint64(20) {
		require.Eventually(t, func() bool {
			limited, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			err := put(limited, b, "k", n+1)
			if errors.Is(err, backend.ErrConflict) { // an earlier attempt was only too slow
				e, getErr := b.Get(ctx, []byte("k"))
				return getErr == nil && e.Revision == n+2
			}
			return err == nil
		}, patience, time.Millisecond)
	}
	cancel()
	if err := <-stuck; err != nil { // nil: another change had the dead connection
		require.ErrorIs(t, err, context.Canceled)
	}
}

// A server that accepts no writes changes nothing, and says so. The store continues afterwards.
func TestReadOnlyServer(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	require.NoError(t, put(ctx, b, "k", 0))
	server.Set(t, "default_transaction_read_only = on")
	require.Eventually(t, func() bool { // a connection reads the settings between two statements
		err := b.Apply(ctx, backend.Change{Key: []byte("probe")})
		return err != nil && strings.Contains(err.Error(), "target_session_attrs=read-write")
	}, patience, time.Millisecond)
	e, err := b.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, uint64(1), e.Revision)
	other, err := pgx.Connect(ctx, server.URL("default_transaction_read_only", "off"))
	require.NoError(t, err)
	defer other.Close(ctx)
	_, err = other.Exec(ctx, "alter system reset default_transaction_read_only")
	require.NoError(t, err)
	server.Exec(t, "select pg_reload_conf()")
	require.Eventually(t, func() bool { return put(ctx, b, "k", 1) == nil }, patience,
		10*time.Millisecond)
}

// A full disk refuses changes with ErrFull, and changes nothing. Once there is space again, changes
// work.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("A TEST OF A FULL DISK NEEDS ROOT, to mount a tmpfs")
	}
	server := pglab.Start(t, pglab.Config{NoSync: true})
	small := filepath.Join(server.Dir, "small")
	require.NoError(t, os.Mkdir(small, 0o755))
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=24m,mode=777", "tmpfs",
		small).CombinedOutput()
	if err != nil {
		t.Skipf("A TEST OF A FULL DISK NEEDS A TMPFS: mount: %v: %s", err, out)
	}
	t.Cleanup(func() {
		server.Kill()
		_ = exec.Command("umount", "-l", small).Run()
	})
	// The write-ahead log stays on the large disk: PostgreSQL ends if there is no space for it.
	space := server.Mkdir(t, "small/space")
	server.Exec(t, "create tablespace small location '"+space+"'")
	server.Exec(t, "alter database template1 set default_tablespace = small")
	server.Exec(t, "alter role postgres set default_tablespace = small")
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	require.Equal(t, "small", server.Exec(t, "select t.spcname from pg_class c join pg_tablespace t "+
		"on t.oid = c.reltablespace where c.oid = 'apikeys.entry'::regclass"))

	ctx := within(t, 2*patience)
	value := bytes.Repeat([]byte("0123456789abcdef"), backend.MaxValueSize/16)
	rand.Read(value)
	written, full := 0, error(nil)
	for full == nil && written < 10_000 {
		full = b.Apply(ctx, backend.Change{Key: fmt.Append(nil, written), Value: value})
		if full == nil {
			written++
		}
	}
	// For a moment, other changes do not take the space that a restriction may need.
	require.ErrorIs(t, b.Apply(ctx, backend.Change{Key: []byte("small")}), backend.ErrFull)
	require.ErrorIs(t, full, backend.ErrFull)
	require.ErrorContains(t, full, "no disk space")
	_, err = b.Get(ctx, fmt.Append(nil, written))
	require.ErrorIs(t, err, backend.ErrNotFound, "nothing was changed")
	e, err := b.Get(ctx, fmt.Append(nil, written-1))
	require.NoError(t, err)
	require.Equal(t, value, e.Value)

	out, err = exec.Command("mount", "-o", "remount,size=64m", small).CombinedOutput()
	require.NoError(t, err, string(out))
	require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("restricts"), Restricts: true}))
	require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("small")}))
}

// A client that verifies the certificate of the server refuses another certificate.
func TestTLS(t *testing.T) {
	t.Parallel()
	ca, stranger := newAuthority(t), newAuthority(t)
	server := pglab.Start(t, pglab.Config{NoSync: true, HBA: []string{"hostnossl all all all reject"}})
	server.Set(t, "ssl_cert_file = '"+server.File(t, "tls.crt", ca.issued)+"'",
		"ssl_key_file = '"+server.File(t, "tls.key", ca.key)+"'", "ssl = on")
	file := func(a *authority) string {
		name := filepath.Join(t.TempDir(), "ca.crt")
		require.NoError(t, os.WriteFile(name, a.own, 0o600))
		return name
	}
	verify := func(host, root string) string {
		return strings.Replace(server.URL("sslmode", "verify-full", "sslrootcert", root),
			"127.0.0.1", host, 1)
	}
	remotetest.UseEachMethod(t, open(t, newPool(t, verify("127.0.0.1", file(ca))), "apikeys", alone))
	refused(t, newPool(t, verify("127.0.0.1", file(stranger))), "apikeys", alone,
		"does not trust the certificate", "sslrootcert")
	refused(t, newPool(t, verify("localhost", file(ca))), "apikeys", alone,
		"does not trust the certificate")
	refused(t, newPool(t, server.URL()), "apikeys", alone, "pg_hba.conf")

	plain := pglab.Start(t, pglab.Config{NoSync: true})
	refused(t, newPool(t, plain.URL("sslmode", "verify-full", "sslrootcert", file(ca))), "apikeys",
		alone, "ssl = on")
}

// An authority is a certificate authority with one certificate for 127.0.0.1.
type authority struct{ own, issued, key []byte }

func newAuthority(t *testing.T) *authority {
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		require.NoError(t, err)
		return key
	}
	encode := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	rootKey, key := newKey(), newKey()
	own, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	require.NoError(t, err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"},
		NotBefore: root.NotBefore, NotAfter: root.NotAfter,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	issued, err := x509.CreateCertificate(rand.Reader, leaf, root, key.Public(), rootKey)
	require.NoError(t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return &authority{encode("CERTIFICATE", own), encode("CERTIFICATE", issued),
		encode("PRIVATE KEY", der)}
}

// Another program damages an entry. The damage is reported, and ends no feed.
func TestDamagedEntry(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	r := read(ctx, b, 0)
	r.next(t)
	for _, key := range []string{"a", "b", "c"} {
		require.NoError(t, put(ctx, b, key, 0))
		r.next(t)
	}
	server.Exec(t, "update apikeys.entry set revision = 0 where key = 'b'")
	_, err := b.Get(ctx, []byte("b"))
	require.ErrorIs(t, err, backend.ErrCorrupt)
	for _, scan := range []func(yield func(backend.Entry, error) bool){
		b.Scan(ctx, nil, nil), b.ScanDown(ctx, nil, nil), b.Snapshot(ctx, nil, nil),
	} {
		n, last := 0, error(nil)
		for _, err := range scan {
			require.NoError(t, last)
			n, last = n+1, err
		}
		require.Equal(t, 2, n, "one entry, and the error")
		require.ErrorIs(t, last, backend.ErrCorrupt)
	}
	require.NoError(t, put(ctx, b, "a", 1))
	require.Equal(t, "a", string(r.next(t).Changes[0].Key))
	// The log is gone: nothing is served, and no feed continues.
	server.Exec(t, "delete from apikeys.log")
	require.ErrorIs(t, r.fails(t), backend.ErrGap)
	_, err = b.Get(ctx, []byte("a"))
	require.Error(t, err)
	require.Error(t, put(ctx, b, "a", 2))
}

// A loop over a Feed, a scan or a Snapshot leaves no goroutine, however the loop ends, and Close
// leaves none.
func TestNoGoroutineIsLeft(t *testing.T) { // not parallel: it counts goroutines
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pool := newPool(t, server.URL())
	remotetest.UseEachMethod(t, open(t, pool, "warm", alone))
	before := goleak.IgnoreCurrent()
	b, err := pgstore.Open(context.Background(), pool, newSchema(), alone)
	require.NoError(t, err)
	require.NoError(t, put(context.Background(), b, "k", 0))
	opened := goleak.IgnoreCurrent()
	none := func(what string, since goleak.Option) {
		t.Helper()
		require.Eventually(t, func() bool { return goleak.Find(since) == nil }, patience,
			10*time.Millisecond, "%s: %v", what, goleak.Find(since))
	}
	remotetest.EndLoops(t, b, func(after string) { none(after, opened) })
	none("Close", before)
	server.Await(t, "select count(*) from pg_stat_activity where backend_type = 'client backend' "+
		"and query like '%feed%' and pid <> pg_backend_pid()", "0")
}
