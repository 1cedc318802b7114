package sharedlab

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// refused requires that Open returns an error that says something, and does not wait for the end of
// the context.
func refused(t *testing.T, client *clientv3.Client, prefix string, says ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := etcdstore.Open(ctx, client, prefix, nil)
	require.Error(t, err)
	require.Nil(t, b)
	require.NoError(t, ctx.Err(), "Open waited although waiting could not help: %v", err)
	for _, text := range says {
		require.ErrorContains(t, err, text)
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	_, certFile, keyFile := a.issue("server")
	own, _, _ := a.issue("client")
	l := StartEtcd(t, EtcdConfig{NoSync: true, Certificate: certFile, Key: keyFile, CA: a.file()})
	with := func(c *tls.Config) func(*clientv3.Config) {
		return func(cfg *clientv3.Config) { cfg.TLS = c }
	}
	good := &tls.Config{RootCAs: a.pool, Certificates: []tls.Certificate{own}}
	remotetest.UseEachMethod(t, open(t, l.Client(t, with(good)), newPrefix()))

	refused(t, l.Client(t, with(&tls.Config{RootCAs: a.pool})), "/p/", "client certificate")
	stranger, _, _ := newAuthority(t).issue("stranger")
	refused(t, l.Client(t, with(&tls.Config{RootCAs: a.pool,
		Certificates: []tls.Certificate{stranger}})), "/p/", "client certificate")
	refused(t, l.Client(t, with(&tls.Config{RootCAs: x509.NewCertPool(),
		Certificates: []tls.Certificate{own}})), "/p/", "does not trust", "RootCAs")
	refused(t, l.Client(t, func(c *clientv3.Config) {
		c.Endpoints = []string{strings.Replace(c.Endpoints[0], "https", "http", 1)}
	}), "/p/", "begin the endpoint with https://")
}

func TestTLSClientOfAServerWithoutTLS(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	refused(t, l.Client(t, func(c *clientv3.Config) {
		c.Endpoints = []string{strings.Replace(c.Endpoints[0], "http", "https", 1)}
	}), "/p/", "if the server does not use TLS")
}

const password = "correct horse battery staple"

// enableAuth makes the user root, and a user for each role. Each role has one right on a prefix.
func enableAuth(t *testing.T, l *Etcd, roles map[string]clientv3.PermissionType, prefix string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c := l.Client(t)
	add := func(user, role string) {
		_, err := c.UserAdd(ctx, user, password)
		require.NoError(t, err)
		_, err = c.RoleAdd(ctx, role)
		require.NoError(t, err)
		_, err = c.UserGrantRole(ctx, user, role)
		require.NoError(t, err)
	}
	add("root", "root")
	for name, right := range roles {
		add(name, name)
		_, err := c.RoleGrantPermission(ctx, name, prefix, clientv3.GetPrefixRangeEnd(prefix),
			right)
		require.NoError(t, err)
	}
	add("stranger", "none")
	_, err := c.AuthEnable(ctx)
	require.NoError(t, err)
}

func TestUserWithLeastRights(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	const prefix = "/apikeys/prod/"
	enableAuth(t, l, map[string]clientv3.PermissionType{
		"app":    clientv3.PermissionType(clientv3.PermReadWrite),
		"reader": clientv3.PermissionType(clientv3.PermRead),
		"writer": clientv3.PermissionType(clientv3.PermWrite),
	}, prefix)
	as := func(user string) *clientv3.Client {
		return l.Client(t, func(c *clientv3.Config) { c.Username, c.Password = user, password })
	}
	const grant = "grant-permission ROLE --prefix=true readwrite " + prefix
	app := as("app")
	refused(t, as("reader"), prefix, "write below", grant)
	remotetest.UseEachMethod(t, open(t, app, prefix))
	remotetest.UseEachMethod(t, open(t, app, prefix)) // the marker is there
	refused(t, app, "/apikeys/test/", "permission denied", "/apikeys/test/")
	refused(t, as("reader"), prefix, "write below", grant)
	refused(t, as("writer"), prefix, "read below", grant)
	refused(t, as("stranger"), prefix, grant)
	refused(t, l.Client(t), prefix, "etcd requires a user")

	// etcd refuses the watch only: the user may read the marker of the store, and no entry.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	rooted := as("root")
	_, err := rooted.RoleAdd(ctx, "marker")
	require.NoError(t, err)
	_, err = rooted.RoleGrantPermission(ctx, "marker", prefix+"\x00", "",
		clientv3.PermissionType(clientv3.PermReadWrite))
	require.NoError(t, err)
	_, err = rooted.UserAdd(ctx, "marker", password)
	require.NoError(t, err)
	_, err = rooted.UserGrantRole(ctx, "marker", "marker")
	require.NoError(t, err)
	var last error
	for _, err := range open(t, as("marker"), prefix).Feed(ctx, nil, nil, 0) {
		require.NoError(t, last)
		last = err
	}
	require.ErrorContains(t, last, grant)

	// The rights are taken away while the store is open.
	b := open(t, app, prefix)
	_, err = rooted.UserRevokeRole(ctx, "app", "app")
	require.NoError(t, err)
	_, get := b.Get(ctx, []byte("k"))
	feed := error(nil)
	for _, err := range b.Feed(ctx, nil, nil, 0) {
		feed = err
	}
	for _, err := range []error{get, feed, b.Apply(ctx, backend.Change{Key: []byte("k")})} {
		require.ErrorContains(t, err, grant)
		require.NotContains(t, err.Error(), password)
	}
}
