// Package admin is a gRPC service that manages the keys of a live store: create, list, update,
// rotate, disable, revoke, follow the changes, back up. Only the process that has opened a
// directory can manage its keys, so the service runs in that process. For most uses, serve a unix
// socket:
//
//	srv, err := admin.New(store)
//	go srv.ServeUnix(ctx, "run/admin.sock")
//
// Then use apikeyctl, or the clients of package adminpb. To serve the methods over TLS too,
// register the service with the server that the interceptors protect:
//
//	auth, err := interceptor.New(store, admin.Rules()...)
//	server := grpc.NewServer(append(auth.ServerOptions(), tls)...)
//	srv.Register(server)
//
// If several processes share the store, as with etcd, each process can serve the keys.
//
// # Who may call
//
// Each call has a principal: the holder of the key that an Authenticator has accepted, or the user
// at the other end of a unix socket with [PeerCredentials]. The service refuses a call without a
// principal, so a server without an Authenticator admits no caller. The events of the store name
// the principal as the actor: key:01k9…, or unix:alice(1000).
//
// A key needs a scope, also on a server without Rules:
//
//	keys:read    GetKey, ListKeys, LookupKey, ListEvents, WatchEvents, GetStats
//	keys:write   CreateKey, UpdateKey, RotateKey, DisableKey, EnableKey, RevokeKey, SetCredits,
//	             AddCredits
//	keys:admin   all of these, and BatchRevokeKeys, PurgeKeys, Backup, Restore, CheckIntegrity
//
// keys:write does not include keys:read. The keys of all owners are within reach of each of these
// scopes.
//
// # The ceiling
//
// A caller without keys:admin cannot make more of a key than the caller's own key is:
//
//   - To create, update, rotate or enable a key, or to change its credits, the caller's key must
//     have every scope that the key has afterwards. See [keystore.Key.HasScope].
//   - A key that is created or rotated, or gets another expiry, must not last longer than the
//     caller's key.
//   - Only a caller with keys:admin changes a key that has keys:admin, in any way.
//
// A user on a socket has no ceiling, and needs no key.
//
// # Secrets
//
// CreateKey and RotateKey return the secret of a key, once. The option debug_redact of the protobuf
// fields has no effect in Go: String, the verb %v and every encoder show the secret. Never print or
// log such a message, and give [SecretMethods] to interceptors that log messages.
//
// # Statuses
//
// Each error has one ErrorInfo with the domain github.com/grpc-api-key/grpc-api-key:
//
//	case                                          code                reason
//	the call has no principal                     Unauthenticated     PRINCIPAL_MISSING
//	the key lacks the scope of the method         PermissionDenied    INSUFFICIENT_SCOPE (scopes)
//	the ceiling of the caller                     PermissionDenied    SCOPE_CEILING (scopes, or
//	                                                                  expire_time)
//	a field cannot be used, or is not known       InvalidArgument     INVALID_ARGUMENT
//	a page token of another request               InvalidArgument     PAGE_TOKEN_INVALID
//	BatchRevokeKeys with neither filter nor all   InvalidArgument     SELECTION_EMPTY
//	a request_id with other content               InvalidArgument     REQUEST_ID_REUSED
//	more than 1,024 calls with a request_id
//	are in progress                               ResourceExhausted   REQUESTS_IN_PROGRESS *
//	there is no such key                          NotFound            KEY_NOT_FOUND
//	the key is revoked and cannot be changed      FailedPrecondition  KEY_REVOKED
//	more keys are selected than expected          FailedPrecondition  SELECTION_CHANGED (expected,
//	                                                                  found)
//	the key has another etag                      Aborted             ETAG_MISMATCH
//	the disk is full, and nothing was changed     Unavailable         STORE_FULL
//	the store did not answer                      Unavailable         STORE_UNAVAILABLE *
//	the store did not answer a change, which may
//	have been made                                Unavailable         OUTCOME_UNKNOWN *
//	the change is made, but another process may
//	not know the change yet                       Unavailable         NOT_EVERYWHERE *
//	the server is stopping                        Unavailable         STORE_CLOSED
//	stored data is damaged                        DataLoss            STORE_CORRUPT
//	the backup for Restore is damaged             DataLoss            BACKUP_CORRUPT
//
// The reasons with an asterisk come with a RetryInfo. The words in parentheses are entries of the
// metadata. The Authenticator has more reasons: see package interceptor.
//
// # Repeated requests
//
// A client who has lost the answer to CreateKey or RotateKey repeats the call with the same
// request_id, and gets the same answer, with the secret. The server keeps the answers 10 minutes
// long, in memory, and 1,024 at most: the oldest answer goes first. Each process has its own
// answers.
//
// A repeat of AddCredits with the same request_id does not add the credits again, also if the first
// call returned OUTCOME_UNKNOWN. If the key has changed since such a call, by that call or by
// another one, the repeat returns ETAG_MISMATCH. A call without a request_id adds the credits each
// time.
package admin
