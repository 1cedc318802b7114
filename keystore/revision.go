package keystore

import (
	"context"
	"fmt"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

type revisionKey struct{}

// IfRevision makes changes under the returned context depend on the revision of the key. Update,
// Rotate, Revoke, Disable, Enable, SetCredits and AddCredits then change the key only if the
// Revision of the key is n. If the key has another revision, the call returns ErrConflict and has
// done nothing. The store compares the revisions inside the write, so of several callers with the
// same n, one changes the key. Use IfRevision for an etag: take n from the Key that a person has
// seen and decided about.
//
// The comparison goes before everything else about the key. So ErrConflict, and not ErrKeyRevoked,
// means that the key has changed, perhaps because another caller has revoked the key. A Revoke with
// an earlier revision returns ErrConflict even if the key is revoked already, and does not end the
// sessions of the key. For a Revoke that must succeed, do not use IfRevision.
//
// After any error that leaves open whether the change was made, a repeat with the same n may return
// ErrConflict because the first call has made the change. The store itself raises the revision when
// it replaces a digest that an earlier Hasher made.
//
// The revision of a key is 1 or more, so every change with an n of 0 returns ErrInvalid. Preview of
// an Update makes the same comparison. Create, Import, RevokeAll, Purge and Restore do not change
// one known key. Under the returned context, they and Preview of a Create return ErrInvalid. Every
// other method ignores n.
func IfRevision(ctx context.Context, n uint64) context.Context {
	return context.WithValue(ctx, revisionKey{}, n)
}

// A condition is what IfRevision has set, if set is true.
type condition struct {
	revision uint64
	set      bool
}

func conditionOf(ctx context.Context) (condition, error) {
	n, set := ctx.Value(revisionKey{}).(uint64)
	if set && n == 0 {
		return condition{}, invalid("the revision given to IfRevision is 0: take the Revision of " +
			"the key")
	}
	return condition{n, set}, nil
}

// check returns ErrConflict if the key has another revision than the caller wants. doing names the
// change.
func (c condition) check(doing string, id token.ID, revision uint64) error {
	if !c.set || c.revision == revision {
		return nil
	}
	return &messageError{
		fmt.Sprintf("keystore: %s: key %s has changed: its revision is %d, and not %d",
			doing, id, revision, c.revision),
		ErrConflict,
	}
}

// refuseCondition returns ErrInvalid if the context comes from IfRevision. doing names the call.
func refuseCondition(ctx context.Context, doing string) error {
	if _, set := ctx.Value(revisionKey{}).(uint64); set {
		return invalid("%s does not change one known key, so the context must not come from "+
			"IfRevision", doing)
	}
	return nil
}
