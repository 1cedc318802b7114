package admin_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func withToken(token string) grpc.DialOption {
	return grpc.WithPerRPCCredentials(keycreds.New(token))
}

// The ceiling, for each caller, each key and each method that changes a key. The expected result
// is computed here from the words of the rule, and not from the code under test.
func TestCeilingMatrix(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	now := time.Now()
	soon, late := now.Add(time.Hour), now.Add(2*time.Hour)
	type caller struct {
		clients
		scopes  []string
		expires time.Time
		socket  bool
	}
	callers := map[string]caller{"the socket": {r.local(t), nil, time.Time{}, true}}
	for name, spec := range map[string]keystore.Spec{
		"a writer":                {Scopes: []string{"keys:write"}},
		"a writer of orders":      {Scopes: []string{"keys:write", "orders:*"}},
		"a writer until soon":     {Scopes: []string{"keys:write", "orders:*"}, ExpiresAt: soon},
		"an administrator":        {Scopes: []string{"keys:admin"}},
		"an administrator of all": {Scopes: []string{"keys:*"}, ExpiresAt: soon},
	} {
		issued := keystoretest.MustCreate(t, r.store, spec)
		callers[name] = caller{
			r.with(t, issued.Secret.Reveal()), spec.Scopes, spec.ExpiresAt, false}
	}
	keys := map[string]keystore.Spec{
		"no scope":               {},
		"orders:read":            {Scopes: []string{"orders:read"}},
		"orders:read until soon": {Scopes: []string{"orders:read"}, ExpiresAt: soon},
		"orders:read until late": {Scopes: []string{"orders:read"}, ExpiresAt: late},
		"orders:*":               {Scopes: []string{"orders:*"}, ExpiresAt: soon},
		"billing":                {Scopes: []string{"billing"}, ExpiresAt: soon},
		"keys:write":             {Scopes: []string{"keys:write"}, ExpiresAt: soon},
		"keys:admin":             {Scopes: []string{"keys:admin"}, ExpiresAt: soon},
		"keys:*":                 {Scopes: []string{"keys:*"}, ExpiresAt: soon},
		"*":                      {Scopes: []string{"*"}, ExpiresAt: soon},
	}
	isAdmin := func(scopes []string) bool {
		return slices.ContainsFunc(scopes, func(s string) bool {
			return s == "keys:admin" || s == "keys:*" || s == "*"
		})
	}
	covers := func(c caller, scopes []string) bool {
		for _, s := range scopes {
			orders := strings.HasPrefix(s, "orders:") && slices.Contains(c.scopes, "orders:*")
			if !orders && !slices.Contains(c.scopes, s) {
				return false
			}
		}
		return true
	}
	outlives := func(c caller, expiry time.Time) bool { // expiry is later than the caller's own
		return !c.expires.IsZero() && (expiry.IsZero() || expiry.After(c.expires))
	}
	toProto := func(spec keystore.Spec) *adminpb.Key {
		k := &adminpb.Key{DisplayName: "changed", Scopes: spec.Scopes}
		if !spec.ExpiresAt.IsZero() {
			k.ExpireTime = timestamppb.New(spec.ExpiresAt)
		}
		return k
	}
	for callerName, c := range callers {
		free := c.socket || isAdmin(c.scopes)
		for keyName, spec := range keys {
			t.Run(callerName+"/"+keyName, func(t *testing.T) {
				touch, cover := !isAdmin(spec.Scopes), covers(c, spec.Scopes)
				last := !outlives(c, spec.ExpiresAt)
				id := keystoretest.MustCreate(t, r.store, spec).Key.ID
				other := keystoretest.MustCreate(t, r.store, keystore.Spec{}).Key.ID
				name := "keys/" + id
				ctx := t.Context()
				check := func(method string, err error, may bool) {
					t.Helper()
					if free || may {
						require.NoError(t, err, method)
						return
					}
					require.Error(t, err, method)
					requireStatus(t, err, codes.PermissionDenied, "SCOPE_CEILING")
				}
				for _, dry := range []bool{true, false} {
					_, err := c.CreateKey(ctx,
						&adminpb.CreateKeyRequest{Key: toProto(spec), ValidateOnly: dry})
					check("create", err, cover && last)
					_, err = c.UpdateKey(ctx, &adminpb.UpdateKeyRequest{ValidateOnly: dry,
						Key: &adminpb.Key{Name: name, DisplayName: "changed"}})
					check("update of the name", err, touch && cover)
					_, err = c.UpdateKey(ctx, &adminpb.UpdateKeyRequest{ValidateOnly: dry,
						Key: &adminpb.Key{Name: name, ExpireTime: timestamppb.New(soon.Add(-1))}})
					check("update to an earlier expiry", err, touch && cover)
					into := toProto(spec)
					into.Name = "keys/" + other
					_, err = c.UpdateKey(ctx, &adminpb.UpdateKeyRequest{ValidateOnly: dry, Key: into,
						UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"*"}}})
					// The other key never expires, so an expiry that never comes is no change.
					check("update of another key", err, cover && (last || spec.ExpiresAt.IsZero()))
				}
				restoreExpiry(t, r.store, id, spec.ExpiresAt)
				_, err := c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name})
				check("rotate", err, touch && cover && last)
				_, err = c.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: name})
				check("enable", err, touch && cover)
				_, err = c.DisableKey(ctx, &adminpb.DisableKeyRequest{Name: name})
				check("disable", err, touch)
				_, err = c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name})
				check("revoke", err, touch)
			})
		}
	}
}

func restoreExpiry(t testing.TB, store *keystore.Store, id string, at time.Time) {
	t.Helper()
	_, err := store.Update(t.Context(), id, func(s *keystore.Spec) error {
		s.ExpiresAt = at
		return nil
	})
	require.NoError(t, err)
}

// The metadata of the error say what the caller's key lacks.
func TestCeilingSaysWhatIsMissing(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	until := time.Now().Add(time.Hour).UTC()
	issued := keystoretest.MustCreate(t, r.store,
		keystore.Spec{Scopes: []string{"keys:write", "a"}, ExpiresAt: until})
	c := r.with(t, issued.Secret.Reveal())
	_, err := c.CreateKey(t.Context(), &adminpb.CreateKeyRequest{
		Key: &adminpb.Key{DisplayName: "x", Scopes: []string{"a", "b", "c:*"}}})
	require.Equal(t, map[string]string{"scopes": "b c:*"},
		requireStatus(t, err, codes.PermissionDenied, "SCOPE_CEILING"))
	_, err = c.CreateKey(t.Context(), &adminpb.CreateKeyRequest{
		Key: &adminpb.Key{DisplayName: "x", Scopes: []string{"a"}}})
	require.Equal(t, map[string]string{"expire_time": until.Format(time.RFC3339Nano)},
		requireStatus(t, err, codes.PermissionDenied, "SCOPE_CEILING"))
}

// A key that gets another scope between the check of the ceiling and the change is checked again.
// The store is wrapped so that the other change comes exactly then.
func TestCeilingIsCheckedInsideTheWrite(t *testing.T) {
	for name, call := range map[string]func(context.Context, clients, string) error{
		"rotate": func(ctx context.Context, c clients, name string) error {
			_, err := c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name})
			return err
		},
		"rotate with the next etag": func(ctx context.Context, c clients, name string) error {
			_, err := c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name, Etag: "2"})
			return err
		},
		"enable": func(ctx context.Context, c clients, name string) error {
			_, err := c.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: name})
			return err
		},
		"update": func(ctx context.Context, c clients, name string) error {
			_, err := c.UpdateKey(ctx, &adminpb.UpdateKeyRequest{
				Key: &adminpb.Key{Name: name, DisplayName: "mine"}})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			gate := newGate()
			store, err := keystore.New(gate, nil)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, store.Close()) })
			r := newRig(t, store)
			writer, _ := r.holder(t, "keys:write")
			// Read the writer's key once, so that the gate sees only reads of the other key.
			_, err = writer.CreateKey(t.Context(), &adminpb.CreateKeyRequest{
				Key: &adminpb.Key{DisplayName: "warm"}})
			require.NoError(t, err)
			target := keystoretest.MustCreate(t, store, keystore.Spec{}).Key
			if name == "enable" {
				require.NoError(t, store.Disable(t.Context(), target.ID, ""))
			}
			admit := func(s *keystore.Spec) error { s.Scopes = []string{"keys:admin"}; return nil }
			reads := gate.afterNextRead(func() {
				_, err := store.Update(context.Background(), target.ID, admit)
				assert.NoError(t, err)
			})
			err = call(t.Context(), writer, "keys/"+target.ID)
			require.True(t, reads(), "the other change came between")
			if name == "rotate with the next etag" {
				requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
			} else {
				requireStatus(t, err, codes.PermissionDenied, "SCOPE_CEILING")
			}
			after, err := store.Get(t.Context(), target.ID)
			require.NoError(t, err)
			require.Equal(t, target.Name, after.Name)
			require.True(t, after.PreviousUntil.IsZero())
			require.Equal(t, fmt.Sprint(name == "enable"), fmt.Sprint(!after.DisabledAt.IsZero()))
		})
	}
}
