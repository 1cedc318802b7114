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
		fmt.Sprintf("the filter selects %d keys, and the call expects %d: look at the keys again",
			found, expected),
		map[string]string{
			"expected": strconv.FormatInt(expected, 10), "found": strconv.FormatInt(found, 10),
		})
}

// preview revokes nothing. If show is true, preview sends the selected keys.
func (b *batchRevocation) preview(show bool) error {
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	opts := &keystore.RevokeAllOptions{All: b.request.All, DryRun: true}
	if show {
		keys, finish := b.sender(cancel)
		defer finish()
		opts.Progress = func(k *keystore.Key, _ int) { keys <- k }
	}
	n, err := b.store.RevokeAll(ctx, b.query, b.request.Reason, opts)
	if e := b.request.Expected; err == nil && e != nil && int64(n) > *e {
		err = errSelection(*e, int64(n))
	}
	return err
}

// maxUnsent is how many keys wait to be sent. Then a slow client delays the revocation.
const maxUnsent = 1024

// sender starts a goroutine that sends keys to the client, and returns the channel for the keys.
// The store writes in the meantime. A response has the keys that are ready, so that no key waits
// for the next key, and a fast revocation takes few responses. If the client has gone, the
// goroutine calls gone, and discards the keys. finish waits until all keys are sent.
func (b *batchRevocation) sender(gone func()) (keys chan<- *keystore.Key, finish func()) {
	ready := make(chan *keystore.Key, maxUnsent)
	var sender sync.WaitGroup
	sender.Go(func() {
		done := int64(0)
		for key := range ready {
			r := &adminpb.BatchRevokeKeysResponse{Total: b.request.GetExpected()}
			for more := true; more; {
				r.Keys = append(r.Keys, keyProto(key))
				if len(r.Keys) == maxBatch {
					break
				}
				select {
				case key, more = <-ready:
				default:
					more = false
				}
			}
			done += int64(len(r.Keys))
			r.Done = done
			if b.stream.Send(r) != nil {
				gone()
				for range ready {
				}
			}
		}
	})
	return ready, func() { close(ready); sender.Wait() }
}

// revoke revokes the selected keys, and sends the revoked keys.
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
	// b.ctx has ended, or ends soon, if the client has gone.
	keys, finish := b.sender(func() {})
	defer finish()
	_, err := b.store.RevokeAll(ctx, b.query, b.request.Reason, &keystore.RevokeAllOptions{
		All:      b.request.All,
		AtMost:   int(min(b.request.GetExpected(), math.MaxInt)),
		Progress: func(k *keystore.Key, _ int) { keys <- k },
	})
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
