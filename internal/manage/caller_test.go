package manage_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func holder(spec keystore.Spec) manage.Caller {
	return manage.KeyHolder("key:a", keystore.NewKey(spec))
}

func TestTheZeroCallerMayDoNothing(t *testing.T) {
	for _, c := range []manage.Caller{{}, manage.KeyHolder("key:a", nil)} {
		for _, scope := range []string{manage.Read, manage.Write, manage.Admin} {
			require.False(t, c.Has(scope))
		}
		require.Error(t, c.MayChange([]string{manage.Admin}))
		require.Error(t, c.MayGrant([]string{"orders:read"}))
		require.Error(t, c.MayLast(time.Now()))
	}
}

func TestScopesOfCallers(t *testing.T) {
	for _, tt := range []struct {
		scopes             []string
		read, write, admin bool
	}{
		{nil, false, false, false},
		{[]string{"orders:*"}, false, false, false},
		{[]string{"keys:read"}, true, false, false},
		{[]string{"keys:write"}, false, true, false},
		{[]string{"keys:read", "keys:write"}, true, true, false},
		{[]string{"keys:admin"}, true, true, true},
		{[]string{"keys:*"}, true, true, true},
		{[]string{"*"}, true, true, true},
		{[]string{"keys:admin:*"}, false, false, false},
	} {
		c := holder(keystore.Spec{Scopes: tt.scopes})
		require.Equal(t, tt.read, c.Has(manage.Read), "%v", tt.scopes)
		require.Equal(t, tt.write, c.Has(manage.Write), "%v", tt.scopes)
		require.Equal(t, tt.admin, c.Has(manage.Admin), "%v", tt.scopes)
	}
	local := manage.LocalUser("unix:0")
	require.True(t, local.Has(manage.Admin))
	require.Equal(t, "unix:0", local.Actor())
	require.NoError(t, local.MayChange([]string{manage.Admin}))
	require.NoError(t, local.MayGrant([]string{"*"}))
	require.NoError(t, local.MayLast(time.Time{}))
}

func TestCeiling(t *testing.T) {
	now := time.Now()
	writer := holder(keystore.Spec{Scopes: []string{"keys:write", "orders:*"}, ExpiresAt: now})
	require.NoError(t, writer.MayGrant(nil))
	require.NoError(t, writer.MayGrant([]string{"orders:read", "orders:*", "keys:write"}))
	var ceiling *manage.CeilingError
	require.ErrorAs(t, writer.MayGrant([]string{"orders:read", "billing", "*"}), &ceiling)
	require.Equal(t, []string{"billing", "*"}, ceiling.Scopes)
	for _, admins := range []string{"keys:admin", "keys:*", "*"} {
		require.Error(t, writer.MayChange([]string{"orders:read", admins}))
		require.Error(t, writer.MayGrant([]string{admins}))
	}
	require.NoError(t, writer.MayChange([]string{"billing"}))

	require.NoError(t, writer.MayLast(now))
	require.ErrorAs(t, writer.MayLast(now.Add(1)), &ceiling)
	require.Equal(t, now, ceiling.ExpiresAt)
	require.Error(t, writer.MayLast(time.Time{}))
	require.NoError(t, holder(keystore.Spec{}).MayLast(time.Time{}))
	require.NoError(t,
		holder(keystore.Spec{Scopes: []string{"keys:admin"}, ExpiresAt: now}).MayLast(time.Time{}))
}
