package admin_test

import (
	"context"
	"io"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// A method of one of the services, and who may call it.
type method struct {
	protoreflect.MethodDescriptor
	full string
}

func allMethods() (all []method) {
	services := adminpb.File_grpcapikey_admin_v1_admin_proto.Services()
	for i := range services.Len() {
		for j := range services.Get(i).Methods().Len() {
			m := services.Get(i).Methods().Get(j)
			all = append(all, method{m, "/" + string(m.Parent().FullName()) + "/" + string(m.Name())})
		}
	}
	return all
}

// call calls the method with an empty request, and returns the error. If the method has not failed
// after its first response, call returns nil.
func (m method) call(t testing.TB, conn *grpc.ClientConn) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	desc := &grpc.StreamDesc{
		ServerStreams: m.IsStreamingServer(), ClientStreams: m.IsStreamingClient()}
	stream, err := conn.NewStream(ctx, desc, m.full)
	if err != nil {
		return err
	}
	_ = stream.SendMsg(dynamicpb.NewMessage(m.Input()))
	_ = stream.CloseSend()
	if err = stream.RecvMsg(dynamicpb.NewMessage(m.Output())); err == io.EOF {
		return nil
	}
	return err
}

// want says which scope each method needs.
var want = map[string][]string{
	"keys:read": {"GetKey", "ListKeys", "LookupKey", "ListEvents", "WatchEvents", "GetStats"},
	"keys:write": {"CreateKey", "UpdateKey", "RotateKey", "DisableKey", "EnableKey",
		"RevokeKey", "SetCredits", "AddCredits"},
	"keys:admin": {"BatchRevokeKeys", "PurgeKeys", "Backup", "Restore", "CheckIntegrity"},
}

// Each method refuses exactly the callers without its scope, on every kind of server. The requests
// are empty, so an accepted call may fail for another reason.
func TestEveryMethodByScope(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	methods := allMethods()
	all := slices.Concat(want["keys:read"], want["keys:write"], want["keys:admin"])
	require.Len(t, methods, len(all))
	for _, m := range methods {
		require.Contains(t, all, string(m.Name()))
	}

	ruleless, err := interceptor.New(r.store)
	require.NoError(t, err)
	noRules, roots := serveTLS(t, r.srv, ruleless, ruleless.ServerOptions()...)
	open, openRoots := serveTLS(t, r.srv, nil) // no Authenticator

	accepted := func(t *testing.T, m method, conn *grpc.ClientConn) {
		t.Helper()
		switch status.Code(m.call(t, conn)) {
		case codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented, codes.Unavailable:
			t.Fatalf("%s is refused: %v", m.full, m.call(t, conn))
		}
	}
	for _, m := range methods {
		t.Run(string(m.Name()), func(t *testing.T) {
			accepted(t, m, r.local(t).conn)
			requireStatus(t, m.call(t, r.with(t, "").conn), codes.Unauthenticated,
				"CREDENTIALS_MISSING")
			bare := &rig{tls: open, roots: openRoots}
			token := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: []string{"*"}})
			requireStatus(t, m.call(t, bare.with(t, token.Secret.Reveal()).conn),
				codes.Unauthenticated, "PRINCIPAL_MISSING")
			for _, scopes := range [][]string{
				nil, {"keys:read"}, {"keys:write"}, {"keys:admin"}, {"keys:*"}, {"orders:*"},
			} {
				issued := keystoretest.MustCreate(t, r.store, keystore.Spec{Scopes: scopes})
				may := slices.ContainsFunc(scopes, func(s string) bool {
					return s == "keys:admin" || s == "keys:*" ||
						slices.Contains(want[s], string(m.Name()))
				})
				for server, on := range map[string]*rig{
					"with Rules": r, "without Rules": {tls: noRules, roots: roots},
				} {
					conn := on.with(t, issued.Secret.Reveal()).conn
					if may {
						accepted(t, m, conn)
						continue
					}
					metadata := requireStatus(t, m.call(t, conn), codes.PermissionDenied,
						"INSUFFICIENT_SCOPE")
					require.Contains(t, metadata["scopes"], "keys:admin", server)
				}
			}
		})
	}
}

// On a socket, the interceptors accept a key too. The key then has its ceiling.
func TestAKeyOnTheSocket(t *testing.T) {
	store := keystoretest.New(t, nil)
	srv, err := admin.New(store)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	auth, err := interceptor.New(store, append(admin.Rules(), interceptor.RequireTLS())...)
	require.NoError(t, err)
	server := grpc.NewServer(append(auth.ServerOptions(), grpc.Creds(admin.PeerCredentials()))...)
	srv.Register(server)
	path := socketDir(t) + "/s"
	listener, err := admin.ListenUnix(path)
	require.NoError(t, err)
	require.Equal(t, path, listener.Addr().String())
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	for name, creds := range map[string]grpc.DialOption{
		"local":    grpc.WithTransportCredentials(local.NewCredentials()),
		"insecure": grpc.WithTransportCredentials(insecure.NewCredentials()),
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, "unix:"+path, creds)
			_, err = c.ListKeys(t.Context(), &adminpb.ListKeysRequest{})
			requireStatus(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
		})
	}
	reader := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: []string{"keys:read"}})
	c := dial(t, "unix:"+path, grpc.WithTransportCredentials(local.NewCredentials()),
		withToken(reader.Secret.Reveal()))
	_, err = c.ListKeys(t.Context(), &adminpb.ListKeysRequest{})
	require.NoError(t, err, "RequireTLS accepts the socket")
	_, err = c.Backup(t.Context(), &adminpb.BackupRequest{})
	require.NoError(t, err)
	backup, err := c.Backup(t.Context(), &adminpb.BackupRequest{})
	require.NoError(t, err)
	_, err = backup.Recv()
	requireStatus(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
}

func TestSecretMethods(t *testing.T) {
	const prefix = "/grpcapikey.admin.v1."
	require.Equal(t, []string{
		prefix + "KeyService/CreateKey", prefix + "KeyService/RotateKey",
		prefix + "KeyService/LookupKey",
		prefix + "StoreService/Backup", prefix + "StoreService/Restore",
	}, admin.SecretMethods())
}

// A server with the KeyService alone takes the KeyRules, and RequireRules finds no method without a
// rule. Check reports the rules of the other service.
func TestRules(t *testing.T) {
	store := keystoretest.New(t, nil)
	srv, err := admin.New(store)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	for name, tt := range map[string]struct {
		rules    []interceptor.Option
		register func(grpc.ServiceRegistrar)
		ok       bool
	}{
		"both services": {admin.Rules(), srv.Register, true},
		"keys":          {admin.KeyRules(), srv.RegisterKeys, true},
		"too many":      {admin.Rules(), srv.RegisterKeys, false},
		"too few":       {admin.KeyRules(), srv.Register, false},
		"none":          {nil, srv.Register, false},
	} {
		t.Run(name, func(t *testing.T) {
			auth, err := interceptor.New(store, append(tt.rules, interceptor.RequireRules())...)
			require.NoError(t, err)
			server := grpc.NewServer(auth.ServerOptions()...)
			tt.register(server)
			require.Equal(t, tt.ok, auth.Check(server) == nil)
		})
	}
}

// A field that the server does not know may be a restriction, wherever it is.
func TestUnknownFieldsAreRefused(t *testing.T) {
	c := newRig(t, keystoretest.New(t, nil)).local(t)
	unknown := protowire.AppendTag(nil, 999, protowire.VarintType)
	unknown = protowire.AppendVarint(unknown, 1)
	for name, m := range map[string]proto.Message{
		"the request":   &adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "a"}},
		"the key":       (&adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "a"}}).Key,
		"in the filter": &adminpb.Filter{Owner: "acme"},
	} {
		t.Run(name, func(t *testing.T) {
			m.ProtoReflect().SetUnknown(unknown)
			var err error
			switch m := m.(type) {
			case *adminpb.CreateKeyRequest:
				_, err = c.CreateKey(t.Context(), m)
			case *adminpb.Key:
				_, err = c.CreateKey(t.Context(), &adminpb.CreateKeyRequest{Key: m})
			case *adminpb.Filter:
				var stream grpc.ServerStreamingClient[adminpb.BatchRevokeKeysResponse]
				stream, err = c.BatchRevokeKeys(t.Context(),
					&adminpb.BatchRevokeKeysRequest{Filter: m})
				require.NoError(t, err)
				_, err = stream.Recv()
			}
			requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
			require.Contains(t, err.Error(), "older than the client")
		})
	}
}
