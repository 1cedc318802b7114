package keystore

import (
	"context"
	"fmt"
	"iter"
	"math"
	"time"
	"unicode/utf8"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An Event is one change of a key. The store writes the event together with the change: neither can
// exist without the other.
type Event struct {
	// At is when the change was made. No two events of a store have the same At. At ascends from
	// each change of a key to the next, whatever the clock does, or the clocks of several processes
	// do. So At serves as a cursor.
	At time.Time
	// KeyID is the ID of the key. Revision is the revision that the change gave the key.
	KeyID    string
	Revision uint64
	// Action is what was done.
	Action Action
	// Actor is who made the change, as set by WithActor; empty if no actor was set.
	Actor string
	// Reason is the reason given to Revoke or Disable.
	Reason string
	// CreditsBefore and Credits are the credits of the key before and after an ActionCredits,
	// without the credits that processes had leased. Credits is also what a new key got. Nil means
	// that the use of the key was not limited, or is not limited.
	CreditsBefore, Credits *Credits
}

// An Action is what an Event did to a key.
type Action string

// What can be done to a key.
const (
	ActionCreate  Action = "create"
	ActionUpdate  Action = "update"
	ActionRotate  Action = "rotate"
	ActionDisable Action = "disable"
	ActionEnable  Action = "enable"
	ActionRevoke  Action = "revoke"
	ActionRehash  Action = "rehash"  // the store replaced a digest made by an earlier hasher
	ActionRestore Action = "restore" // the key was taken from a backup
	ActionCredits Action = "credits" // SetCredits or AddCredits
	ActionPurge   Action = "purge"   // the key was removed; Revision is the last of the key
	ActionImport  Action = "import"  // the key was taken from another system
)

var actions = map[record.Action]Action{
	record.Action_ACTION_CREATE:  ActionCreate,
	record.Action_ACTION_UPDATE:  ActionUpdate,
	record.Action_ACTION_ROTATE:  ActionRotate,
	record.Action_ACTION_DISABLE: ActionDisable,
	record.Action_ACTION_ENABLE:  ActionEnable,
	record.Action_ACTION_REVOKE:  ActionRevoke,
	record.Action_ACTION_REHASH:  ActionRehash,
	record.Action_ACTION_RESTORE: ActionRestore,
	record.Action_ACTION_PURGE:   ActionPurge,
	record.Action_ACTION_CREDITS: ActionCredits,
	record.Action_ACTION_IMPORT:  ActionImport,
}

type actorKey struct{}

// WithActor sets who makes the changes under the returned context: the name of a user, or of a
// program. The events of the changes contain the actor. If the actor is not UTF-8 text of at most
// 256 bytes, the store refuses the changes with ErrInvalid. Line breaks and other invisible
// characters are stored escaped, for example as \n and \u202e.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, actorKey{}, actor)
}

func actorOf(ctx context.Context) (string, error) {
	actor, _ := ctx.Value(actorKey{}).(string)
	actor = escaped(actor, maxText)
	return actor, checkText("the actor", actor, maxText)
}

func checkReason(reason string) error {
	if len(reason) > maxReason || !utf8.ValidString(reason) {
		return invalid("the reason has %d bytes: at most %d of UTF-8 text are allowed",
			len(reason), maxReason)
	}
	return nil
}

// An EventQuery selects events. The zero EventQuery selects all events that the store keeps.
type EventQuery struct {
	// KeyID selects the events of one key. An empty KeyID selects the events of all keys. The store
	// has an index of the events by key: a query with a KeyID reads only the events of this key.
	KeyID string
	// Actor selects the events of changes that this actor made, see WithActor. An empty Actor
	// selects the events of all actors, and of changes without an actor.
	Actor string
	// Action selects the events of one Action. An empty Action selects the events of all actions.
	Action Action
	// After is a cursor: the At of the last event that the caller has seen. The list begins after
	// this event. If After is zero, the list begins at the first event.
	After time.Time
	// Until is the last moment whose events are wanted; zero is now.
	Until time.Time
	// Newest reverses the order: the last event comes first. Newest does not change which events
	// the query selects. To continue later, set Until to one nanosecond before the At of the last
	// event that the caller has seen. The backend must be a backend.DownScanner, as the store's own
	// directory is. Otherwise Newest gives ErrInvalid.
	Newest bool
	// Limit is the most events to yield. 0 or less means no limit.
	Limit int
}

// selects reports whether the query selects an event with this actor and this action.
func (q *EventQuery) selects(e *record.Event) bool {
	return (q.Actor == "" || e.Actor == escaped(q.Actor, maxText)) &&
		(q.Action == "" || actionOf(e) == q.Action)
}

// Events yields the events of changes in the order of At, or newest first. The list contains every
// change that had returned when Events was called, and may contain later changes. To continue
// later, list again after the last event: no event is missed. If several processes have the store
// open, the list contains the events of all processes, and Events first asks each process.
//
// An error comes with a zero Event. ErrCorrupt concerns one event, and the list can continue. Any
// other error ends the list.
func (s *Store) Events(ctx context.Context, q EventQuery) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		if err := s.events(ctx, q, yield); err != nil {
			yield(Event{}, err)
		}
	}
}

// events returns the error that ends the list, unless the consumer ended the list.
func (s *Store) events(ctx context.Context, q EventQuery, yield func(Event, error) bool) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	only, err := q.keyID()
	if err != nil {
		return err
	}
	last, err := s.awaitChanges(ctx)
	if err != nil {
		return err
	}
	if !q.Until.IsZero() {
		last = min(last, stampAt(q.Until))
	}
	_, err = s.readEvents(ctx, &q, only, stampAt(q.After)+1, last, atMost(q.Limit, yield))
	return err
}

// keyID returns the ID in KeyID, or the zero ID if KeyID is empty.
func (q *EventQuery) keyID() (id token.ID, err error) {
	if q.KeyID != "" {
		id, err = parseID("EventQuery.KeyID: ", q.KeyID)
	}
	return id, err
}

// atMost returns a function that calls yield, and returns false after limit events. Errors do not
// count. A limit of 0 or less is no limit.
func atMost(limit int, yield func(Event, error) bool) func(Event, error) bool {
	if limit <= 0 {
		return yield
	}
	return func(e Event, err error) bool {
		if err == nil {
			limit--
		}
		return yield(e, err) && limit > 0
	}
}

// readEvents yields the events of the query with first <= stamp <= last, of the key only, or of all
// keys if only is zero. more is false once yield has returned false.
func (s *Store) readEvents(
	ctx context.Context, q *EventQuery, only token.ID, first, last int64,
	yield func(Event, error) bool,
) (more bool, err error) {
	more = true
	err = s.foundEvents(ctx, only, q.Newest, first, last, func(f foundEvent, err error) bool {
		switch {
		case err != nil:
			more = yield(Event{}, err)
		case f.event.Action == record.Action_ACTION_VOID:
		case q.selects(f.event):
			more = yield(publicEvent(f.stamp, f.event), nil)
		}
		return more
	})
	return more && err == nil, err
}

// awaitChanges waits for the changes that are under way, in all processes, and returns the last
// stamp given before the call, or a later stamp.
func (s *Store) awaitChanges(ctx context.Context) (int64, error) {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	wait := s.sequencer.Wait
	if s.processes != nil {
		wait = s.processes.cluster.Watermark
	}
	last, err := wait(ctx)
	if err != nil {
		if ended := endOf(ctx); ended != nil {
			return 0, ended
		}
		return 0, ErrClosed
	}
	return last, nil
}

// stampAt returns the stamp of a moment. For a moment before 1970, the stamp is 0. For a moment
// after 2261, the stamp is the second largest possible stamp.
func stampAt(t time.Time) int64 {
	switch {
	case t.Year() < 1970:
		return 0
	case t.Year() > 2261:
		return math.MaxInt64 - 1
	default:
		return max(0, t.UnixNano())
	}
}

func parseEvent(e backend.Entry) (*record.Event, error) {
	if len(e.Key) != 1+8 || e.Key[0] != eventSpace {
		return nil, fmt.Errorf("%w: the storage key %x is not an event's", ErrCorrupt, e.Key)
	}
	event, err := record.DecodeEvent(e.Value)
	if err != nil {
		at := fromNanos(stampOf(e.Key))
		return nil, fmt.Errorf("%w: the event of %s: %w", ErrCorrupt, at, err)
	}
	return event, nil
}

// actionOf returns the action of an event that this version or a later version has written.
func actionOf(e *record.Event) Action {
	if action, ok := actions[e.Action]; ok {
		return action
	}
	return Action(fmt.Sprintf("action %d", e.Action))
}

func publicEvent(stamp int64, e *record.Event) Event {
	return Event{
		At:       fromNanos(stamp),
		KeyID:    token.ID(e.KeyId).String(),
		Revision: e.Revision,
		Action:   actionOf(e),
		Actor:    e.Actor,
		Reason:   e.Reason,

		CreditsBefore: creditsOf(e.CreditsBefore),
		Credits:       creditsOf(e.Credits),
	}
}

// firstStamp returns the first stamp with from <= stamp < to, or -1 if no stamp is in this range.
func (s *Store) firstStamp(from, to int64) (int64, error) {
	ctx, cancel := s.limited(context.Background())
	defer cancel()
	for e, err := range s.backend.Scan(ctx, eventKey(from), eventKey(to)) {
		if err != nil {
			return 0, err
		}
		if len(e.Key) == 1+8 {
			return stampOf(e.Key), nil
		}
	}
	return -1, nil
}
