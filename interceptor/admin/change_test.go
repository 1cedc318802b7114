package admin_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// Of many callers with the same etag, one changes the key, whatever each caller wants to do.
func TestEtagsUnderRacingWriters(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	local := r.local(t)
	writer, _ := r.holder(t, "keys:write")
	for range 20 {
		key := create(t, local, &adminpb.Key{DisplayName: "a"}).Key
		calls := []func(c clients) error{
			func(c clients) error {
				_, err := c.UpdateKey(t.Context(), &adminpb.UpdateKeyRequest{
					Key: &adminpb.Key{Name: key.Name, Etag: key.Etag, Owner: "me"}})
				return err
			},
			func(c clients) error {
				_, err := c.RotateKey(t.Context(),
					&adminpb.RotateKeyRequest{Name: key.Name, Etag: key.Etag})
				return err
			},
			func(c clients) error {
				_, err := c.DisableKey(t.Context(),
					&adminpb.DisableKeyRequest{Name: key.Name, Etag: key.Etag})
				return err
			},
			func(c clients) error {
				_, err := c.RevokeKey(t.Context(),
					&adminpb.RevokeKeyRequest{Name: key.Name, Etag: key.Etag})
				return err
			},
		}
		results := make(chan error, 2*len(calls))
		var racers sync.WaitGroup
		for _, call := range calls {
			for _, c := range []clients{local, writer} {
				racers.Go(func() { results <- call(c) })
			}
		}
		racers.Wait()
		close(results)
		won := 0
		for err := range results {
			if err == nil {
				won++
				continue
			}
			requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
		}
		require.Equal(t, 1, won)
		after, err := local.GetKey(t.Context(), &adminpb.GetKeyRequest{Name: key.Name})
		require.NoError(t, err)
		require.Equal(t, "2", after.Key.Etag)
	}
	key := create(t, local, &adminpb.Key{DisplayName: "a"}).Key
	for _, c := range []clients{local, writer} { // the next etag, before the key has it
		_, err := c.UpdateKey(t.Context(), &adminpb.UpdateKeyRequest{
			Key: &adminpb.Key{Name: key.Name, Etag: "2", Owner: "me"}})
		requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
		_, err = c.RotateKey(t.Context(), &adminpb.RotateKeyRequest{Name: key.Name, Etag: "2"})
		requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
		_, err = c.EnableKey(t.Context(), &adminpb.EnableKeyRequest{Name: key.Name, Etag: "2"})
		requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
		_, err = c.DisableKey(t.Context(), &adminpb.DisableKeyRequest{Name: key.Name, Etag: "2"})
		requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
		_, err = c.RevokeKey(t.Context(), &adminpb.RevokeKeyRequest{Name: key.Name, Etag: "2"})
		requireStatus(t, err, codes.Aborted, "ETAG_MISMATCH")
	}
	for _, etag := range []string{"0", "x", "-1", "1.0", `"1"`} {
		_, err := local.EnableKey(t.Context(), &adminpb.EnableKeyRequest{Name: key.Name, Etag: etag})
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	}
}

// The answer to a call is lost on the way: the client's call has ended when the store makes the
// key. A repeat gets the secret of the first call, and no second key is made.
func TestRequestIDUnderALostAnswer(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	srv, err := admin.New(store)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	// ended receives a value when the server has noticed the end of a call.
	ended := make(chan struct{}, 100)
	server := grpc.NewServer(grpc.Creds(admin.PeerCredentials()), grpc.ChainUnaryInterceptor(func(
		ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
	) (any, error) {
		defer context.AfterFunc(ctx, func() { ended <- struct{}{} })()
		return handler(ctx, req)
	}))
	srv.Register(server)
	path := filepath.Join(socketDir(t), "s")
	listener, err := admin.ListenUnix(path)
	require.NoError(t, err)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	local := dial(t, "unix:"+path, localCreds)
	target := create(t, local, &adminpb.Key{DisplayName: "target"}).Key
	for name, call := range map[string]func(ctx context.Context, id string) (proto.Message, error){
		"create": func(ctx context.Context, id string) (proto.Message, error) {
			return local.CreateKey(ctx, &adminpb.CreateKeyRequest{
				Key: &adminpb.Key{DisplayName: "a"}, RequestId: id})
		},
		"rotate": func(ctx context.Context, id string) (proto.Message, error) {
			return local.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: target.Name, RequestId: id})
		},
	} {
		t.Run(name, func(t *testing.T) {
			id := uuid.NewString()
			writing, write := make(chan struct{}), make(chan struct{})
			var once sync.Once
			gate.onWrites(func(apply func() error) error {
				once.Do(func() { close(writing) })
				<-write
				return apply()
			})
			defer gate.onWrites(nil)
			ctx, lose := context.WithCancel(t.Context())
			lost := make(chan error, 1)
			go func() {
				_, err := call(ctx, id)
				lost <- err
			}()
			<-writing
			lose()
			require.Equal(t, codes.Canceled, status.Code(<-lost))
			<-ended // no other call ends before its answer

			// Repeats arrive while the first call is still in progress.
			const repeats = 3
			answers := make(chan proto.Message, repeats)
			var racers sync.WaitGroup
			for range repeats {
				racers.Go(func() {
					m, err := call(t.Context(), id)
					if err == nil {
						answers <- m
					}
				})
			}
			close(write)
			racers.Wait()
			gate.onWrites(nil)
			last, err := call(t.Context(), id)
			require.NoError(t, err)
			require.Len(t, answers, repeats)
			for range repeats {
				require.True(t, proto.Equal(last, <-answers)) // Equal would print the secret
			}
			secret := last.(interface{ GetSecret() string }).GetSecret()
			_, err = store.Verify(t.Context(), secret)
			require.NoError(t, err)
			other, err := call(t.Context(), uuid.NewString())
			require.NoError(t, err)
			require.False(t, secret == other.(interface{ GetSecret() string }).GetSecret())
		})
	}
	changes := store.Stats().Changes
	require.EqualValues(t, 3, changes[keystore.ActionCreate], "the target, a key, and another key")
	require.EqualValues(t, 2, changes[keystore.ActionRotate])
}

func TestRequestID(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	local := r.local(t)
	writer, _ := r.holder(t, "keys:write")
	request := func(name string) *adminpb.CreateKeyRequest {
		return &adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: name},
			RequestId: "f81d4fae-7dec-41d0-a765-00a0c91e6bf6"}
	}
	first, err := local.CreateKey(t.Context(), request("a"))
	require.NoError(t, err)
	again, err := local.CreateKey(t.Context(), request("a"))
	require.NoError(t, err)
	require.True(t, proto.Equal(first, again))
	_, err = local.CreateKey(t.Context(), request("b"))
	requireStatus(t, err, codes.InvalidArgument, "REQUEST_ID_REUSED")
	other, err := writer.CreateKey(t.Context(), request("a"))
	require.NoError(t, err)
	require.False(t, proto.Equal(first, other), "another principal has other requests")

	// A call that fails leaves no answer, and validate_only does not use the id.
	bad := request("")
	bad.RequestId = uuid.NewString()
	_, err = local.CreateKey(t.Context(), bad)
	requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	bad.Key.DisplayName, bad.ValidateOnly = "a", true
	dry, err := local.CreateKey(t.Context(), bad)
	require.NoError(t, err)
	require.Empty(t, dry.Secret)
	bad.ValidateOnly = false
	made, err := local.CreateKey(t.Context(), bad)
	require.NoError(t, err)
	require.NotEmpty(t, made.Secret)

	for _, id := range []string{"1", "f81d4fae7dec41d0a76500a0c91e6bf6",
		"{f81d4fae-7dec-41d0-a765-00a0c91e6bf6}", strings.Repeat("x", 36)} {
		bad.RequestId = id
		_, err = local.CreateKey(t.Context(), bad)
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	}

	r.srv.Close()
	_, err = local.CreateKey(t.Context(), request("a"))
	requireStatus(t, err, codes.Unavailable, "STORE_CLOSED")
}

func TestUpdateMask(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	c := r.local(t)
	full := func() *adminpb.Key {
		return &adminpb.Key{
			DisplayName: "a", Owner: "o", Scopes: []string{"s"},
			Metadata:        map[string]string{"k": "v"},
			ExpireTime:      timestamppb.New(time.Now().Add(time.Hour)),
			StartTime:       secondsAgo(60),
			AllowedNetworks: []string{"192.0.2.0/24"},
			RateLimit:       &adminpb.RateLimit{PerSecond: 1, Burst: 1},
		}
	}
	inputs := []string{"display_name", "owner", "scopes", "metadata", "expire_time", "start_time",
		"allowed_networks", "rate_limit"}
	// input returns the fields of a key that a caller can set.
	input := func(k *adminpb.Key) *adminpb.Key {
		only := new(adminpb.Key).ProtoReflect()
		for _, name := range inputs {
			f := only.Descriptor().Fields().ByName(protoName(name))
			if k.ProtoReflect().Has(f) {
				only.Set(f, k.ProtoReflect().Get(f))
			}
		}
		return only.Interface().(*adminpb.Key)
	}
	update := func(name string, k *adminpb.Key, paths ...string) (*adminpb.Key, error) {
		k = proto.CloneOf(k)
		k.Name = name
		r, err := c.UpdateKey(t.Context(), &adminpb.UpdateKeyRequest{
			Key: k, UpdateMask: &fieldmaskpb.FieldMask{Paths: paths}})
		return r.GetKey(), err
	}
	other := &adminpb.Key{DisplayName: "b", Owner: "p", Scopes: []string{"t", "u"},
		Metadata: map[string]string{"l": "w"}, ExpireTime: timestamppb.New(time.Now().Add(9e12)),
		StartTime: secondsAgo(30), AllowedNetworks: []string{"2001:db8::/32"},
		RateLimit: &adminpb.RateLimit{PerSecond: 2, Burst: 2}}
	for _, path := range inputs {
		t.Run(path, func(t *testing.T) {
			key := create(t, c, full()).Key
			f := key.ProtoReflect().Descriptor().Fields().ByName(protoName(path))
			want := input(key)
			want.ProtoReflect().Set(f, other.ProtoReflect().Get(f))
			got, err := update(key.Name, other, path)
			require.NoError(t, err)
			require.Equal(t, want.String(), input(got).String(), "only %s has changed", path)
			if path == "display_name" {
				_, err = update(key.Name, new(adminpb.Key), path)
				requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
				require.Contains(t, err.Error(), "display_name is empty")
				return
			}
			want.ProtoReflect().Clear(f)
			got, err = update(key.Name, new(adminpb.Key), path)
			require.NoError(t, err)
			require.Equal(t, want.String(), input(got).String(), "%s is cleared", path)
			got, err = update(key.Name, &adminpb.Key{Owner: "p"})
			require.NoError(t, err)
			want.Owner = "p"
			require.Equal(t, want.String(), input(got).String(), "an empty mask changes what is set")
		})
	}
	key := create(t, c, full()).Key
	got, err := update(key.Name, &adminpb.Key{DisplayName: "b"}, "*")
	require.NoError(t, err)
	require.Equal(t, (&adminpb.Key{DisplayName: "b"}).String(), input(got).String())
	got, err = update(key.Name, other, "owner", "scopes", "owner")
	require.NoError(t, err)
	require.Equal(t, "p", got.Owner)
	same, err := update(key.Name, new(adminpb.Key))
	require.NoError(t, err)
	require.Equal(t, got.Etag, same.Etag, "nothing is set, and nothing changes")

	fields := key.ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		path := string(fields.Get(i).Name())
		if input(full()).ProtoReflect().Has(fields.Get(i)) {
			continue
		}
		_, err := update(key.Name, full(), path)
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
		require.Contains(t, err.Error(), fmt.Sprintf("%q", path))
	}
	for _, paths := range [][]string{{"nonsense"}, {"metadata.k"}, {"owner", "*"}, {""}, {"Owner"}} {
		_, err := update(key.Name, full(), paths...)
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	}
}

// With validate_only, a call has the result of the real call, and writes nothing.
func TestValidateOnly(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	name := create(t, c, &adminpb.Key{DisplayName: "a", Owner: "o"}).Key.Name
	revoked := create(t, c, &adminpb.Key{DisplayName: "a"}).Key.Name
	_, err := c.RevokeKey(t.Context(), &adminpb.RevokeKeyRequest{Name: revoked})
	require.NoError(t, err)
	long := &adminpb.Key{Metadata: map[string]string{"a": strings.Repeat("x", 17<<10)}}
	for label, k := range map[string]*adminpb.Key{
		"fine":            {Name: name, DisplayName: "b", Scopes: []string{"s"}},
		"an etag":         {Name: name, Etag: "9", DisplayName: "b"},
		"a revoked key":   {Name: revoked, DisplayName: "b"},
		"no such key":     {Name: "keys/" + noID, DisplayName: "b"},
		"a bad scope":     {Name: name, DisplayName: "b", Scopes: []string{"a b"}},
		"the past":        {Name: name, DisplayName: "b", ExpireTime: secondsAgo(1)},
		"too large":       {Name: name, DisplayName: "b", Metadata: long.Metadata},
		"a bad network":   {Name: name, DisplayName: "b", AllowedNetworks: []string{"x"}},
		"a bad limit":     {Name: name, DisplayName: "b", RateLimit: &adminpb.RateLimit{}},
		"a bad time":      {Name: name, DisplayName: "b", ExpireTime: &timestamppb.Timestamp{Nanos: -1}},
		"the zero time":   {Name: name, DisplayName: "b", StartTime: timestamppb.New(time.Time{})},
		"nothing at all":  nil,
		"an empty key":    {},
		"another version": {Name: name, DisplayName: "b", Etag: "x"},
	} {
		t.Run(label, func(t *testing.T) {
			changes := store.Stats().Changes
			dryUpdate, dryErr := c.UpdateKey(t.Context(),
				&adminpb.UpdateKeyRequest{Key: k, ValidateOnly: true})
			dryCreate, dryCreateErr := c.CreateKey(t.Context(),
				&adminpb.CreateKeyRequest{Key: k, ValidateOnly: true})
			require.Equal(t, changes, store.Stats().Changes, "nothing was written")

			update, err := c.UpdateKey(t.Context(), &adminpb.UpdateKeyRequest{Key: k})
			requireSameStatus(t, err, dryErr)
			if err == nil {
				require.Equal(t, update.Key.String(), dryUpdate.Key.String())
			}
			created, err := c.CreateKey(t.Context(), &adminpb.CreateKeyRequest{Key: k})
			requireSameStatus(t, err, dryCreateErr)
			if err == nil {
				require.Empty(t, dryCreate.Secret)
				require.Empty(t, dryCreate.Key.Name+dryCreate.Key.Hint+dryCreate.Key.Etag)
				dryCreate.Key.Name, dryCreate.Key.Hint = created.Key.Name, created.Key.Hint
				dryCreate.Key.Etag = created.Key.Etag
				dryCreate.Key.CreateTime = created.Key.CreateTime
				require.Equal(t, created.Key.String(), dryCreate.Key.String())
			}
		})
	}
}

// requireSameStatus requires the same code and the same reason.
func requireSameStatus(t testing.TB, want, got error) {
	t.Helper()
	require.Equal(t, status.Code(want), status.Code(got), "%v", got)
	if want != nil {
		reason := status.Convert(want).Details()[0].(*errdetails.ErrorInfo).Reason
		requireStatus(t, got, status.Code(want), reason)
	}
}

// The statuses of the errors of a store.
func TestStatuses(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	c := newRig(t, store).local(t)
	ctx := t.Context()
	name := create(t, c, &adminpb.Key{DisplayName: "a"}).Key.Name

	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: "keys/" + noID})
	requireStatus(t, err, codes.NotFound, "KEY_NOT_FOUND")
	_, err = c.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: "keys/" + noID})
	requireStatus(t, err, codes.NotFound, "KEY_NOT_FOUND")
	_, err = c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name, Reason: strings.Repeat("x", 1025)})
	requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	_, err = c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name, Grace: durationpb.New(-1)})
	requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	_, err = c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name,
		Grace: &durationpb.Duration{Seconds: 1, Nanos: -1}})
	requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	_, err = c.LookupKey(ctx, &adminpb.LookupKeyRequest{Token: "x", ClientAddress: "y"})
	requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	for _, before := range []*timestamppb.Timestamp{nil, secondsAgo(-60)} {
		for _, dry := range []bool{true, false} {
			purge := &adminpb.PurgeKeysRequest{Before: before, ValidateOnly: dry}
			_, err = c.PurgeKeys(ctx, purge)
			requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
		}
	}
	_, err = c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name})
	require.NoError(t, err)
	_, err = c.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: name})
	requireStatus(t, err, codes.FailedPrecondition, "KEY_REVOKED")
	_, err = c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name})
	requireStatus(t, err, codes.FailedPrecondition, "KEY_REVOKED")

	write := func() error {
		_, err := c.CreateKey(ctx, &adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "b"}})
		return err
	}
	gate.onWrites(func(func() error) error { return errors.Join(backend.ErrFull, syscall.ENOSPC) })
	requireStatus(t, write(), codes.Unavailable, "STORE_FULL")
	gate.onWrites(nil)
	requireOutcomeUnknown(t)

	gate.failReads(errors.New("the disk is gone"))
	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	requireStatus(t, err, codes.Unavailable, "STORE_UNAVAILABLE")
	require.NotContains(t, err.Error(), "disk", "the reason goes to the logger")
	requireRetryInfo(t, err)
	gate.failReads(fmt.Errorf("key x: %w", backend.ErrCorrupt))
	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	requireStatus(t, err, codes.DataLoss, "STORE_CORRUPT")
	gate.failReads(nil)

	require.NoError(t, store.Close())
	_, err = c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name})
	requireStatus(t, err, codes.Unavailable, "STORE_CLOSED")
	requireStatus(t, write(), codes.Unavailable, "STORE_CLOSED")
}

// requireOutcomeUnknown requires the status of a write that takes too long. The store is another
// one, because a slow machine exceeds a short Timeout also in calls that must succeed.
func requireOutcomeUnknown(t *testing.T) {
	t.Helper()
	gate := newGate()
	store, err := keystore.New(gate, &keystore.Options{Timeout: time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	c := newRig(t, store).local(t)
	release := make(chan struct{})
	gate.onWrites(func(apply func() error) error { <-release; return apply() })
	_, err = c.CreateKey(t.Context(),
		&adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "b"}})
	close(release)
	requireStatus(t, err, codes.Unavailable, "OUTCOME_UNKNOWN")
	requireRetryInfo(t, err)
}

func requireRetryInfo(t testing.TB, err error) {
	t.Helper()
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			require.Positive(t, info.RetryDelay.AsDuration())
			return
		}
	}
	t.Fatalf("no RetryInfo: %v", err)
}

// A text in the wrong place may be a secret: no status repeats it.
func TestNoStatusRepeatsASecret(t *testing.T) {
	r := newRig(t, keystoretest.New(t, nil))
	c := r.local(t)
	secret := create(t, c, &adminpb.Key{DisplayName: "a"}).Secret
	ctx := t.Context()
	var failures []error
	try := func(_ any, err error) { failures = append(failures, err) }
	for _, name := range []string{secret, "keys/" + secret} {
		try(c.GetKey(ctx, &adminpb.GetKeyRequest{Name: name}))
		try(c.RotateKey(ctx, &adminpb.RotateKeyRequest{Name: name, RequestId: uuid.NewString()}))
		try(c.RevokeKey(ctx, &adminpb.RevokeKeyRequest{Name: name}))
		try(c.UpdateKey(ctx, &adminpb.UpdateKeyRequest{Key: &adminpb.Key{Name: name}}))
		try(c.ListEvents(ctx, &adminpb.ListEventsRequest{Key: name}))
	}
	try(c.CreateKey(ctx, &adminpb.CreateKeyRequest{RequestId: secret}))
	try(c.EnableKey(ctx, &adminpb.EnableKeyRequest{Name: "keys/" + noID, Etag: secret}))
	try(c.ListKeys(ctx, &adminpb.ListKeysRequest{PageToken: secret}))
	try(c.LookupKey(ctx, &adminpb.LookupKeyRequest{ClientAddress: secret}))
	try(c.CreateKey(ctx, &adminpb.CreateKeyRequest{
		Key: &adminpb.Key{DisplayName: "a", AllowedNetworks: []string{secret}}}))
	for i, err := range failures {
		require.Error(t, err, i)
		text := fmt.Sprintf("%v %v", err, status.Convert(err).Details())
		require.False(t, strings.Contains(text, secret), "failure %d repeats the secret", i)
		require.False(t, strings.Contains(text, secret[len(secret)-20:]), "failure %d", i)
	}
}

func TestLookup(t *testing.T) {
	store := keystoretest.New(t, nil)
	r := newRig(t, store)
	c, _ := r.holder(t, "keys:read") // over TCP, so the caller has an address
	limited := keystoretest.MustCreate(t, store, keystore.Spec{
		AllowedNetworks: nil, RateLimit: keystore.RateLimit{PerSecond: 1e-9, Burst: 1}})
	token := limited.Secret.Reveal()
	look := func(r *adminpb.LookupKeyRequest) *adminpb.LookupKeyResponse {
		t.Helper()
		got, err := c.LookupKey(t.Context(), r)
		require.NoError(t, err)
		return got
	}
	for range 3 {
		require.Empty(t, look(&adminpb.LookupKeyRequest{Token: token}).Refusal,
			"LookupKey takes nothing from the limit")
	}
	_, err := store.Verify(t.Context(), token)
	require.NoError(t, err)
	require.Equal(t, "rate_limited", look(&adminpb.LookupKeyRequest{Token: token}).Refusal)

	got := look(&adminpb.LookupKeyRequest{Token: "nonsense"})
	require.Equal(t, "malformed", got.Refusal)
	require.Empty(t, got.ClaimedName)
	require.Nil(t, got.Key)
	elsewhere := keystoretest.MustCreate(t, keystoretest.New(t, nil), keystore.Spec{})
	got = look(&adminpb.LookupKeyRequest{Token: elsewhere.Secret.Reveal()})
	require.Equal(t, "unknown", got.Refusal)
	require.Nil(t, got.Key)
	require.Equal(t, "keys/"+elsewhere.Key.ID, got.ClaimedName)

	at := create(t, r.local(t), &adminpb.Key{DisplayName: "a",
		AllowedNetworks: []string{"127.0.0.0/8"}})
	got = look(&adminpb.LookupKeyRequest{Token: at.Secret})
	require.Equal(t, "network", got.Refusal, "the address of the caller of LookupKey is another one")
	require.Equal(t, at.Key.Name, got.Key.Name)
	got = look(&adminpb.LookupKeyRequest{Token: at.Secret, ClientAddress: "127.0.0.9"})
	require.Empty(t, got.Refusal)
}

// Another process of the store does not answer until this process closes the store: the secret of
// a rotation is not lost, and the response says what is not certain. The other changes have a
// status that says so.
func TestNotEverywhere(t *testing.T) {
	for name, call := range map[string]func(c clients, name string) error{
		"rotate": func(c clients, name string) error {
			r, err := c.RotateKey(t.Context(), &adminpb.RotateKeyRequest{Name: name})
			if err == nil && (r.Secret == "" || !r.NotEverywhere || r.Key.Etag != "2") {
				err = errors.New("the response lacks the secret, or what is not certain")
			}
			return err
		},
		"revoke": func(c clients, name string) error {
			_, err := c.RevokeKey(t.Context(), &adminpb.RevokeKeyRequest{Name: name})
			return err
		},
		"add credits": func(c clients, name string) error {
			_, err := c.AddCredits(t.Context(), &adminpb.AddCreditsRequest{Name: name, Add: 1})
			return err
		},
		"set credits": func(c clients, name string) error {
			_, err := c.SetCredits(t.Context(), &adminpb.SetCreditsRequest{Name: name,
				Limit: &adminpb.SetCreditsRequest_Credits{Credits: &adminpb.Credits{Remaining: 1}}})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			shared := backendtest.NewShared()
			open := func(b backend.Feeder) *keystore.Store {
				store, err := keystore.New(b, &keystore.Options{
					Freshness: time.Minute, Timeout: 90 * time.Second})
				require.NoError(t, err)
				return store
			}
			here := open(shared.Open())
			link := badlink.Open(shared)
			there := open(link)
			c := newRig(t, here).local(t)
			key := create(t, c, &adminpb.Key{DisplayName: "a", Credits: &adminpb.Credits{}}).Key
			link.Set(badlink.Faults{Silent: true})
			called := make(chan error, 1)
			go func() { called <- call(c, key.Name) }()
			id := strings.TrimPrefix(key.Name, "keys/")
			require.Eventually(t, func() bool {
				now, err := here.Get(t.Context(), id)
				return err == nil && now.Revision == 2
			}, 30*time.Second, time.Millisecond)
			require.NoError(t, here.Close())
			err := <-called
			if name == "rotate" {
				require.NoError(t, err)
			} else {
				requireStatus(t, err, codes.Unavailable, "NOT_EVERYWHERE")
				// A repeated change of the credits would be another change.
				again := name == "revoke"
				require.Equal(t, again, strings.Contains(err.Error(), "repeat"))
				require.Equal(t, again, slices.ContainsFunc(status.Convert(err).Details(),
					func(detail any) bool { _, ok := detail.(*errdetails.RetryInfo); return ok }))
			}
			link.Set(badlink.Faults{})
			require.NoError(t, there.Close())
			link.Wait()
		})
	}
}

func protoName(name string) protoreflect.Name { return protoreflect.Name(name) }
