package interceptor_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A fakeVerifier admits one token, for tests of a server that need no store.
type fakeVerifier struct {
	token string
	key   *keystore.Key
}

func (f fakeVerifier) Verify(_ context.Context, token string) (*keystore.Key, error) {
	if token != f.token {
		return nil, keystore.ErrUnknown
	}
	return f.key, nil
}

func (f fakeVerifier) Bind(ctx context.Context, token string) (*keystore.Session, error) {
	key, err := f.Verify(ctx, token)
	if err != nil {
		return nil, err
	}
	return keystore.NewSession(ctx, key), nil
}

// A Verifier need not be a store: a test of a server may use a fake.
func ExampleVerifier() {
	fake := fakeVerifier{
		token: "a token",
		key:   keystore.NewKey(keystore.Spec{Owner: "team-a", Scopes: []string{"orders:read"}}),
	}
	auth, err := interceptor.New(fake)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(auth.ServerOptions()...)
	defer server.Stop()

	session, err := fake.Bind(context.Background(), "a token")
	if err != nil {
		log.Fatal(err)
	}
	defer session.Close()
	fmt.Println(session.Key().Owner, session.Key().HasScope("orders:read"))
	_, err = fake.Bind(context.Background(), "another token")
	fmt.Println(err)
	// Output:
	// team-a true
	// API key denied: unknown
}
