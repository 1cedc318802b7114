package admin

import (
	"context"
	"errors"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const (
	// beat is the longest time between two responses of a watch.
	beat = 30 * time.Second
	// maxBatch is how many events a response of a watch has at most, and how many keys a response
	// of BatchRevokeKeys has. 64 of the largest keys are smaller than the largest message that
	// gRPC clients accept.
	maxBatch = 64
)

func (s *keyService) WatchEvents(
	r *adminpb.WatchEventsRequest, stream grpc.ServerStreamingServer[adminpb.WatchEventsResponse],
) error {
	_, err := answer(s.Server, stream.Context(), adminpb.KeyService_WatchEvents_FullMethodName, r,
		func(c *call) (struct{}, error) {
			q, err := c.watchQuery(r)
			if err != nil {
				return struct{}{}, err
			}
			return struct{}{}, c.watch(q, stream)
		})
	return err
}

// watchQuery returns the query of a watch, whose After is where the stream begins.
func (c *call) watchQuery(r *adminpb.WatchEventsRequest) (q keystore.EventQuery, err error) {
	if q.KeyID, err = eventKey(r.Key); err != nil {
		return q, err
	}
	if r.After != "" {
		q.After, err = cursorTime(r.After)
		return q, err
	}
	q.After, err = c.lastEvent()
	return q, err
}

// lastEvent returns the time of the last event of the store. An event of another process that comes
// later may have an earlier time than the clock of this process shows, so the clock is a last
// resort, for engines that cannot read backwards.
func (c *call) lastEvent() (time.Time, error) {
	last := keystore.EventQuery{Newest: true, Limit: 1}
	for event, err := range c.store.Events(c.ctx, last) {
		switch {
		case err == nil:
			return event.At, nil
		case errors.Is(err, keystore.ErrInvalid), errors.Is(err, keystore.ErrCorrupt):
			return time.Now(), nil
		default:
			return time.Time{}, err
		}
	}
	return time.Time{}, nil // the store has no event
}

// A watched is a result of Follow.
type watched struct {
	event keystore.Event
	err   error
}

// watch sends the events of a query until the store, the caller or the server ends the stream. A
// goroutine reads the events, so that the stream can send a response without events. The goroutine
// is at most maxBatch events ahead of the client: the store keeps the events for a slow client.
func (c *call) watch(
	q keystore.EventQuery, stream grpc.ServerStreamingServer[adminpb.WatchEventsResponse],
) error {
	ctx, cancel := context.WithCancel(c.ctx)
	results := make(chan watched, maxBatch)
	var reader sync.WaitGroup
	reader.Go(func() {
		for event, err := range c.store.Follow(ctx, q) {
			select {
			case results <- watched{event, err}:
			case <-ctx.Done():
				return
			}
		}
	})
	defer reader.Wait()
	defer cancel()
	response := &adminpb.WatchEventsResponse{Cursor: cursorText(q.After)}
	ticker := time.NewTicker(beat)
	defer ticker.Stop()
	for {
		if stream.Send(response) != nil {
			return context.Canceled // the client, or the stream, has gone
		}
		ticker.Reset(beat)
		response = &adminpb.WatchEventsResponse{Cursor: response.Cursor}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		case next := <-results:
			if err := collect(response, next, results); err != nil {
				return err
			}
		}
	}
}

// collect adds a result to a response, and the results that have come already.
func collect(r *adminpb.WatchEventsResponse, next watched, results <-chan watched) error {
	for {
		switch {
		case next.err == nil:
			r.Events = append(r.Events, eventProto(next.event))
			r.Cursor = cursorText(next.event.At)
		case errors.Is(next.err, keystore.ErrCorrupt):
			r.Damage = append(r.Damage, damageText(next.err))
		default:
			return next.err
		}
		if len(r.Events)+len(r.Damage) == maxBatch {
			return nil
		}
		select {
		case next = <-results:
		default:
			return nil
		}
	}
}
