// Package keystore keeps API keys inside a Go process: it creates, verifies, restricts, rotates, revokes, audits and backs
// them up. It knows nothing of gRPC; package [github.com/grpc-api-key/grpc-api-key/interceptor] joins the two.
//
//	store, err := keystore.Open("keys", nil)
//	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
//	token := issued.Secret.Reveal()      // the only time that it can be had
//	key, err := store.Verify(ctx, token)
//	err = store.Revoke(ctx, key.ID, "leaked")
//
// # Revocation
//
// Once Revoke has returned nil, no Verify or Bind that starts later admits the key, and every context that Bind gave out
// for it is cancelled. That holds although Verify answers from a cache, without asking the disk; package internal/fence
// says how. A Revoke that returns an error may or may not have taken effect; it has cut this process's live contexts in
// either case, and is safe to repeat.
//
// Whatever else makes a key admit to less goes the same way: Disable, an Update that takes a scope away, brings the
// expiry forward or tightens a restriction, and Rotate, at the end of the grace. RevokeAll does for many keys what Revoke
// does for one.
//
// # Audit
//
// Every change is written in one step with an [Event] of it, so that neither can be without the
// other. When a key was last used is written behind, apart from the key, once a minute and by
// Close. A crash loses the uses of the last minutes, so Query.UnusedSince refuses a time from
// before the crash. Close the store at the end of the process.
//
// # Errors
//
// An error that wraps [ErrDenied] is an answer: the caller is not let in. Every other error from Verify or Bind is
// trouble of the store's own, or the end of the caller's context, and says nothing about the key: refuse the call,
// but do not tell the caller that its key is bad. No error holds a token or part of a secret.
//
// Store.Inspect tells an operator which key a token is of, and why Verify refuses the token. Reason names an error with a
// word. Store.Err says whether the store has stopped, for a health check.
//
// # Concurrency
//
// A Store is safe for concurrent use. Create, Verify and Revoke are linearizable for each key: they behave as if each
// happened at one moment between its call and its return.
//
// # Durability
//
// A mutation that returned nil survives the death of the process and of the machine. Many that are under way at once
// share one write to the disk. After a write that failed, the store refuses everything with [ErrUnavailable] until it
// is opened again, because nobody can know what the disk holds.
//
// What was acknowledged is not lost in silence either: [Open] refuses a directory in which something is damaged or
// missing, with [ErrCorrupt], unless Options.Recover says otherwise. On a disk that is nearly full, Create and the like
// return [ErrUnavailable], and wrap syscall.ENOSPC, while Revoke and Disable go on in a reserve; nothing has happened
// then, and the store goes on when there is room.
//
// # The handler of package expvar
//
// Badger imports package expvar of the standard library, so that every program which imports this
// package has a handler for GET /debug/vars on [net/http.DefaultServeMux]. The handler shows the
// program's command line, its memory statistics, and variables of Badger's that stay zero; nothing
// of the keys. If the program serves http.DefaultServeMux, which a nil Handler stands for, whoever
// reaches the server can read these: serve a mux of your own, and keep secrets out of the command
// line.
//
// # Compatibility
//
// Options may change from one run to the next: keys that were issued under another prefix, secret length or charset
// stay valid. For another Hasher, see [github.com/grpc-api-key/grpc-api-key/hashing.Keyring]. A store that was
// written by a later version of this package is readable as long as its records hold no rule that this version does
// not know; one that does is refused, by itself.
//
// One process has a directory open at a time. Revocation is at once in that process, and there is no other.
package keystore
