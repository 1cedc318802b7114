package backend

import (
	"bytes"
	"errors"
	"fmt"
)

// NewRevision returns the revision that the change gives to a written entry: Revision, or Expect+1.
func (c *Change) NewRevision() uint64 {
	if c.Revision != 0 {
		return c.Revision
	}
	return c.Expect + 1
}

// CheckChanges returns an error if changes break a rule of Backend.Apply that does not depend on
// the stored entries: the number of changes, the sizes, the fields of each Change, and one change
// of each key. Apply of every backend calls CheckChanges first.
func CheckChanges(changes []Change) error {
	if len(changes) == 0 {
		return errors.New("no changes to apply")
	}
	if len(changes) > MaxChanges {
		return fmt.Errorf("%w: %d changes at once: at most %d are allowed",
			ErrTooLarge, len(changes), MaxChanges)
	}
	size, checks := 0, 0
	for i := range changes {
		c := &changes[i]
		switch {
		case len(c.Key) == 0:
			return errors.New("a change has an empty key")
		case len(c.Key) > MaxKeySize:
			return fmt.Errorf("%w: a key of %d bytes: at most %d are allowed",
				ErrTooLarge, len(c.Key), MaxKeySize)
		case len(c.Value) > MaxValueSize:
			return fmt.Errorf("%w: a value of %d bytes: at most %d are allowed",
				ErrTooLarge, len(c.Value), MaxValueSize)
		case c.Check:
			if len(c.Value) != 0 || c.Revision != 0 || c.Delete {
				return fmt.Errorf("the check of %x has a value or a revision, or deletes", c.Key)
			}
			checks++
		case c.Delete:
			if len(c.Value) != 0 || c.Revision != 0 || c.Expect == 0 {
				return fmt.Errorf(
					"the deletion of %x has a value or a revision, or expects no entry", c.Key)
			}
		case c.NewRevision() <= c.Expect: // Expect+1 may be 0
			return fmt.Errorf("the revision of %x is to become %d: it must be greater than %d",
				c.Key, c.NewRevision(), c.Expect)
		}
		size += len(c.Key) + len(c.Value)
	}
	if key := repeatedKey(changes); key != nil {
		return fmt.Errorf("two changes have the key %x", key)
	}
	if size > MaxApplySize {
		return fmt.Errorf("%w: changes of %d bytes at once: at most %d are allowed",
			ErrTooLarge, size, MaxApplySize)
	}
	if checks == len(changes) {
		return errors.New("all changes have Check: at least one must write or delete")
	}
	return nil
}

// repeatedKey returns a key that two of the changes have, or nil. Most calls of Apply have few
// changes. To compare these in pairs is faster than to make a map.
func repeatedKey(changes []Change) []byte {
	if len(changes) <= 16 {
		for i := range changes {
			for j := range i {
				if bytes.Equal(changes[i].Key, changes[j].Key) {
					return changes[i].Key
				}
			}
		}
		return nil
	}
	seen := make(map[string]struct{}, len(changes))
	for i := range changes {
		if _, ok := seen[string(changes[i].Key)]; ok {
			return changes[i].Key
		}
		seen[string(changes[i].Key)] = struct{}{}
	}
	return nil
}
