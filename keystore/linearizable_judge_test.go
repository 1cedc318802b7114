package keystore

import (
	"testing"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"
)

// did returns an op of a client with key 0. Whoever shows a key at a revision says so behind.
func did(n int32, kind string, call, ret int64, result string, revision ...uint64) *op {
	o := &op{N: n, Client: int(n), Kind: kind, Call: call, Return: ret, Result: result}
	if len(revision) > 0 {
		o.Revision = revision[0]
	}
	return o
}

func (o *op) with(change func(o *op)) *op {
	change(o)
	return o
}

func secret(n int32) func(*op)      { return func(o *op) { o.Secret = n } }
func ifRevision(n uint64) func(*op) { return func(o *op) { o.If = n } }
func until(at int64) func(*op) {
	return func(o *op) { o.SetExpires, o.Expires, o.ExpiresAt = true, at, at }
}

// What the model of a key makes of histories that leave no doubt. Each begins with a key whose
// secret is that of op 1.
func TestModelOfAKey(t *testing.T) {
	for name, tt := range map[string]struct {
		right bool
		ops   []*op
	}{
		"used": {true, []*op{
			did(2, opVerify, 2, 3, isOK, 1).with(secret(1)),
			did(3, opVerify, 4, 5, isUnknown).with(secret(9)),
		}},
		"let in after its revocation": {false, []*op{
			did(2, opRevoke, 2, 3, isOK), did(3, opVerify, 4, 5, isOK, 1).with(secret(1)),
		}},
		"bound after its revocation": {false, []*op{
			did(2, opRevoke, 2, 3, isOK), did(3, opBind, 4, 5, isOK, 1).with(secret(1)),
		}},
		"let in while it is being revoked": {true, []*op{
			did(2, opRevoke, 2, 9, isOK), did(3, opVerify, 3, 4, isOK, 1).with(secret(1)),
			did(4, opVerify, 5, 6, isRevoked).with(secret(1)),
		}},
		"let in after somebody was refused": {false, []*op{
			did(2, opRevoke, 2, 9, isOK), did(3, opVerify, 3, 4, isRevoked).with(secret(1)),
			did(4, opVerify, 5, 6, isOK, 1).with(secret(1)),
		}},
		"refused for nothing": {false, []*op{did(2, opVerify, 2, 3, isDisabled).with(secret(1))}},
		"shown as it was before an update": {false, []*op{
			did(2, opUpdate, 2, 3, isOK, 2), did(3, opVerify, 4, 5, isOK, 1).with(secret(1)),
		}},
		"shown with an expiry that it no longer has": {false, []*op{
			did(2, opUpdate, 2, 3, isOK, 2).with(until(50)),
			did(3, opVerify, 4, 5, isOK, 2).with(secret(1)).with(func(o *op) { o.ExpiresAt = 60 }),
		}},
		"changed if it has its revision": {true, []*op{
			did(2, opUpdate, 2, 3, isOK, 2).with(ifRevision(1)),
			did(3, opRevoke, 4, 5, isConflict).with(ifRevision(1)),
			did(4, opRevoke, 6, 7, isOK).with(ifRevision(2)),
			did(5, opUpdate, 8, 9, isConflict).with(ifRevision(2)),
			did(6, opUpdate, 10, 11, isRevoked).with(ifRevision(3)),
		}},
		"changed although it has another revision": {false, []*op{
			did(2, opUpdate, 2, 3, isOK, 2), did(3, opUpdate, 4, 5, isOK, 3).with(ifRevision(1)),
		}},
		"a conflict with the same revision": {false, []*op{
			did(2, opUpdate, 2, 3, isConflict).with(ifRevision(1)),
		}},
		"a conflict without a revision": {false, []*op{did(2, opUpdate, 2, 3, isConflict)}},
		"two changes of the same revision": {false, []*op{
			did(2, opUpdate, 2, 9, isOK, 2).with(ifRevision(1)),
			did(3, opRotate, 2, 9, isOK, 2).with(ifRevision(1)),
		}},
		"a conflict that changed something": {false, []*op{
			did(2, opUpdate, 2, 3, isOK, 2), did(3, opRevoke, 4, 5, isConflict).with(ifRevision(1)),
			did(4, opVerify, 6, 7, isRevoked).with(secret(1)),
		}},
		"changed twice to one revision": {false, []*op{did(2, opUpdate, 2, 3, isOK, 2),
			did(3, opUpdate, 4, 5, isOK, 2)}},
		"used with a secret that was replaced": {false, []*op{
			did(2, opRotate, 2, 3, isOK, 2), did(3, opVerify, 4, 5, isOK, 2).with(secret(1)),
		}},
		"used in the grace, and refused after it": {true, []*op{
			did(2, opRotate, 2, 4, isOK, 2).with(func(o *op) { o.Grace, o.Until = 10, 13 }),
			did(3, opVerify, 12, 20, isOK, 2).with(secret(1)).with(func(o *op) { o.Until = 13 }),
			did(4, opVerify, 5, 13, isExpired).with(secret(1)),
		}},
		"used after the grace": {false, []*op{
			did(2, opRotate, 2, 4, isOK, 2).with(func(o *op) { o.Grace, o.Until = 10, 13 }),
			did(3, opVerify, 13, 20, isOK, 2).with(secret(1)).with(func(o *op) { o.Until = 13 }),
		}},
		"given a grace that is too long": {false, []*op{
			did(2, opRotate, 2, 4, isOK, 2).with(func(o *op) { o.Grace, o.Until = 10, 15 }),
		}},
		"expired too early": {false, []*op{
			did(2, opUpdate, 2, 3, isOK, 2).with(until(50)),
			did(3, opVerify, 4, 49, isExpired).with(secret(1)),
		}},
		"changed after its revocation": {false, []*op{did(2, opRevoke, 2, 3, isOK),
			did(3, opUpdate, 4, 5, isOK, 3)}},
		"not created": {false,
			[]*op{did(2, opVerify, 2, 3, isUnknown).with(secret(1))}},
		"in doubt, and changed": {true, []*op{
			did(2, opUpdate, 2, 3, inDoubt), did(3, opVerify, 4, 5, isOK, 2).with(secret(1)),
			did(4, opUpdate, 6, 7, isOK, 3),
		}},
		"in doubt, and not changed": {true, []*op{
			did(2, opUpdate, 2, 3, inDoubt), did(3, opVerify, 4, 5, isOK, 1).with(secret(1)),
			did(4, opUpdate, 6, 7, isOK, 2),
		}},
		"in doubt, seen to be revoked, and back": {false, []*op{
			did(2, opRevoke, 2, 3, inDoubt), did(3, opVerify, 4, 5, isRevoked).with(secret(1)),
			did(4, opVerify, 6, 7, isOK, 1).with(secret(1)),
		}},
		"in doubt, seen to be active, and changed after all": {false, []*op{
			did(2, opRevoke, 2, 3, inDoubt), did(3, opVerify, 4, 5, isOK, 1).with(secret(1)),
			did(4, opVerify, 6, 7, isRevoked).with(secret(1)),
		}},
		"answered with something else": {false,
			[]*op{did(2, opVerify, 2, 3, "impossible: damaged").with(secret(1))}},
	} {
		t.Run(name, func(t *testing.T) {
			ops := append([]*op{did(1, opCreate, 0, 1, isOK, 1)}, tt.ops...)
			require.Equal(t, tt.right, porcupine.CheckOperations(keyModel, asOperations(ops)))
		})
	}
}

// The same for a context that op 2 has bound at revision 1, with the secret of op 1.
func TestModelOfAContext(t *testing.T) {
	sample := func(n int32, call, ret int64, result string) *op {
		return did(n, opSample, call, ret, result).with(func(o *op) { o.Bound = 2 })
	}
	for name, tt := range map[string]struct {
		right bool
		made  []*op // of revision 2 and so on
		also  []*op
	}{
		"alive":           {true, nil, []*op{sample(9, 4, 5, isAlive)}},
		"ended by nobody": {false, nil, []*op{sample(9, 4, 5, isRevoked)}},
		"alive while revoked": {true, []*op{did(3, opRevoke, 4, 9, isOK)},
			[]*op{sample(9, 6, 7, isAlive), sample(10, 10, 11, isRevoked)}},
		"alive after": {false, []*op{did(3, opRevoke, 4, 9, isOK)},
			[]*op{sample(9, 10, 11, isAlive)}},
		"back from the dead": {false, []*op{did(3, opRevoke, 4, 9, isOK)},
			[]*op{sample(9, 5, 6, isRevoked), sample(10, 7, 8, isAlive)}},
		"ended for something else": {false, []*op{did(3, opRevoke, 4, 9, isOK)},
			[]*op{sample(9, 10, 11, isDisabled)}},
		"a second revocation returns first": {false,
			[]*op{did(3, opRevoke, 4, 20, isOK)}, []*op{did(4, opRevoke, 5, 9, isOK),
				sample(9, 10, 11, isAlive)}},
		"disabled, and enabled": {false,
			[]*op{did(3, opDisable, 4, 5, isOK), did(4, opEnable, 6, 7, isOK)},
			[]*op{sample(9, 8, 9, isAlive)}},
		"the enabling is through first": {true,
			[]*op{did(3, opDisable, 4, 20, isOK), did(4, opEnable, 6, 7, isOK)},
			[]*op{sample(9, 8, 9, isAlive), sample(10, 21, 22, isDisabled)}},
		"its secret is replaced": {false, []*op{did(3, opRotate, 4, 5, isOK, 2)},
			[]*op{sample(9, 6, 7, isAlive)}},
		"a change that narrows nothing": {true, []*op{did(3, opUpdate, 4, 5, isOK, 2)},
			[]*op{sample(9, 6, 7, isAlive)}},
		"cut by a change that narrows nothing": {false, []*op{did(3, opUpdate, 4, 5, isOK, 2)},
			[]*op{sample(9, 6, 7, isNarrowed)}},
		"narrowed": {false,
			[]*op{did(3, opUpdate, 4, 5, isOK, 2).with(until(50))},
			[]*op{sample(9, 6, 7, isAlive)}},
		"in its grace": {true,
			[]*op{did(3, opRotate, 4, 5, isOK, 2).with(func(o *op) { o.Grace, o.Until = 10, 15 })},
			[]*op{sample(9, 6, 7, isAlive), sample(10, 14, 15, isExpired)}},
		"its grace ends too early": {false,
			[]*op{did(3, opRotate, 4, 5, isOK, 2).with(func(o *op) { o.Grace, o.Until = 10, 15 })},
			[]*op{sample(9, 13, 14, isExpired)}},
		"a revocation that failed cuts": {true, nil, []*op{did(3, opRevoke, 4, 5, inDoubt),
			sample(9, 6, 7, isRevoked)}},
		"a revocation that failed leaves it": {false, nil, []*op{did(3, opRevoke, 4, 5, inDoubt),
			sample(9, 6, 7, isAlive)}},
		"an update that failed may leave it": {true, nil, []*op{did(3, opUpdate, 4, 5, inDoubt),
			sample(9, 6, 7, isAlive)}},
		"an update that failed may cut": {true, nil, []*op{did(3, opUpdate, 4, 5, inDoubt),
			sample(9, 6, 7, isNarrowed)}},
		"the store is closed, and it is not": {false, nil, []*op{did(3, opClose, 4, 5, isOK),
			sample(9, 6, 7, isAlive)}},
		"it ends with the store": {true, nil, []*op{did(3, opClose, 4, 5, isOK),
			sample(9, 6, 7, isClosed)}},
	} {
		t.Run(name, func(t *testing.T) {
			bind := did(2, opBind, 2, 3, isOK, 1).with(secret(1))
			revisions := serial{{did(1, opCreate, 0, 1, isOK, 1), state{revision: 1, current: 1}}}
			for _, o := range tt.made {
				next, changed := revisions[len(revisions)-1].after(o)
				require.True(t, changed)
				revisions = append(revisions, revisionOf{o, next})
			}
			ops := append(append([]*op{bind}, tt.made...), tt.also...)
			require.Equal(t, tt.right, porcupine.CheckOperations(liveModel,
				lifeOf(bind, ops, revisions)))
		})
	}
}
