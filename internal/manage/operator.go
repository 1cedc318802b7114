package manage

import (
	"context"
	"errors"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An Operator changes keys on behalf of a Caller, within the ceiling of the Caller. The events of
// the changes name the Caller as the actor.
type Operator struct {
	Store  *keystore.Store
	Caller Caller
	// Revision is the revision of the key that the Caller has seen. A change of a key that has
	// another revision returns keystore.ErrConflict. 0 permits every revision.
	Revision uint64
}

// context returns the context of a change.
func (o Operator) context(ctx context.Context) context.Context {
	ctx = keystore.WithActor(ctx, o.Caller.Actor())
	if o.Revision != 0 {
		ctx = keystore.IfRevision(ctx, o.Revision)
	}
	return ctx
}

// Within returns a change of a Spec that makes the given change, and returns a *CeilingError if the
// result is above the ceiling. Pass the result to Create, or to Update or Preview of the Store, so
// that the ceiling is checked inside the write.
func (o Operator) Within(change func(*keystore.Spec) error) func(*keystore.Spec) error {
	return func(spec *keystore.Spec) error {
		if err := o.Caller.MayChange(spec.Scopes); err != nil {
			return err
		}
		before := *spec
		if err := change(spec); err != nil {
			return err
		}
		if err := o.Caller.MayGrant(spec.Scopes); err != nil {
			return err
		}
		isNew := before.Name == "" // a key has a name
		if !isNew && spec.ExpiresAt.Equal(before.ExpiresAt) {
			return nil
		}
		return o.Caller.MayLast(spec.ExpiresAt)
	}
}

// Create creates the key that change describes: change fills in an empty Spec.
func (o Operator) Create(
	ctx context.Context, change func(*keystore.Spec) error,
) (*keystore.Issued, error) {
	var spec keystore.Spec
	if err := o.Within(change)(&spec); err != nil {
		return nil, err
	}
	return o.Store.Create(o.context(ctx), spec)
}

// Update changes the Spec of a key, and returns the key, as Update of the Store does.
func (o Operator) Update(
	ctx context.Context, id string, change func(*keystore.Spec) error,
) (*keystore.Key, error) {
	return o.Store.Update(o.context(ctx), id, o.Within(change))
}

// Rotate gives a key a new secret. Once the key is rotated, Rotate returns no error, because an
// error would lose the secret. If notEverywhere is true, another process of the store may not know
// the rotation yet.
func (o Operator) Rotate(
	ctx context.Context, id string, grace time.Duration,
) (issued *keystore.Issued, notEverywhere bool, err error) {
	err = o.permitted(ctx, id, o.MayRotate, func(ctx context.Context) (err error) {
		issued, err = o.Store.Rotate(ctx, id, grace)
		return err
	})
	if issued == nil {
		return nil, false, err
	}
	return issued, errors.Is(err, keystore.ErrNotEverywhere) && o.settle(id) != nil, nil
}

// settle waits until every process has the last change of a key. An Update that changes nothing
// waits for the other processes.
func (o Operator) settle(id string) error {
	o.Revision = 0
	_, err := o.Store.Update(o.context(context.Background()), id,
		func(*keystore.Spec) error { return nil })
	return err
}

// Enable ends the effect of Disable.
func (o Operator) Enable(ctx context.Context, id string) error {
	return o.permitted(ctx, id, o.MayEnable, func(ctx context.Context) error {
		return o.Store.Enable(ctx, id)
	})
}

// SetCredits sets the credits of a key, as SetCredits of the Store does.
func (o Operator) SetCredits(ctx context.Context, id string, credits *keystore.Credits) error {
	return o.permitted(ctx, id, o.MayEnable, func(ctx context.Context) error {
		return o.Store.SetCredits(ctx, id, credits)
	})
}

// AddCredits adds credits to a key, as AddCredits of the Store does.
func (o Operator) AddCredits(ctx context.Context, id string, n int64) error {
	return o.permitted(ctx, id, o.MayEnable, func(ctx context.Context) error {
		_, err := o.Store.AddCredits(ctx, id, n)
		return err
	})
}

// permitted makes a change of a key, if the key is one that the caller may change so. The store
// compares the revision inside the write, so no other change comes between the check and the
// change. If another change was first, and Revision is 0, permitted begins again.
func (o Operator) permitted(
	ctx context.Context, id string, may func(*keystore.Key) error,
	change func(context.Context) error,
) error {
	ctx = o.context(ctx)
	if o.Caller.unlimited() {
		return change(ctx)
	}
	for {
		key, err := o.Store.Get(ctx, id)
		if err != nil {
			return err
		}
		if err := may(key); err != nil {
			return err
		}
		if o.Revision != 0 && o.Revision != key.Revision {
			return keystore.ErrConflict
		}
		err = change(keystore.IfRevision(ctx, key.Revision))
		if o.Revision != 0 || !errors.Is(err, keystore.ErrConflict) {
			return err
		}
	}
}

// MayRotate returns nil if the caller may have a secret of the key. The error is a *CeilingError.
func (o Operator) MayRotate(key *keystore.Key) error {
	if err := o.MayEnable(key); err != nil {
		return err
	}
	return o.Caller.MayLast(key.ExpiresAt)
}

// MayEnable returns nil if the caller may put the key into force. The error is a *CeilingError.
func (o Operator) MayEnable(key *keystore.Key) error {
	scopes := key.Scopes()
	if err := o.Caller.MayChange(scopes); err != nil {
		return err
	}
	return o.Caller.MayGrant(scopes)
}

// MayStop returns nil if the caller may disable or revoke the key. The error is a *CeilingError.
func (o Operator) MayStop(key *keystore.Key) error { return o.Caller.MayChange(key.Scopes()) }

// Revoke revokes a key, and returns the key, and how many of its sessions in this process have
// ended.
func (o Operator) Revoke(
	ctx context.Context, id, reason string,
) (key *keystore.Key, ended int, err error) {
	return o.stop(ctx, id, reason, o.Store.Revoke)
}

// Disable stops a key until Enable. The results are those of Revoke.
func (o Operator) Disable(
	ctx context.Context, id, reason string,
) (key *keystore.Key, ended int, err error) {
	return o.stop(ctx, id, reason, o.Store.Disable)
}

// stop disables or revokes a key. In contrast to permitted, stop does not compare the revision that
// stop has read: a revocation must not lose against a caller who keeps changing the key. If the key
// gets keys:admin between the check and the change, the outcome is as if the key had been stopped
// before.
func (o Operator) stop(
	ctx context.Context, id, reason string,
	change func(ctx context.Context, id, reason string) error,
) (key *keystore.Key, ended int, err error) {
	ctx = o.context(ctx)
	before, err := o.Store.Get(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	if err := o.MayStop(before); err != nil {
		return nil, 0, err
	}
	if err := change(ctx, id, reason); err != nil {
		return nil, 0, err
	}
	after, err := o.Store.Get(ctx, id)
	if err != nil {
		return nil, 0, err
	}
	return after, max(0, before.Live-after.Live), nil
}
