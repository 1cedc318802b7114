package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An admin is a service of your program that manages keys. It runs in the process that has the
// store.
type admin struct{ store *keystore.Store }

// revokeKey is a method whose argument is the ID of a key.
func (a *admin) revokeKey(ctx context.Context, id *wrapperspb.StringValue) (*emptypb.Empty, error) {
	by, ok := interceptor.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "this method must not be public")
	}
	// for the audit trail
	err := a.store.Revoke(keystore.WithActor(ctx, by.ID), id.GetValue(), "by an administrator")
	switch {
	case err == nil:
		return &emptypb.Empty{}, nil
	case errors.Is(err, keystore.ErrNotFound):
		return nil, status.Error(codes.NotFound, "there is no such key")
	case errors.Is(err, keystore.ErrInvalid):
		// it says which argument, and holds no key
		return nil, status.Error(codes.InvalidArgument, err.Error())
	default:
		return nil, status.Error(codes.Unavailable, "the key may be revoked or not: try again")
	}
}

// A program manages its own keys: one of its methods, which needs the key of an administrator,
// revokes other keys.
func Example_admin() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := keystore.Open(dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	auth, err := interceptor.New(store,
		interceptor.Require("/acme.keys.v1.Admin/RevokeKey", "keys:admin"))
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(auth.ServerOptions()...)
	defer server.Stop()
	a := &admin{store} // to be registered with the server, from code that is generated

	// The process itself creates the key of the first administrator, for example for a flag of the
	// command line.
	ctx := context.Background()
	root, err := store.Create(ctx, keystore.Spec{Name: "root", Scopes: []string{"keys:admin"}})
	if err != nil {
		log.Fatal(err)
	}
	leaked, err := store.Create(ctx, keystore.Spec{Name: "leaked"})
	if err != nil {
		log.Fatal(err)
	}
	ctx = interceptor.NewContext(ctx, root.Key) // as in a call with that key
	for _, id := range []string{leaked.Key.ID, "01k9x3v7q2f8hr6m5w0c4tzbnd", "nonsense"} {
		_, err = a.revokeKey(ctx, wrapperspb.String(id))
		fmt.Println(status.Code(err))
	}
	_, err = store.Verify(ctx, leaked.Secret.Reveal())
	fmt.Println(err)
	// Output:
	// OK
	// NotFound
	// InvalidArgument
	// API key denied: revoked
}
