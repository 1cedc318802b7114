package keystore

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/anishathalye/porcupine"
)

// The verdict about a history of several processes on one store differs from the verdict about a
// history of one process:
//
//   - Changes, Get and List are linearizable: keyModel judges them, as in one process.
//   - Verify and Bind are regular: they answer for a state between the last change that had
//     returned before the call, and the last change that was called before the answer. See regular.
//   - A context also ends if the process loses contact with the others: see lifeOf.
//   - A change in doubt may be made long after the call has returned. The events say whether the
//     change was made.

// checkProcesses judges what happened to one key in several processes. revisions are from the
// events, read after the end of all calls.
func (t *trial) checkProcesses(n int, revisions serial) error {
	ops := t.of(n)
	made := make(map[*op]bool, len(revisions))
	for _, r := range revisions {
		made[r.by] = true
	}
	var own []*op
	for _, o := range ops {
		if o.Kind == opClose {
			continue
		}
		if strings.HasPrefix(o.Result, "impossible") {
			return t.violation(n, fmt.Sprintf("op %d: %v", o.N, o))
		}
		if o.Result == inDoubt && !made[o] {
			continue // the events say that the change was not made
		}
		own = append(own, o)
	}
	if err := t.linearizable(n, "C5: ops", keyModel, changesAndGets(own)); err != nil {
		return err
	}
	if what := regular(own, revisions, t.evicts); what != "" {
		return t.violation(n, what)
	}
	for _, o := range own {
		if o.Kind != opBind || o.Result != isOK {
			continue
		}
		if err := t.linearizable(n, fmt.Sprintf("C2: the context of op %d", o.N), liveModel,
			lifeOf(o, ops, revisions)); err != nil {
			return err
		}
	}
	return nil
}

// changesAndGets makes porcupine's operations of the changes, the Gets and the Lists of a key.
func changesAndGets(ops []*op) (all []porcupine.Operation) {
	for _, o := range ops {
		switch {
		case o.Kind == opVerify, o.Kind == opBind, o.Kind == opSample, o.Kind == opEvents,
			o.Result == isNothing:
			continue
		}
		to := o.Return
		if o.Result == inDoubt {
			to = math.MaxInt64
		}
		all = append(all, porcupine.Operation{ClientId: o.Client, Input: o, Call: o.Call,
			Return: to})
	}
	return all
}

// regular looks at each Verify, each Bind and each Events of a key, and returns what is wrong, or
// "". The answer must be right for a state that the key had between the last change that had
// returned before the call, and the last change that was called before the answer.
func regular(ops []*op, revisions serial, evicts bool) string {
	for _, o := range ops {
		if o.Kind != opVerify && o.Kind != opBind && o.Kind != opEvents || o.Result == isNothing {
			continue
		}
		first, last, none := 0, 0, true
		for k, r := range revisions {
			late := evicts && o.Kind == opEvents && r.by.Process != o.Process // see trial.evicts
			if r.by.Result == isOK && r.by.Return < o.Call && !late {
				first, none = k, false
			}
			if r.by.Call <= o.Return {
				last = k
			}
		}
		if revokedBefore(ops, o.Call) && o.Kind != opEvents {
			first = len(revisions) - 1 // nothing follows a revocation
		}
		if o.Kind == opEvents {
			if !none && o.Revision < uint64(first+1) || o.Revision > uint64(last+1) {
				return fmt.Sprintf("C10: op %d found %d events: there are %d to %d", o.N, o.Revision,
					first+1, last+1)
			}
			continue
		}
		right := slices.ContainsFunc(revisions[first:max(first, last)+1],
			func(r revisionOf) bool { return r.answers(o) })
		if !right && !(o.Kind == opBind && excused(o, ops)) {
			return fmt.Sprintf("C4: op %d was answered for none of the revisions %d to %d", o.N,
				first+1, last+1)
		}
	}
	return ""
}

// revokedBefore reports whether a Revoke had returned before a moment.
func revokedBefore(ops []*op, moment int64) bool {
	return slices.ContainsFunc(ops, func(o *op) bool {
		return o.Kind == opRevoke && o.Result == isOK && o.Return < moment
	})
}

// answers reports whether a Verify or a Bind can have been answered as it was in the state.
func (s state) answers(o *op) bool {
	// A Bind may have begun with what the state had before, and the answer says why that ended.
	return s.admits(o) || o.Kind == opBind &&
		(o.Result == isNarrowed || o.Result == isRevoked && !s.has(o.Secret))
}
