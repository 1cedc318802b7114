package keystore

import (
	"context"
	"errors"
	"time"
)

// Preview makes every check of Update, and returns the key that Update would return, but changes
// nothing. Use Preview for a dry run, and to check what a person has written so far.
//
// If id is empty, Preview does the same for Create: change fills in an empty Spec, and the key that
// Preview returns has no ID, no Hint and a Revision of 0.
//
// The errors are the same as the errors of Update and Create. A later Update or Create may still
// return another error, because the key or the time has changed.
func (s *Store) Preview(ctx context.Context, id string, change func(*Spec) error) (*Key, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if change == nil {
		return nil, invalid("the change is nil")
	}
	if id == "" {
		return s.previewNew(ctx, change)
	}
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if _, err := actorOf(ctx); err != nil {
		return nil, err
	}
	condition, err := conditionOf(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	kr, err := s.get(ctx, parsed)
	if errors.Is(err, ErrNotFound) {
		err = noKey("preview", parsed)
	}
	if err != nil {
		return nil, err
	}
	if err := condition.check("preview", parsed, kr.revision); err != nil {
		return nil, err
	}
	changed, err := s.edit(kr.record, id, change)
	if err != nil {
		return nil, err
	}
	if changed {
		kr.revision++
	}
	key := &kr.cached().key
	key.Live = s.fence.BoundTo(parsed)
	key.LastUsedAt, err = s.lastUsed(ctx, parsed)
	if err != nil {
		return nil, err
	}
	return key, nil
}

func (s *Store) previewNew(ctx context.Context, change func(*Spec) error) (*Key, error) {
	var spec Spec
	if err := change(&spec); err != nil {
		return nil, err
	}
	now := time.Now()
	if _, err := s.checkNew(ctx, &spec, now); err != nil {
		return nil, err
	}
	r := newRecord(spec, s.format.Prefix(), s.dummyDigest, now)
	if err := checkSize(r, 0); err != nil {
		return nil, err
	}
	key := &(&keyRecord{record: r}).cached().key
	key.ID, key.Hint = "", ""
	return key, nil
}
