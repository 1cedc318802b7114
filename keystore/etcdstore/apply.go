package etcdstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// revisionSize is the number of bytes of the revision, in big-endian order, at the start of each
// value in etcd. The revision is not etcd's Version of the key, because a Change may leave out
// revisions.
const revisionSize = 8

// encode returns the value in etcd of a written entry.
func encode(c *backend.Change) string {
	v := make([]byte, 0, revisionSize+len(c.Value))
	v = binary.BigEndian.AppendUint64(v, c.NewRevision())
	return string(append(v, c.Value...))
}

// parse returns the entry of a key of etcd, which must start with the base. The slices of kv become
// those of the entry. If the value is damaged, parse returns an error that wraps ErrCorrupt, and an
// entry without a Value that has the highest revision, so that no older state of the entry looks
// newer.
func (b *Backend) parse(kv *mvccpb.KeyValue) (backend.Entry, error) {
	key, value := kv.Key[len(b.base):len(kv.Key):len(kv.Key)], kv.Value
	if len(value) >= revisionSize {
		if revision := binary.BigEndian.Uint64(value); revision > 0 {
			value = value[revisionSize:len(value):len(value)]
			return backend.Entry{Key: key, Value: value, Revision: revision}, nil
		}
	}
	return backend.Entry{Key: key, Revision: math.MaxUint64}, fmt.Errorf(
		"etcdstore: %w: entry %x below the prefix %q has no revision: "+
			"another program has written the key", backend.ErrCorrupt, key, b.prefix)
}

// Apply implements backend.Backend. As a rule, Apply is one transaction of etcd, and so one round
// trip. If Apply does not know the entries, or another process has changed the entries, Apply makes
// another transaction.
//
// Invariant: the transaction that writes compares each key with etcd's ModRevision of a value whose
// revision is Expect, or with the absence of the key. A ModRevision belongs to one value of a key
// only, so the transaction writes only if each entry has the revision Expect. Whether the
// remembered ModRevision is old makes no difference.
func (b *Backend) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := backend.CheckChanges(changes); err != nil {
		return err
	}
	joined, end, err := b.calls.Begin(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := b.quota.allows(b, changes); err != nil {
		return err
	}
	t := b.newTransaction(changes)
	for {
		written, err := b.try(joined, t)
		if err != nil {
			return b.applyError(ctx, joined, t, err)
		}
		if written {
			return nil
		}
	}
}

// A transaction is one Apply on its way.
type transaction struct {
	changes []backend.Change
	mods    []int64 // the ModRevision of each entry that is to exist; 0: not known
	gets    []clientv3.Op
	puts    []clientv3.Op // and deletions
	bytes   int64         // about what the puts add to the database
}

func (b *Backend) newTransaction(changes []backend.Change) *transaction {
	t := &transaction{changes: changes, mods: make([]int64, len(changes))}
	for i := range changes {
		c := &changes[i]
		key := b.base + string(c.Key)
		t.gets = append(t.gets, clientv3.OpGet(key))
		switch {
		case c.Check:
		case c.Delete:
			t.puts = append(t.puts, clientv3.OpDelete(key))
		default:
			t.puts = append(t.puts, clientv3.OpPut(key, encode(c)))
			t.bytes += int64(len(key) + revisionSize + len(c.Value) + entryOverhead)
		}
	}
	b.history.recall(changes, t.mods)
	return t
}

// compares returns the condition of the transaction, or false if a ModRevision is not known.
func (b *Backend) compares(t *transaction) ([]clientv3.Cmp, bool) {
	ifs := make([]clientv3.Cmp, len(t.changes))
	for i := range t.changes {
		key := b.base + string(t.changes[i].Key)
		switch {
		case t.changes[i].Expect == 0:
			ifs[i] = clientv3.Compare(clientv3.CreateRevision(key), "=", 0)
		case t.mods[i] != 0:
			ifs[i] = clientv3.Compare(clientv3.ModRevision(key), "=", t.mods[i])
		default:
			return nil, false
		}
	}
	return ifs, true
}

// try makes one transaction of etcd, which writes the changes or reads the entries. Without an
// error and without a write, the entries have the expected revisions, and the caller tries again.
func (b *Backend) try(ctx context.Context, t *transaction) (written bool, err error) {
	ifs, ready := b.compares(t)
	txn := b.kv.Txn(ctx)
	if ready {
		txn = txn.If(ifs...).Then(t.puts...).Else(t.gets...)
	} else {
		txn = txn.Then(t.gets...)
	}
	before := b.history.now()
	r, err := txn.Commit()
	if err != nil {
		return false, err
	}
	if err := b.history.observe(b, before, r.Header); err != nil {
		// A transaction that compared with ModRevisions of another history may have written
		// changes that the caller did not mean. The caller must not count on anything.
		return false, err
	}
	if ready && r.Succeeded {
		b.history.remember(before.generation, t.changes, r.Header.Revision)
		b.quota.wrote(b, t.bytes)
		return true, nil
	}
	for i, one := range r.Responses {
		found := one.GetResponseRange()
		if err := b.expect(&t.changes[i], found.GetKvs(), &t.mods[i]); err != nil {
			return false, err
		}
	}
	return false, nil
}

// expect returns ErrConflict unless the entry has the revision that the change expects, and sets
// the ModRevision of the entry. A damaged entry can be deleted at the revision of parse: see
// backend.Feeder.
func (b *Backend) expect(c *backend.Change, found []*mvccpb.KeyValue, mod *int64) error {
	if len(found) == 0 {
		if c.Expect != 0 {
			return backend.ErrConflict
		}
		return nil
	}
	e, err := b.parse(found[0])
	if err != nil && (!c.Delete || c.Expect != e.Revision) {
		return err
	}
	if e.Revision != c.Expect {
		return backend.ErrConflict
	}
	*mod = found[0].ModRevision
	return nil
}

// applyError returns the error of an Apply.
//
// etcd answers "database space exceeded" to a transaction that etcd has not made, and also to the
// first transaction over the quota, which etcd has made (quotaApplierV3 in etcd's server). But
// ErrFull promises that nothing was changed. So applyError reads the entries: the answer has come,
// so the transaction will not be made later.
func (b *Backend) applyError(ctx, joined context.Context, t *transaction, err error) error {
	if !errors.Is(rpctypes.Error(err), rpctypes.ErrNoSpace) {
		return b.wrap(ctx, "write", err)
	}
	b.quota.exceeded(b)
	before := b.history.now()
	r, err := b.kv.Txn(joined).Then(t.gets...).Commit()
	if err == nil {
		err = b.history.observe(b, before, r.Header)
	}
	if err != nil {
		return b.wrap(ctx, "write: etcd's database is full, and read the outcome", err)
	}
	for i, one := range r.Responses {
		var mod int64
		found := one.GetResponseRange()
		if b.expect(&t.changes[i], found.GetKvs(), &mod) != nil {
			return errors.New("etcdstore: write: etcd's database is full, and the entries have " +
				"changed: whether by this write is unknown")
		}
	}
	return b.quota.fullError()
}
