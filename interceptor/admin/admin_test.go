package admin_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestMain(m *testing.M) {
	runAsChild()
	goleak.VerifyTestMain(m)
}

// runAsChild runs one of the programs of children instead of the tests, if a test has started this
// process for the program.
func runAsChild() {
	if name := os.Getenv("ADMIN_TEST_CHILD"); name != "" {
		if err := children[name](); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

var children = map[string]func() error{}

const noID = "01k9x3v7q2f8hr6m5w0c4tzbnd" // an ID that no key has

// A rig is a store with the service, on a unix socket and over TLS.
type rig struct {
	store *keystore.Store
	srv   *admin.Server
	path  string // of the socket
	tls   string // address of the TLS server
	roots *x509.CertPool
}

// clients are the clients of both services on one connection.
type clients struct {
	adminpb.KeyServiceClient
	adminpb.StoreServiceClient
	conn *grpc.ClientConn
}

func newRig(t testing.TB, store *keystore.Store, opts ...admin.Option) *rig {
	t.Helper()
	srv, err := admin.New(store, opts...)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	r := &rig{store: store, srv: srv, path: filepath.Join(socketDir(t), "admin.sock")}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.ServeUnix(ctx, r.path) }()
	t.Cleanup(func() {
		stop()
		require.NoError(t, <-served)
	})
	awaitSocket(t, r.path)
	auth, err := interceptor.New(store, append(admin.Rules(), interceptor.RequireTLS())...)
	require.NoError(t, err)
	r.tls, r.roots = serveTLS(t, srv, auth, auth.ServerOptions()...)
	return r
}

// serveTLS serves both services over TLS. If auth is not nil, its Check must accept the server.
func serveTLS(
	t testing.TB, srv *admin.Server, auth *interceptor.Authenticator, opts ...grpc.ServerOption,
) (address string, roots *x509.CertPool) {
	t.Helper()
	cert, pem, err := throwaway.Certificate()
	require.NoError(t, err)
	roots = x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(pem))
	creds := grpc.Creds(credentials.NewServerTLSFromCert(&cert))
	server := grpc.NewServer(append(opts, creds)...)
	srv.Register(server)
	if auth != nil {
		require.NoError(t, auth.Check(server))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil { // a short test may end before Serve begins
			require.ErrorIs(t, err, grpc.ErrServerStopped)
		}
	})
	return listener.Addr().String(), roots
}

// socketDir returns a directory with a short path: TempDir of a test with a long name is too long
// for a socket.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// awaitSocket waits until a process listens on a socket.
func awaitSocket(t testing.TB, path string) {
	t.Helper()
	require.Eventually(t, func() bool {
		conn, err := net.Dial("unix", path)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, 30*time.Second, time.Millisecond)
}

func dial(t testing.TB, target string, opts ...grpc.DialOption) clients {
	t.Helper()
	conn, err := grpc.NewClient(target, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return clients{adminpb.NewKeyServiceClient(conn), adminpb.NewStoreServiceClient(conn), conn}
}

// local returns the clients of the socket.
func (r *rig) local(t testing.TB) clients {
	t.Helper()
	return dial(t, "unix:"+r.path, grpc.WithTransportCredentials(local.NewCredentials()))
}

// with returns clients over TLS that send a token. An empty token sends no key.
func (r *rig) with(t testing.TB, token string) clients {
	t.Helper()
	opts := []grpc.DialOption{grpc.WithTransportCredentials(
		credentials.NewTLS(&tls.Config{RootCAs: r.roots}))}
	if token != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(keycreds.New(token)))
	}
	return dial(t, r.tls, opts...)
}

// holder returns the clients of the holder of a new key with the scopes, and the key.
func (r *rig) holder(t testing.TB, scopes ...string) (clients, *keystore.Key) {
	t.Helper()
	issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: scopes})
	return r.with(t, issued.Secret.Reveal()), issued.Key
}

// requireStatus requires the code of an error and the reason of its only ErrorInfo, and returns the
// metadata.
func requireStatus(t testing.TB, err error, code codes.Code, reason string) map[string]string {
	t.Helper()
	st := status.Convert(err)
	require.Equal(t, code, st.Code(), "%v", err)
	var infos []*errdetails.ErrorInfo
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			infos = append(infos, info)
		}
	}
	require.Len(t, infos, 1, "%v", err)
	require.Equal(t, reason, infos[0].Reason, "%v", err)
	require.Equal(t, "github.com/grpc-api-key/grpc-api-key", infos[0].Domain)
	return infos[0].Metadata
}

// stores opens a store on each engine of the root module.
var stores = map[string]func(t testing.TB) *keystore.Store{
	"memory": func(t testing.TB) *keystore.Store { return keystoretest.New(t, nil) },
	"directory": func(t testing.TB) *keystore.Store {
		if bits.UintSize < 64 {
			t.Skip("SKIPPED: a 32-bit system has no store in a directory")
		}
		return keystoretest.Open(t, t.TempDir(), nil)
	},
	"shared": func(t testing.TB) *keystore.Store {
		// With a long freshness, a slow machine closes no gate.
		store, err := keystore.New(backendtest.NewShared().Open(),
			&keystore.Options{Freshness: time.Minute, Timeout: 2 * time.Minute})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, store.Close()) })
		return store
	},
}

func create(t testing.TB, c clients, k *adminpb.Key) *adminpb.CreateKeyResponse {
	t.Helper()
	created, err := c.CreateKey(t.Context(), &adminpb.CreateKeyRequest{Key: k})
	require.NoError(t, err)
	return created
}

func secondsAgo(n int) *timestamppb.Timestamp {
	return timestamppb.New(time.Now().Add(-time.Duration(n) * time.Second))
}

// The life of a key, on each engine, over the socket and over TLS.
func TestLifeOfAKey(t *testing.T) {
	for engine, open := range stores {
		t.Run(engine, func(t *testing.T) {
			r := newRig(t, open(t))
			admins, adminKey := r.holder(t, "keys:admin")
			for transport, tt := range map[string]struct {
				clients
				actor string
			}{
				"socket": {r.local(t), principalHere(t)},
				"TLS":    {admins, "key:" + adminKey.ID},
			} {
				t.Run(transport, func(t *testing.T) { lifeOfAKey(t, r.store, tt.clients, tt.actor) })
			}
		})
	}
}

func lifeOfAKey(t *testing.T, store *keystore.Store, c clients, actor string) {
	ctx := t.Context()
	created := create(t, c, &adminpb.Key{
		DisplayName: "ci", Owner: "acme", Scopes: []string{"orders:*"},
		Metadata:        map[string]string{"team": "1"},
		ExpireTime:      timestamppb.New(time.Now().Add(time.Hour)),
		StartTime:       secondsAgo(100),
		AllowedNetworks: []string{"192.0.2.0/24"},
		RateLimit:       &adminpb.RateLimit{PerSecond: 1.5, Burst: 3},
		State:           adminpb.State_STATE_REVOKED, Hint: "mine", // output only: ignored
	})
	key := created.Key
	name := key.Name
	require.Regexp(t, "^keys/[0-9a-z]{26}$", name)
	require.True(t, strings.HasPrefix(created.Secret, strings.TrimSuffix(key.Hint, "…")))
	require.Equal(t, adminpb.State_STATE_ACTIVE, key.State)
	require.Equal(t, "1", key.Etag)
	stored, err := store.Get(ctx, strings.TrimPrefix(name, "keys/"))
	require.NoError(t, err)
	require.Equal(t, []string{"orders:*"}, stored.Scopes())
	require.Equal(t, "192.0.2.0/24", stored.AllowedNetworks()[0].String())
	require.Equal(t, keystore.RateLimit{PerSecond: 1.5, Burst: 3}, stored.RateLimit)
	got, err := c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	require.NoError(t, err)
	require.Equal(t, key.String(), got.Key.String())

	updated, err := c.UpdateKey(ctx, &adminpb.UpdateKeyRequest{
		Key:        &adminpb.Key{Name: name, Etag: key.Etag, DisplayName: "CI"},
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"display_name", "allowed_networks"}},
	})
	require.NoError(t, err)
	require.Equal(t, "CI", updated.Key.DisplayName)
	require.Empty(t, updated.Key.AllowedNetworks)
	require.Equal(t, "acme", updated.Key.Owner)
	require.Equal(t, "2", updated.Key.Etag)

	session, err := store.Bind(ctx, created.Secret)
	require.NoError(t, err)
	defer session.Close()
	rotated, err := c.RotateKey(ctx, &adminpb.RotateKeyRequest{
		Name: name, Grace: durationpb.New(time.Hour), Etag: "2"})
	require.NoError(t, err)
	require.NotEqual(t, created.Secret, rotated.Secret)
	require.NotNil(t, rotated.Key.PreviousSecretExpireTime)
	require.EqualValues(t, 1, rotated.Key.LiveStreams, "the old secret's stream is open")
	require.NotNil(t, rotated.Key.LastUseTime)
	require.False(t, rotated.NotEverywhere)

	disabled, err := c.DisableKey(ctx, &adminpb.DisableKeyRequest{Name: name, Reason: "for now"})
	require.NoError(t, err)
	require.EqualValues(t, 1, disabled.EndedStreams)
	require.ErrorIs(t, session.Cause(), keystore.ErrDisabled)
	require.Equal(t, adminpb.State_STATE_DISABLED, disabled.Key.State)
	require.Equal(t, "for now", disabled.Key.DisableReason)
	looked, err := c.LookupKey(ctx, &adminpb.LookupKeyRequest{Token: rotated.Secret})
	require.NoError(t, err)
	require.Equal(t, "disabled", looked.Refusal)
	require.Equal(t, name, looked.Key.Name)
	enabled, err := c.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: name})
	require.NoError(t, err)
	require.Equal(t, adminpb.State_STATE_ACTIVE, enabled.Key.State)

	session, err = store.Bind(ctx, rotated.Secret)
	require.NoError(t, err)
	defer session.Close()
	revoked, err := c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name, Reason: "leaked"})
	require.NoError(t, err)
	require.EqualValues(t, 1, revoked.EndedStreams)
	require.ErrorIs(t, session.Cause(), keystore.ErrRevoked)
	require.Equal(t, "leaked", revoked.Key.RevokeReason)
	again, err := c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name, Reason: "again"})
	require.NoError(t, err, "to revoke a revoked key is no error")
	require.Equal(t, "leaked", again.Key.RevokeReason)
	require.Zero(t, again.EndedStreams)

	events, err := c.ListEvents(ctx, &adminpb.ListEventsRequest{Key: name})
	require.NoError(t, err)
	var actions []string
	for i, e := range events.Events {
		actions = append(actions, e.Action)
		require.Equal(t, actor, e.Actor)
		require.Equal(t, name, e.Key)
		require.EqualValues(t, i+1, e.Revision)
	}
	require.Equal(t,
		[]string{"create", "update", "rotate", "disable", "enable", "revoke"}, actions)

	stats, err := c.GetStats(ctx, &adminpb.GetStatsRequest{})
	require.NoError(t, err)
	require.Positive(t, stats.Ended["revoked"])
	require.Positive(t, stats.Changes["create"])
	require.True(t, stats.Fresh)

	backup := readBackup(t, c)
	before := timestamppb.Now()
	dry, err := c.PurgeKeys(ctx, &adminpb.PurgeKeysRequest{Before: before, ValidateOnly: true})
	require.NoError(t, err)
	require.EqualValues(t, 1, dry.Purged)
	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	require.NoError(t, err, "validate_only removes nothing")
	purged, err := c.PurgeKeys(ctx, &adminpb.PurgeKeysRequest{Before: before})
	require.NoError(t, err)
	require.EqualValues(t, 1, purged.Purged)
	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	requireStatus(t, err, codes.NotFound, "KEY_NOT_FOUND")
	require.NoError(t, restore(t, c, backup))
	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	requireStatus(t, err, codes.NotFound, "KEY_NOT_FOUND") // a purged key does not come back
	_, err = c.CheckIntegrity(ctx, &adminpb.CheckIntegrityRequest{})
	require.NoError(t, err)
}

// readBackup returns the parts of a backup.
func readBackup(t testing.TB, c clients) (parts [][]byte) {
	t.Helper()
	stream, err := c.Backup(t.Context(), &adminpb.BackupRequest{})
	require.NoError(t, err)
	for {
		part, err := stream.Recv()
		if err == io.EOF {
			return parts
		}
		require.NoError(t, err)
		require.LessOrEqual(t, len(part.Data), 64<<10)
		parts = append(parts, part.Data)
	}
}

func restore(t testing.TB, c clients, parts [][]byte) error {
	t.Helper()
	stream, err := c.Restore(t.Context())
	require.NoError(t, err)
	for _, part := range parts {
		if stream.Send(&adminpb.RestoreRequest{Data: part}) != nil {
			break // CloseAndRecv has the status
		}
	}
	_, err = stream.CloseAndRecv()
	return err
}

// A backup of many parts comes back into another store.
func TestBackupAndRestore(t *testing.T) {
	from := newRig(t, keystoretest.New(t, nil))
	var names []string
	for range 300 {
		names = append(names, create(t, from.local(t), &adminpb.Key{DisplayName: "a",
			Metadata: map[string]string{"a": strings.Repeat("x", 2000)}}).Key.Name)
	}
	parts := readBackup(t, from.local(t))
	require.Greater(t, len(parts), 8)
	logged := new(strings.Builder)
	to := newRig(t, keystoretest.New(t, nil), admin.Logger(slog.New(slog.NewTextHandler(logged, nil))))
	c := to.local(t)
	requireStatus(t, restore(t, c, parts[:len(parts)-1]), codes.DataLoss, "BACKUP_CORRUPT")
	requireStatus(t, restore(t, c, nil), codes.InvalidArgument, "INVALID_ARGUMENT")
	t.Setenv("TMPDIR", filepath.Join(t.TempDir(), "missing"))
	requireStatus(t, restore(t, c, parts), codes.Unavailable, "STORE_FULL")
	require.Contains(t, logged.String(), "missing", "the log has the error of the system")
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	require.NoError(t, restore(t, c, parts))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	for _, name := range names {
		_, err := c.GetKey(t.Context(), &adminpb.GetKeyRequest{Name: name})
		require.NoError(t, err)
	}
}

func TestNewNeedsAStore(t *testing.T) {
	_, err := admin.New(nil)
	require.Error(t, err)
	srv, err := admin.New(keystoretest.New(t, nil), admin.Option{}, admin.Logger(nil))
	require.NoError(t, err)
	srv.Close()
	srv.Close()
}

// principalHere returns the principal of this process on a socket.
func principalHere(t testing.TB) string {
	t.Helper()
	me, err := user.Current()
	require.NoError(t, err)
	return fmt.Sprintf("unix:%s(%s)", me.Username, me.Uid)
}

// trusting returns the settings of a client that trusts a certificate.
func trusting(pem []byte) *tls.Config {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	return &tls.Config{RootCAs: roots}
}
