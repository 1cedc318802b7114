package admin

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func (s *keyService) ListKeys(
	ctx context.Context, r *adminpb.ListKeysRequest,
) (*adminpb.ListKeysResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_ListKeys_FullMethodName, r,
		func(c *call) (*adminpb.ListKeysResponse, error) {
			q, err := queryOf(r.Filter)
			if err != nil {
				return nil, err
			}
			page, err := newPage(r.PageSize)
			if err != nil {
				return nil, err
			}
			bound := proto.CloneOf(r)
			bound.PageSize, bound.PageToken = 0, ""
			if q.Cursor, err = pageCursor(bound, r.PageToken); err != nil {
				return nil, err
			}
			q.Newest = r.NewestFirst
			q.Limit = page.left + 1 // one more, to know whether there is another page
			response := new(adminpb.ListKeysResponse)
			var last string
			for key, err := range c.store.List(c.ctx, q) {
				if err != nil && page.note(err) {
					continue
				}
				if err != nil {
					return nil, err
				}
				m, err := c.withCredits(key)
				if err != nil {
					return nil, err
				}
				if !page.add(m) {
					response.NextPageToken, err = pageToken(bound, last)
					if err != nil {
						return nil, err
					}
					break
				}
				response.Keys, last = append(response.Keys, m), key.ID
			}
			response.Damage = page.damage
			return response, nil
		})
}

func (s *keyService) ListEvents(
	ctx context.Context, r *adminpb.ListEventsRequest,
) (*adminpb.ListEventsResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_ListEvents_FullMethodName, r,
		func(c *call) (*adminpb.ListEventsResponse, error) {
			q, err := eventQueryOf(r)
			if err != nil {
				return nil, err
			}
			page, err := newPage(r.PageSize)
			if err != nil {
				return nil, err
			}
			bound := proto.CloneOf(r)
			bound.PageSize, bound.PageToken = 0, ""
			cursor, err := pageCursor(bound, r.PageToken)
			if err != nil {
				return nil, err
			}
			if cursor != "" {
				at, err := cursorTime(cursor)
				if err != nil {
					return nil, err
				}
				if r.NewestFirst {
					q.Until = at.Add(-1)
				} else {
					q.After = at
				}
			}
			q.Limit = page.left + 1
			response := new(adminpb.ListEventsResponse)
			var last time.Time
			for event, err := range c.store.Events(c.ctx, q) {
				if err != nil && page.note(err) {
					continue
				}
				if err != nil {
					return nil, err
				}
				m := eventProto(event)
				if !page.add(m) {
					response.NextPageToken, err = pageToken(bound, cursorText(last))
					if err != nil {
						return nil, err
					}
					break
				}
				response.Events, last = append(response.Events, m), event.At
			}
			response.Damage = page.damage
			return response, nil
		})
}

// eventQueryOf returns the query of a request, for the first page.
func eventQueryOf(r *adminpb.ListEventsRequest) (q keystore.EventQuery, err error) {
	q = keystore.EventQuery{
		Actor: r.Actor, Action: keystore.Action(r.Action), Newest: r.NewestFirst}
	if q.KeyID, err = eventKey(r.Key); err != nil {
		return q, err
	}
	from, err := timeOf("start_time", r.StartTime)
	if err != nil {
		return q, err
	}
	end, err := timeOf("end_time", r.EndTime)
	if err != nil {
		return q, err
	}
	// The store begins after a time, and includes the last moment.
	if !from.IsZero() {
		q.After = from.Add(-1)
	}
	if !end.IsZero() {
		q.Until = end.Add(-1)
	}
	return q, nil
}

// eventKey returns the ID in the name of the key whose events are wanted. An empty name means the
// events of all keys.
func eventKey(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	return idOf("key", name)
}
