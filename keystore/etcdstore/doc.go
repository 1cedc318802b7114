// Package etcdstore keeps the entries of a key store in etcd, for many processes. The package is a
// separate module, so that only its users have etcd's client in their module graph.
//
//	client, err := clientv3.New(clientv3.Config{
//		Endpoints:            []string{"https://etcd-0:2379", "https://etcd-1:2379"},
//		TLS:                  tlsConfig,
//		DialKeepAliveTime:    10 * time.Second,
//		DialKeepAliveTimeout: 3 * time.Second,
//		PermitWithoutStream:  true,
//	})
//	b, err := etcdstore.Open(ctx, client, "/apikeys/prod/", nil)
//	store, err := keystore.New(b, nil)
//
// The keep-alive settings let the client notice a server that is cut off. TLS, client certificates,
// the user and the password belong to the Config of the client. No error and no log message of this
// package has a credential.
//
// # What etcd must be
//
// The servers have version 3.5.18 or later, and the defaults of --max-txn-ops and
// --max-request-bytes. Three or five members on separate machines serve the store while a minority
// is down. The endpoints of the client are the members. etcd's gRPC proxy is not supported: the
// proxy merges the watches of several processes. Do not use the etcd of a Kubernetes cluster: its
// quota and its compaction belong to Kubernetes.
//
// The user needs a role with the right readwrite on the prefix, and no other right:
//
//	etcdctl role add apikeys
//	etcdctl role grant-permission apikeys --prefix=true readwrite /apikeys/prod/
//
// etcd keeps old revisions until a compaction. Let etcd compact periodically, and keep the history
// for longer than a Backup takes: --auto-compaction-mode=periodic --auto-compaction-retention=10m.
// A Snapshot whose revision is compacted ends with an error. A feed that has not read what is
// compacted ends with backend.ErrGap.
//
// # A full database
//
// An etcd whose database reaches the quota refuses every write, also a revocation. So a Backend
// asks each endpoint for its status every 30 s. From 90 % of the quota on, Apply accepts only
// changes with Restricts, and deletions; other changes get backend.ErrFull.
//
// # Layout
//
// The entry with the storage key k has the key prefix+"\x00"+k in etcd. Its value is the revision
// of the entry in 8 bytes, in big-endian order, and the value of the entry. The key prefix+"\x00"
// marks the prefix as that of a store. The NUL byte separates stores of which one prefix begins
// with the other. A position of a feed is a revision of etcd.
//
// # A restored etcd
//
// An etcd that is restored from a snapshot has lost the changes since the snapshot, such as
// revocations. A Backend notices by the cluster ID, by a revision that went back, or by another
// change at the position of a feed. The feeds then end with backend.ErrGap, and a message goes to
// the Logger. A feed that starts, and has yielded no change yet, has only the first two signs.
// Restore the store's own backup on top of the restored etcd, or revoke the keys again.
package etcdstore
