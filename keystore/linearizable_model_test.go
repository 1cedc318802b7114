package keystore

import (
	"fmt"
	"math"
	"time"

	"github.com/anishathalye/porcupine"
)

// An op is one call of a client's, and what came of it. Moments are in nanoseconds since the Unix
// epoch. They are of the clock that the store reads, which all processes of a machine share; a
// round during which it is set does not count.
type op struct {
	// its number in the history; a secret goes by that of the op which made it, never by its text
	N       int32
	Client  int
	Process int // that made the call, in a history of several processes; otherwise 0
	Key     int
	Kind    string
	Secret  int32 // that Verify and Bind present
	Bound   int32 // the Bind whose context a sample looks at

	If uint64 // the revision given to IfRevision; 0 is none

	SetExpires bool   // of Update and Create
	Expires    int64  // the expiry that they set; 0 is never
	Owner      string // the owner that they set, or "" for none; and the owner that List selects
	Grace      int64
	All        bool // the Revoke of one of the keys that a RevokeAll selects

	Call, Return int64
	Result       string
	Closing      bool   // the answer was that the store is closed
	Revision     uint64 // of the key that was returned, as are the next two
	ExpiresAt    int64
	Until        int64
}

// Kinds of ops.
const (
	opCreate  = "create"
	opVerify  = "verify"
	opBind    = "bind"
	opGet     = "get"
	opList    = "list"   // of the keys of an owner: is the key among them
	opEvents  = "events" // of the key: what is the last revision
	opUpdate  = "update"
	opRotate  = "rotate"
	opDisable = "disable"
	opEnable  = "enable"
	opRevoke  = "revoke"
	opSample  = "sample" // has the context of a Bind ended, and why
	opClose   = "close"  // of the store; Key is -1
	// RevokeAll; Key is -1. For each key that the call may revoke, the history has a Revoke too.
	opRevokeAll = "revoke all"
)

// Results of ops. What a store answers is named as it says; see resultOf.
const (
	isOK       = "ok"
	isUnknown  = "unknown"
	isRevoked  = "revoked"
	isExpired  = "expired"
	isDisabled = "disabled"
	isNarrowed = "narrowed"
	isInvalid  = "invalid"
	isConflict = "conflict"
	isAbsent   = "absent" // from a list
	isClosed   = "closed"
	isAlive    = "alive"    // of a sample
	isStale    = "stale"    // of a sample: the process had lost contact with the store
	isNothing  = "nothing"  // a read that was not answered says nothing, and is left out
	inDoubt    = "in doubt" // a change that has failed or was cut off, and may have happened
)

func (o *op) String() string {
	what := o.Kind
	if o.Process != 0 {
		what = fmt.Sprintf("in process %d: %s", o.Process, what)
	}
	if o.Owner != "" {
		what += " owner " + o.Owner
	}
	switch {
	case o.Kind == opVerify, o.Kind == opBind:
		what += fmt.Sprintf(" with the secret of %d", o.Secret)
	case o.Kind == opSample:
		what += fmt.Sprintf(" of %d", o.Bound)
	case o.Kind == opRotate:
		what += fmt.Sprint(" with a grace of ", time.Duration(o.Grace))
	case o.SetExpires && o.Expires == 0:
		what += " to expire never"
	case o.SetExpires:
		what += fmt.Sprintf(" to expire %v after the call", time.Duration(o.Expires-o.Call))
	}
	if o.If != 0 {
		what += fmt.Sprint(" if revision ", o.If)
	}
	what += ": " + o.Result
	if o.Revision != 0 {
		what += fmt.Sprint(", revision ", o.Revision)
	}
	return what
}

// reads reports whether the op changes nothing, and looks at a key.
func (o *op) reads() bool {
	switch o.Kind {
	case opVerify, opBind, opGet, opList, opEvents:
		return true
	}
	return false
}

// changes reports whether the op may have left the key at another revision.
func (o *op) changes() bool {
	switch o.Kind {
	case opCreate, opUpdate, opRotate, opDisable, opEnable, opRevoke:
		return o.Result == isOK || o.Result == inDoubt
	}
	return false
}

// A state is what the model knows of a key. The zero state is of one that does not exist.
type state struct {
	revision          uint64
	revoked, disabled bool
	current, previous int32 // secrets; 0 is none
	expires           int64 // 0 is never
	owner             string
	// The end of the grace lies from graceFrom to graceTo: they differ after a rotation that told
	// nobody.
	graceFrom, graceTo int64
}

// after returns the state after a change that was made to s, and whether it changes anything: a
// change that cannot be made does not.
func (s state) after(o *op) (state, bool) {
	if o.Kind == opCreate {
		return state{revision: 1, current: o.N, expires: o.Expires, owner: o.Owner}, true
	}
	if s.revoked {
		return s, false
	}
	switch o.Kind {
	case opUpdate: // it always writes its number
		if o.SetExpires {
			s.expires = o.Expires
		}
		if o.Owner != "" {
			s.owner = o.Owner
		}
	case opRotate:
		s.previous, s.graceFrom, s.graceTo = 0, 0, 0
		if o.Grace > 0 {
			s.previous = s.current
			s.graceFrom, s.graceTo = o.Call+o.Grace, o.Return+o.Grace
			if o.Result == isOK {
				s.graceFrom, s.graceTo = o.Until, o.Until
			}
		}
		s.current = o.N
	case opDisable:
		if s.disabled {
			return s, false
		}
		s.disabled = true
	case opEnable:
		if !s.disabled {
			return s, false
		}
		s.disabled = false
	case opRevoke:
		s.revoked = true
	}
	s.revision++
	return s, true
}

// has reports whether a secret is one that the key has, or had until the end of its grace.
func (s state) has(secret int32) bool {
	return secret != 0 && (secret == s.current || secret == s.previous)
}

// until returns between which moments a secret ends that the key has; MaxInt64 is never.
func (s state) until(secret int32) (from, to int64) {
	from, to = math.MaxInt64, math.MaxInt64
	if s.expires != 0 {
		from, to = s.expires, s.expires
	}
	if secret != s.current {
		from, to = min(from, s.graceFrom), min(to, s.graceTo)
	}
	return from, to
}

// shows reports whether the key that came with an answer is the one of the state.
func (s state) shows(o *op) bool {
	return o.Revision == s.revision && o.ExpiresAt == s.expires && s.graceFrom <= o.Until &&
		o.Until <= s.graceTo
}

// admits reports whether a Verify in the state can have been answered as it was. The store looks at
// the clock at some moment between call and return: it can have found a secret in time if it was
// called in time, and expired if that had come before it returned.
func (s state) admits(o *op) bool {
	if !s.has(o.Secret) {
		return o.Result == isUnknown
	}
	if s.revoked {
		return o.Result == isRevoked
	}
	if s.disabled {
		return o.Result == isDisabled
	}
	from, to := s.until(o.Secret)
	switch o.Result {
	case isOK:
		return o.Call < to && s.shows(o)
	case isExpired:
		return o.Return >= from
	}
	return false
}

// step is the model's: can o have been answered as it was in state s, and what is the state then?
func (s state) step(o *op) (bool, state) {
	switch o.Kind {
	case opVerify:
		return s.admits(o), s
	case opBind:
		// It may also have begun with what the state had before, and been told why that ended.
		return s.admits(o) || o.Result == isNarrowed || o.Result == isRevoked && !s.has(o.Secret), s
	case opGet:
		return o.Result == isOK && s.shows(o), s
	case opList:
		if s.owner != o.Owner {
			return o.Result == isAbsent, s
		}
		return o.Result == isOK && s.shows(o), s
	case opEvents:
		return o.Result == isOK && o.Revision == s.revision, s
	}
	if o.Result == isConflict {
		return o.If != 0 && o.If != s.revision && s.revision != 0, s
	}
	if o.If != 0 && o.If != s.revision {
		return false, s
	}
	next, changed := s.after(o)
	switch o.Result {
	case inDoubt: // and it has happened
		return changed, next
	case isOK:
	case isRevoked: // there is nothing that a revoked key can become
		return s.revoked && o.Kind != opRevoke && o.Kind != opCreate, s
	case isInvalid: // the expiry had come before it could be set
		late := o.SetExpires && o.Expires != 0 && o.Expires != s.expires && o.Return >= o.Expires
		return late && (o.Kind == opCreate && s.revision == 0 || o.Kind == opUpdate &&
			!s.revoked), s
	default:
		return false, s
	}
	switch o.Kind {
	case opCreate:
		return s.revision == 0 && next.shows(o), next
	case opUpdate:
		inTime := !o.SetExpires || o.Expires == 0 || o.Expires == s.expires || o.Call < o.Expires
		return changed && inTime && next.shows(o), next
	case opRotate:
		inTime := o.Grace == 0 || o.Call+o.Grace <= o.Until && o.Until <= o.Return+o.Grace
		return changed && inTime && next.shows(o), next
	case opDisable, opEnable:
		return !s.revoked, next
	case opRevoke:
		return true, next
	}
	return false, s
}

// keyModel is for the ops of one key, without samples. A change in doubt has happened or not: by
// the time that it has failed, or that its process is dead, that is decided, and stays so.
var keyModel = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{state{}} },
	Step: func(s, in, _ any) (all []any) {
		o := in.(*op)
		if ok, next := s.(state).step(o); ok {
			all = append(all, next)
		}
		if o.Result == inDoubt {
			all = append(all, s)
		}
		return all
	},
	DescribeOperation: func(in, _ any) string { return fmt.Sprint(in.(*op).N, " ", in) },
	DescribeState:     func(s any) string { return fmt.Sprintf("%+v", s) },
}).ToModel()

// asOperations makes porcupine's operations of the ops of one key.
func asOperations(ops []*op) (all []porcupine.Operation) {
	for _, o := range ops {
		switch {
		case o.Kind == opSample, o.Result == isNothing:
			continue
		case o.Kind == opCreate && o.Result == inDoubt:
			continue // nobody knows of the key
		case o.Kind == opBind && o.Result != isOK && excused(o, ops):
			continue
		}
		all = append(all, porcupine.Operation{ClientId: o.Client, Input: o, Call: o.Call,
			Return: o.Return})
	}
	return all
}

// excused reports whether a Bind may have been refused because a change that failed, and cut what
// was bound, came upon it.
func excused(bind *op, ops []*op) bool {
	for _, o := range ops {
		if o.fails() != "" && o.Process == bind.Process && o.Call <= bind.Return &&
			bind.Call <= o.Return && bind.Result == o.fails() {
			return true
		}
	}
	return false
}

// fails returns with what cause a change that failed ended the key's contexts; "" if it need not
// have.
func (o *op) fails() string {
	doubt := o.Result == inDoubt
	switch o.Kind {
	case opRevoke:
		if doubt {
			return isRevoked
		}
	case opDisable:
		if doubt || o.Result == isRevoked {
			return isDisabled
		}
	case opUpdate, opRotate, opEnable:
		if doubt {
			return isNarrowed
		}
	}
	return ""
}
