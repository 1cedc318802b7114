package admin_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestCredits(t *testing.T) {
	ctx := t.Context()
	store := keystoretest.New(t, nil)
	r := newRig(t, store)
	local := r.local(t)
	monthly := &adminpb.Credits{Remaining: 10, Refill: &adminpb.Refill{Amount: 20,
		When: &adminpb.Refill_MonthDay{MonthDay: 31}}}
	created := create(t, local, &adminpb.Key{DisplayName: "a", Credits: monthly})
	equal := func(want *adminpb.Credits, k *adminpb.Key) {
		t.Helper()
		require.True(t, proto.Equal(want, k.Credits), "%v", k.Credits)
	}
	equal(monthly, created.Key)
	name := created.Key.Name
	get := func() *adminpb.Key {
		t.Helper()
		got, err := local.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
		require.NoError(t, err)
		return got.Key
	}
	for range 4 {
		_, err := store.Verify(ctx, created.Secret)
		require.NoError(t, err)
	}
	monthly.Remaining = 6
	equal(monthly, get())
	looked, err := local.LookupKey(ctx, &adminpb.LookupKeyRequest{Token: created.Secret})
	require.NoError(t, err)
	equal(monthly, looked.Key)

	// An update leaves the credits alone, also if the key in the request has some.
	for _, mask := range [][]string{nil, {"*"}, {"owner"}} {
		key := get()
		key.Owner, key.Credits = "o", &adminpb.Credits{Remaining: 1000}
		updated, err := local.UpdateKey(ctx, &adminpb.UpdateKeyRequest{Key: key,
			UpdateMask: &fieldmaskpb.FieldMask{Paths: mask}})
		require.NoError(t, err)
		equal(monthly, updated.Key)
	}
	_, err = local.UpdateKey(ctx, &adminpb.UpdateKeyRequest{Key: get(),
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"credits"}}})
	requireCode(t, err, codes.InvalidArgument)

	// A repeated request adds once.
	add := &adminpb.AddCreditsRequest{Name: name, Add: 5, RequestId: uuid.NewString()}
	for range 2 {
		added, err := local.AddCredits(ctx, add)
		require.NoError(t, err)
		monthly.Remaining = 11
		equal(monthly, added.Key)
	}
	etag := get().Etag
	hourly := &adminpb.Credits{Remaining: 3, Refill: &adminpb.Refill{Amount: 4,
		When: &adminpb.Refill_Every{Every: durationpb.New(time.Hour)}}}
	set, err := local.SetCredits(ctx, &adminpb.SetCreditsRequest{Name: name, Etag: etag,
		Limit: &adminpb.SetCreditsRequest_Credits{Credits: hourly}})
	require.NoError(t, err)
	equal(hourly, set.Key)
	_, err = local.AddCredits(ctx, &adminpb.AddCreditsRequest{Name: name, Add: 1, Etag: etag})
	requireCode(t, err, codes.Aborted)
	listed, err := local.ListKeys(ctx, &adminpb.ListKeysRequest{})
	require.NoError(t, err)
	require.Len(t, listed.Keys, 1)
	equal(hourly, listed.Keys[0])

	for _, limit := range []*adminpb.SetCreditsRequest{
		{}, // by accident
		{Limit: &adminpb.SetCreditsRequest_Unlimited{}},
		{Limit: &adminpb.SetCreditsRequest_Credits{Credits: &adminpb.Credits{Remaining: -1}}},
		{Limit: &adminpb.SetCreditsRequest_Credits{Credits: &adminpb.Credits{
			Refill: &adminpb.Refill{}}}},
		{Limit: &adminpb.SetCreditsRequest_Credits{Credits: &adminpb.Credits{
			Refill: &adminpb.Refill{Amount: 5}}}},
	} {
		limit.Name = name
		_, err := local.SetCredits(ctx, limit)
		requireCode(t, err, codes.InvalidArgument)
	}
	equal(hourly, get())
	unlimited, err := local.SetCredits(ctx, &adminpb.SetCreditsRequest{Name: name,
		Limit: &adminpb.SetCreditsRequest_Unlimited{Unlimited: true}})
	require.NoError(t, err)
	require.Nil(t, unlimited.Key.Credits)
	_, err = local.AddCredits(ctx, &adminpb.AddCreditsRequest{Name: name, Add: 1})
	requireCode(t, err, codes.InvalidArgument)

	events, err := local.ListEvents(ctx, &adminpb.ListEventsRequest{Key: name, Action: "credits"})
	require.NoError(t, err)
	require.Len(t, events.Events, 3)
	require.EqualValues(t, 6, events.Events[0].CreditsBefore.Remaining)
	require.EqualValues(t, 11, events.Events[0].Credits.Remaining)
	require.Nil(t, events.Events[2].Credits)
	require.NotEmpty(t, events.Events[0].Actor)
}

// A repeated request adds once, also if the store has failed during or after the first call.
func TestARepeatedRequestAddsOnce(t *testing.T) {
	errLost := errors.New("the connection is lost")
	for _, c := range []struct {
		name      string
		write     func(gate *gate, apply func() error) error
		between   bool // another caller adds 100 between the two calls
		repeat    codes.Code
		remaining int64
	}{
		{"the answer of the write is lost", func(_ *gate, apply func() error) error {
			return errors.Join(apply(), errLost)
		}, false, codes.Aborted, 15},
		{"the answer is lost, and the key changes", func(_ *gate, apply func() error) error {
			return errors.Join(apply(), errLost)
		}, true, codes.Aborted, 115},
		{"the write is lost", func(*gate, func() error) error { return errLost },
			false, codes.OK, 15},
		{"the write is lost, and the key changes", func(*gate, func() error) error { return errLost },
			true, codes.Aborted, 110},
		{"the key cannot be read afterwards", func(gate *gate, apply func() error) error {
			err := apply()
			gate.failReads(errLost)
			return err
		}, false, codes.OK, 15},
		{"the key cannot be read, and changes", func(gate *gate, apply func() error) error {
			err := apply()
			gate.failReads(errLost)
			return err
		}, true, codes.OK, 115},
	} {
		for _, local := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, local: %v", c.name, local), func(t *testing.T) {
				ctx := t.Context()
				gate := newGate()
				store, err := keystore.New(gate, nil)
				require.NoError(t, err)
				t.Cleanup(func() { require.NoError(t, store.Close()) })
				r := newRig(t, store)
				root := r.local(t)
				caller := root
				if !local {
					caller, _ = r.holder(t, "keys:write")
				}
				name := create(t, root, &adminpb.Key{DisplayName: "a",
					Credits: &adminpb.Credits{Remaining: 10}}).Key.Name
				request := &adminpb.AddCreditsRequest{Name: name, Add: 5,
					RequestId: uuid.NewString()}
				gate.onWrites(func(apply func() error) error { return c.write(gate, apply) })
				_, err = caller.AddCredits(ctx, request)
				requireCode(t, err, codes.Unavailable)
				gate.onWrites(nil)
				gate.failReads(nil)
				if c.between {
					_, err = root.AddCredits(ctx, &adminpb.AddCreditsRequest{Name: name, Add: 100})
					require.NoError(t, err)
				}
				for range 2 {
					_, err = caller.AddCredits(ctx, request)
					requireCode(t, err, c.repeat)
				}
				got, err := root.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
				require.NoError(t, err)
				require.Equal(t, c.remaining, got.Key.Credits.Remaining)
			})
		}
	}
}

// Requests with different ids that race for one key all add.
func TestRequestsWithIDsRace(t *testing.T) {
	const n = 20
	r := newRig(t, keystoretest.New(t, nil))
	local := r.local(t)
	name := create(t, local, &adminpb.Key{DisplayName: "a",
		Credits: &adminpb.Credits{}}).Key.Name
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			_, err := local.AddCredits(t.Context(), &adminpb.AddCreditsRequest{Name: name, Add: 1,
				RequestId: uuid.NewString()})
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	got, err := local.GetKey(t.Context(), &adminpb.GetKeyRequest{Name: name})
	require.NoError(t, err)
	require.EqualValues(t, n, got.Key.Credits.Remaining)
}

// Credits are within the ceiling of the caller: who may not enable a key may not give it credits.
func TestCreditsWithinTheCeiling(t *testing.T) {
	ctx := t.Context()
	r := newRig(t, keystoretest.New(t, nil))
	local := r.local(t)
	key := create(t, local, &adminpb.Key{DisplayName: "a", Scopes: []string{"keys:admin"},
		Credits: &adminpb.Credits{Remaining: 1}}).Key
	writer, _ := r.holder(t, "keys:write")
	_, err := writer.SetCredits(ctx, &adminpb.SetCreditsRequest{Name: key.Name,
		Limit: &adminpb.SetCreditsRequest_Unlimited{Unlimited: true}})
	requireCode(t, err, codes.PermissionDenied)
	_, err = writer.AddCredits(ctx, &adminpb.AddCreditsRequest{Name: key.Name, Add: 1})
	requireCode(t, err, codes.PermissionDenied)
	own := create(t, writer, &adminpb.Key{DisplayName: "b", Credits: &adminpb.Credits{}}).Key
	added, err := writer.AddCredits(ctx, &adminpb.AddCreditsRequest{Name: own.Name, Add: 7})
	require.NoError(t, err)
	require.EqualValues(t, 7, added.Key.Credits.Remaining)
}

func requireCode(t *testing.T, err error, want codes.Code) {
	t.Helper()
	require.Equal(t, want, status.Code(err), "%v", err)
}
