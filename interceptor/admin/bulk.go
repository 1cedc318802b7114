package admin

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A batchRevocation is one call of BatchRevokeKeys.
type batchRevocation struct {
	*call
	request *adminpb.BatchRevokeKeysRequest
	query   keystore.Query
	stream  grpc.ServerStreamingServer[adminpb.BatchRevokeKeysResponse]
}

func (s *keyService) BatchRevokeKeys(
	r *adminpb.BatchRevokeKeysRequest,
	stream grpc.ServerStreamingServer[adminpb.BatchRevokeKeysResponse],
) error {
	_, err := answer(s.Server, stream.Context(), adminpb.KeyService_BatchRevokeKeys_FullMethodName,
		r, func(c *call) (struct{}, error) {
			b := &batchRevocation{call: c, request: r, stream: stream}
			return struct{}{}, b.run()
		})
	return err
}

func (b *batchRevocation) run() (err error) {
	r := b.request
	if b.query, err = queryOf(r.Filter); err != nil {
		return err
	}
	if !r.All && proto.Size(r.Filter) == 0 {
		return errNothingSelected
	}
	if r.Expected != nil && *r.Expected < 0 {
		return invalid("expected is negative")
	}
	switch {
	case r.ValidateOnly:
		return b.preview(true)
	case r.Expected != nil && *r.Expected == 0:
		return b.preview(false) // the store takes AtMost 0 for no limit
	default:
		return b.revoke()
	}
}

func errSelection(expected, found int64) error {
	return refuse(codes.FailedPrecondition, "SELECTION_CHANGED",
		fmt.Sprintf("the filter selects %d keys, and %d were expected: look at the keys again",
			found, expected),
		map[string]string{
			"expected": strconv.FormatInt(expected, 10), "found": strconv.FormatInt(found, 10),
		})
}

// preview revokes nothing. If show is true, preview sends the selected keys.
func (b *batchRevocation) preview(show bool) error {
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	n, err := b.store.RevokeAll(ctx, b.query, b.request.Reason, &keystore.RevokeAllOptions{
		All: b.request.All, DryRun: true,
		Progress: func(k *keystore.Key, done int) {
			if show && b.send(k, done) != nil {
				cancel()
			}
		},
	})
	if e := b.request.Expected; err == nil && e != nil && int64(n) > *e {
		err = errSelection(*e, int64(n))
	}
	return err
}

func (b *batchRevocation) send(k *keystore.Key, done int) error {
	return b.stream.Send(&adminpb.BatchRevokeKeysResponse{
		Key: keyProto(k), Done: int64(done), Total: b.request.GetExpected()})
}

// maxUnsent is how many revoked keys wait to be sent. Then a slow client delays the revocation.
const maxUnsent = 1024

// revoke revokes the selected keys, and sends each revoked key. A goroutine sends, so that the
// store writes in the meantime.
//
// If the client goes, or the caller's key no longer permits the call, revoke stops, and the client
// can repeat the call. But if revoke itself has revoked the caller's key, no call with the key
// could revoke the rest: revoke then continues, without a client.
func (b *batchRevocation) revoke() error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(b.ctx))
	defer cancel()
	stop := context.AfterFunc(b.ctx, func() {
		if !errors.Is(context.Cause(b.ctx), keystore.ErrRevoked) || !b.revokedItself() {
			cancel()
		}
	})
	defer stop()
	type revoked struct {
		key  *keystore.Key
		done int
	}
	unsent := make(chan revoked, maxUnsent)
	var sender sync.WaitGroup
	sender.Go(func() {
		gone := false
		for r := range unsent {
			gone = gone || b.send(r.key, r.done) != nil
		}
	})
	_, err := b.store.RevokeAll(ctx, b.query, b.request.Reason, &keystore.RevokeAllOptions{
		All:      b.request.All,
		AtMost:   int(min(b.request.GetExpected(), math.MaxInt)),
		Progress: func(k *keystore.Key, done int) { unsent <- revoked{k, done} },
	})
	close(unsent)
	sender.Wait()
	var excess *keystore.SelectionError
	if errors.As(err, &excess) {
		err = errSelection(b.request.GetExpected(), int64(excess.Selected))
	}
	return err
}

// revokedItself reports whether the holder of the caller's key has revoked the key.
func (b *batchRevocation) revokedItself() bool {
	own := b.caller.Key()
	if own == nil {
		return false
	}
	actor := ""
	revocations := keystore.EventQuery{KeyID: own.ID, Action: keystore.ActionRevoke}
	for event, err := range b.store.Events(context.WithoutCancel(b.ctx), revocations) {
		if err != nil {
			return false
		}
		actor = event.Actor
	}
	return actor == b.caller.Actor()
}
