// Package keystore keeps API keys inside a Go process. The package creates, verifies, restricts,
// rotates, revokes, audits and backs up keys.
//
//	store, err := keystore.Open("keys", nil)
//	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
//	token := issued.Secret.Reveal()      // the secret cannot be retrieved later
//	key, err := store.Verify(ctx, token)
//	err = store.Revoke(ctx, key.ID, "leaked")
//
// A caller presents a token, which has the ID of a key and a secret. Verify is for a call: it
// returns the Key, with its owner and scopes. Bind is for a connection or a stream: it returns a
// Session, whose context ends with the key. The store has digests, and no token.
//
// # Where to begin
//
//	keys in a directory, for one process   Open
//	keys for several processes             New, with module keystore/etcdstore or keystore/pgstore
//	a gRPC server                          package interceptor
//	a server of net/http                   package interceptor/httpkeys
//	handlers of Connect                    module interceptor/connectkeys
//	the command apikeyctl on a live store  package interceptor/admin
//	pages for operators                    package keystore/console
//	metrics                                module keystore/promkeys, or package interceptor/otelkeys
//	keys of another system                 package keystore/importer
//	your own tests                         package keystore/keystoretest
//
// # Revocation
//
// Once Revoke has returned nil, no Verify or Bind that starts later accepts the key, and every
// Session of the key has ended. Revoke keeps this promise although Verify answers from a cache
// without reading the disk. Package internal/fence explains how.
//
// A Revoke that returns an error may or may not have taken effect. In both cases, Revoke has ended
// the sessions of the key in this process, and Revoke is safe to repeat.
//
// If several processes have the store open, the promise holds for all processes: see Several
// processes.
//
// Every other change that narrows a key takes effect in the same way: Disable; an Update that
// removes a scope, brings the expiry forward or tightens a restriction; SetCredits of a key without
// credits; and Rotate, at the end of the grace. RevokeAll does for many keys what Revoke does for a
// single key.
//
// # Audit
//
// The store writes every change and the [Event] of the change in one step, so neither can exist
// without the other. The time of a key's last use is written later, apart from the key, once a
// minute and by Close. A crash loses the uses of the last minutes, so Query.UnusedSince refuses a
// time from before the crash. Close the store at the end of the process.
//
// # Errors
//
// An error that wraps [ErrDenied] is an answer: the caller is refused. A [*RateLimitError] and a
// [*CreditsError] are answers too: the key is valid, but was used too often. [ErrNarrowed] asks the
// caller of Bind to try again. Every other error from Verify or Bind means trouble in the store, or
// the end of the caller's context, and says nothing about the key. Refuse the call then, but do not
// tell the caller that the key is bad. No error holds a token or part of a secret.
//
// Each method that takes a context may return ErrUnavailable, ErrCorrupt, ErrClosed or the error of
// the context, even if the comment of the method does not name the error.
//
// Store.Inspect tells an operator to which key a token belongs, and why Verify refuses the token.
// Reason names an error with a word. Store.Err reports whether the store has stopped, for a health
// check. Store.Fresh reports whether the process may admit callers now.
//
// # Concurrency
//
// A Store is safe for concurrent use. Create, Verify and Revoke are linearizable for each key: each
// behaves as if the whole call happened at one moment between call and return.
//
// # Several processes
//
// One process has a directory open at a time, and no other process serves the keys. A store on a
// backend.Feeder may be open in several processes at the same time. Each process calls [New] with a
// separate backend, and each process has a separate cache.
//
//   - Changes, Get and List are linearizable for each key, across all processes.
//   - Verify and Bind are exact once a change has returned: a call that begins later, in any
//     process, sees the change. While the change is under way, Verify and Bind may answer either
//     way, in different processes or one after the other in one process. In the process that makes
//     the change, Verify and Bind are linearizable, as in a store of one process.
//   - A change returns as soon as every process has taken the change and has ended the sessions
//     that the change does not permit. That takes a few round trips. A process that does not answer
//     delays a change by at most 1.2 times [Options.Freshness]: by then the process refuses every
//     call. If the call of the change ends before, the call returns [ErrNotEverywhere].
//   - A process that loses contact refuses every call with [ErrUnavailable] after
//     Options.Freshness at the latest, and ends its sessions. The process joins again without help.
//     If the storage itself is down for longer than Options.Freshness, all processes refuse all
//     calls.
//   - A Verify or a Bind whose key is not in memory reads the storage. Calls with the same key
//     share reads. At most 256 of these reads run at the same time. Then further calls get
//     ErrUnavailable, so that a slow storage does not collect the calls of the service.
//   - The events of all processes have one order, see [Event]. For each key, the events are in the
//     order of the changes, whatever the clocks of the processes show.
//   - RateLimit, Stats and Key.Live count what happens in one process. An expiry follows the clock
//     of each process.
//
// The guarantee does not depend on the clocks of the processes showing the same time. But no clock
// may run faster than another by a fifth. A virtual machine must not be stopped together with its
// clocks for longer than a fifth of Options.Freshness.
//
// # Durability
//
// A mutation that returned nil survives the death of the process and of the machine. Mutations that
// are under way at the same time share one write to the disk. After a write has failed, the store
// refuses every call with [ErrUnavailable] until the store is opened again, because the store
// cannot know what the disk holds.
//
// An acknowledged change is not lost in silence either. If something in a directory is damaged or
// missing, [Open] refuses the directory with [ErrCorrupt], unless Options.Recover says otherwise.
//
// On a disk that is nearly full, Create and similar calls return [ErrUnavailable] and wrap
// syscall.ENOSPC. A call that returns this error has changed nothing. Revoke and Disable continue
// to work, in a reserve. The store works again as soon as the disk has space.
//
// # The handler of package expvar
//
// Badger imports package expvar of the standard library. So every program that imports this package
// has a handler for GET /debug/vars on [net/http.DefaultServeMux]. The handler shows the program's
// command line, its memory statistics, and variables of Badger that stay zero. The handler shows
// nothing about the keys.
//
// A server with a nil Handler serves http.DefaultServeMux. If the program serves
// http.DefaultServeMux, every client that reaches the server can read these values. Serve another
// mux, and keep secrets out of the command line.
//
// # Compatibility
//
// Options may change from one run to the next: keys that were issued under another prefix, secret
// length or charset stay valid. For another Hasher, see
// [github.com/grpc-api-key/grpc-api-key/hashing.Keyring].
//
// This version can read a store that a later version has written. If a record holds a rule that
// this version does not know, only the key of the record is refused. If Open has to build indexes
// over such a record, Open refuses the store.
package keystore
