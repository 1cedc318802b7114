package interceptor_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A handler that changes everything it can reach of its key changes nothing for later callers.
func TestHostileHandler(t *testing.T) {
	store := openStore(t)
	_, adminToken := issue(t, store, keystore.Spec{Scopes: []string{"*"}})
	admin, err := store.Verify(t.Context(), adminToken)
	require.NoError(t, err)
	decode := func(k *keystore.Key, text string) { _ = json.Unmarshal([]byte(text), k) }
	every := keystore.Spec{Scopes: []string{"*"}}
	later := time.Now().Add(time.Hour)
	attacks := map[string]func(*keystore.Key){
		"scopes in place": func(k *keystore.Key) { k.Scopes()[0] = "admin" },
		"scopes filtered": func(k *keystore.Key) { _ = append(k.Scopes()[:0], "*", "*") },
		"scopes sorted":   func(k *keystore.Key) { slices.Sort(k.Scopes()) },
		"metadata":        func(k *keystore.Key) { k.Metadata()["team"] = "root" },
		"networks":        func(k *keystore.Key) { k.AllowedNetworks()[0] = netip.Prefix{} },
		"revoked":         func(k *keystore.Key) { k.RevokedAt, k.DisabledAt = later, later },
		"expired": func(k *keystore.Key) {
			k.ExpiresAt, k.PreviousUntil = time.Now(), later
		},
		"not yet": func(k *keystore.Key) { k.NotBefore = later },
		"rate limit": func(k *keystore.Key) {
			k.RateLimit.PerSecond, k.RateLimit.Burst = 1, 1
		},
		"identity": func(k *keystore.Key) {
			k.ID, k.Owner, k.Revision = admin.ID, "root", 9
		},
		"the admin's key":    func(k *keystore.Key) { *k = *admin },
		"no key":             func(k *keystore.Key) { *k = keystore.Key{} },
		"a key of its own":   func(k *keystore.Key) { *k = *keystore.NewKey(every) },
		"JSON with a scope":  func(k *keystore.Key) { decode(k, `{"Scopes":["*","*"]}`) },
		"JSON without scope": func(k *keystore.Key) { decode(k, `{"Scopes":null}`) },
	}
	for name, attack := range attacks {
		for _, methods := range [][2]string{{emptyCall, duplex}, {duplex, emptyCall}} {
			kinds := map[string]string{emptyCall: "unary", duplex: "stream"}
			attacked, other := kinds[methods[0]], kinds[methods[1]]
			t.Run(name+"/"+attacked, func(t *testing.T) {
				key, token := issue(t, store, keystore.Spec{
					Scopes:          []string{"read", "audit"},
					Metadata:        map[string]string{"team": "a"},
					AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
					ExpiresAt:       time.Now().Add(time.Hour),
				})
				attack := func(ctx context.Context) error {
					k, ok := interceptor.FromContext(ctx)
					if !assert.True(t, ok) {
						return errors.New("the handler has no key")
					}
					attack(k)
					return nil
				}
				svc := &service{empty: attack, duplex: func(s duplexStream) error {
					return attack(s.Context())
				}}
				auth := newAuth(t, store,
					interceptor.Require(methods[0], "read"),
					interceptor.Require(methods[1], "admin"))
				conn := dial(t, serve(t, svc, auth.ServerOptions()...))
				for range 3 {
					got := both(withKey(t.Context(), token), conn)
					require.NoError(t, got[attacked])
					requireRefused(t, got[other], codes.PermissionDenied, "INSUFFICIENT_SCOPE")
				}
				require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
				for _, err := range both(withKey(t.Context(), token), conn) {
					requireRefused(t, err, codes.Unauthenticated, "API_KEY_INVALID")
				}
			})
		}
	}
}

// Handlers that run at the same time may do with the copies of one key what they like: no data
// race.
func TestCopiesOfOneKeyShareNoMemory(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{
		Scopes:          []string{"write", "read"},
		Metadata:        map[string]string{"team": "a"},
		AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")},
	})
	svc := &service{empty: func(ctx context.Context) error {
		k, _ := interceptor.FromContext(ctx)
		scopes := k.Scopes()
		slices.Sort(scopes)
		_ = append(scopes[:0], "admin")
		k.Metadata()["team"] = "root"
		k.AllowedNetworks()[0] = netip.Prefix{}
		return nil
	}}
	auth := newAuth(t, store, interceptor.Require(emptyCall, "read"))
	client := testpb.NewTestServiceClient(dial(t, serve(t, svc, auth.ServerOptions()...)))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				_, err := client.EmptyCall(withKey(t.Context(), token), &testpb.Empty{})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	key, err := store.Verify(fromHere(t.Context()), token)
	require.NoError(t, err)
	require.Equal(t, []string{"write", "read"}, key.Scopes())
	require.Equal(t, map[string]string{"team": "a"}, key.Metadata())
}

// fromHere returns a context with the address of a caller on this machine.
func fromHere(ctx context.Context) context.Context {
	return keystore.WithClientAddr(ctx, netip.MustParseAddr("127.0.0.1"))
}
