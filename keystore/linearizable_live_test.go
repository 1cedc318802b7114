package keystore

import (
	"fmt"
	"math"

	"github.com/anishathalye/porcupine"
)

// The end of a context takes effect apart from the change that ends it, between its commit and its
// return: somebody may be refused already while a stream that is about to be cut goes on. So each
// context is an object of its own, and its history has an operation for each change that must or
// may end it, and each sample.

// causes is what may end a context, as a set.
type causes uint8

const (
	byRevoked causes = 1 << iota
	byExpired
	byDisabled
	byChanged
	byClosed
	byStale
)

var causeOf = map[string]causes{
	isRevoked: byRevoked, isExpired: byExpired, isDisabled: byDisabled, isNarrowed: byChanged,
	isClosed: byClosed, isStale: byStale,
}

// An ending is what ends a context, for one of the causes.
type ending struct {
	by  *op // nil: it may, at any time from the call on
	why causes
}

// liveModel is for one context. Its state is the causes of which one has ended it; none while it
// goes on.
var liveModel = porcupine.Model{
	Init: func() any { return causes(0) },
	Step: func(s, in, _ any) (bool, any) {
		now := s.(causes)
		switch in := in.(type) {
		case ending:
			if now == 0 {
				now = in.why
			}
			return true, now
		case *op: // a sample
			if in.Result == isAlive {
				return now == 0, now
			}
			c := causeOf[in.Result]
			return now&c != 0, now & c
		}
		return false, s
	},
	DescribeOperation: func(in, _ any) string {
		if e, ok := in.(ending); ok {
			return fmt.Sprintf("ends for %05b, by %v", e.why, e.by)
		}
		return fmt.Sprint(in.(*op).N, " ", in)
	},
	DescribeState: func(s any) string { return fmt.Sprintf("%05b", s) },
}

// A serial is what a key went through: the change that made each revision, and what it was then.
// The first is of revision 1.
type serial []revisionOf

type revisionOf struct {
	by *op
	state
}

// lifeOf returns the history of a context: of what Bind returned, among the ops of its key.
func lifeOf(bind *op, ops []*op, revisions serial) (all []porcupine.Operation) {
	may := make(map[causes]int64) // since when each cause may have ended it, at any later time
	end := func(by *op, why causes, from, to int64) {
		if to == math.MaxInt64 {
			if since, ok := may[why]; !ok || from < since {
				may[why] = from
			}
			return
		}
		all = append(all, porcupine.Operation{ClientId: by.Client, Input: ending{by, why},
			Call: from, Return: to})
	}
	first := revisions[bind.Revision-1].state
	for k := int(bind.Revision) - 1; k < len(revisions); k++ {
		r := revisions[k]
		if r.has(bind.Secret) {
			if from, _ := r.until(bind.Secret); from != math.MaxInt64 {
				end(nil, byExpired, from, math.MaxInt64) // some time afterwards
			}
		}
		if k == int(bind.Revision)-1 {
			continue
		}
		returned := r.by.Return
		if r.by.Result == inDoubt {
			returned = math.MaxInt64
		}
		cause, must := causes(0), true
		switch {
		case r.revoked:
			cause = byRevoked
		case r.disabled:
			cause = byDisabled
		case !r.has(bind.Secret):
			cause = byRevoked
		case r.narrows(first):
			cause = byChanged
		default:
			must = false
			for _, before := range revisions[bind.Revision-1 : k] {
				if r.narrows(before.state) {
					cause = byChanged
				}
			}
		}
		// A value that no longer admits for its time is told as that.
		if from, _ := r.until(bind.Secret); cause == byChanged && r.by.Return >= from {
			cause |= byExpired
		}
		switch {
		case must:
			end(r.by, cause, r.by.Call, returned)
		case cause != 0:
			end(r.by, cause, r.by.Call, math.MaxInt64)
		}
	}
	for _, o := range ops {
		switch {
		case o.Kind == opSample && o.Bound == bind.N:
			all = append(all, porcupine.Operation{ClientId: o.Client, Input: o, Call: o.Call,
				Return: o.Return})
		case o.Kind == opClose && o.Process == bind.Process && o.Call >= bind.Call,
			o.Kind == opRevoke && o.Result == isOK:
			// A revocation of what is revoked already does not return before it is in force either.
			end(o, causeOf[map[string]string{opClose: isClosed, opRevoke: isRevoked}[o.Kind]],
				o.Call, o.Return)
		case o.fails() == "" || o.Process != bind.Process:
			// A change that failed in another process ends contexts only if the change was made.
		case o.Process != 0 && o.Result == inDoubt && o.Return <= bind.Call:
			// The call has left before the answer of the engine, and what was bound since then is
			// cut if the answer is lost.
			end(o, causeOf[o.fails()], o.Call, math.MaxInt64)
		case o.Call < bind.Return && o.Return > bind.Call:
			end(o, causeOf[o.fails()], o.Call, math.MaxInt64)
		case o.Call >= bind.Return:
			// Revoke and Disable fail closed, whatever it was that failed; Close does that on its
			// own.
			to := o.Return
			if o.Result != inDoubt || o.Closing || o.Kind != opRevoke && o.Kind != opDisable ||
				o.All { // a RevokeAll that failed may not have come to the key
				to = math.MaxInt64
			}
			end(o, causeOf[o.fails()], o.Call, to)
		}
	}
	if bind.Process != 0 {
		// The process may lose contact at any time, and the context has then ended. If no caller
		// looks at the context before another cause comes, the context shows this cause.
		why := byStale
		for _, o := range all {
			if e, ok := o.Input.(ending); ok {
				why |= e.why
			}
		}
		for other := range may {
			why |= other
		}
		end(nil, why, bind.Call, math.MaxInt64)
	}
	for why, from := range may {
		all = append(all, porcupine.Operation{Input: ending{nil, why}, Call: from,
			Return: math.MaxInt64})
	}
	return all
}

// narrows reports whether the key admits to less than it did before: only the expiry is ever
// changed here.
func (s state) narrows(before state) bool {
	return s.expires != 0 && (before.expires == 0 || s.expires < before.expires)
}
