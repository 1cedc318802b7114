package keystore

import (
	"log/slog"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Character sets for Options.SecretCharset. The names are from Python's passlib.
const (
	ASCII62 = token.ASCII62 // digits and letters
	ASCII50 = token.ASCII50 // without characters that are easily confused
	Hex     = token.Hex     // lower-case hexadecimal digits
)

// Options are the settings of a Store. Nil and the zero value are valid. The store copies the
// Options, so later changes have no effect.
type Options struct {
	// Prefix begins every new key, so that people and leak scanners know the owner of the key.
	// Prefix consists of letters, digits and inner underscores, at most 32. Empty means "oil".
	Prefix string
	// SecretLength is the number of characters in a new key's secret, without the checksum of the
	// key. 0 means 64. Less than 22, or fewer than 112 bits with the charset, is an error.
	SecretLength int
	// SecretCharset holds the characters of new secrets: 10 or more distinct printable ASCII
	// characters without '_' and space. Empty means ASCII62.
	SecretCharset string
	// Hasher makes the digests that are stored, and matches tokens with the digests. Nil means
	// hashing.SHA256().
	//
	// If the store has keys already, a different Hasher must be a hashing.Keyring that also holds
	// the earlier Hasher. Otherwise every earlier key is refused as unknown. If the pepper was
	// changed but the id was not, Open returns ErrInvalid. To detect the change, the store keeps a
	// check value for each scheme: the digest of a fixed text. The first Open with a new scheme
	// reads all keys once.
	//
	// If a Hasher panics, or returns what package hashing does not declare, the call fails with
	// ErrUnavailable. The store logs the panic. A digest has at most 1,024 bytes, and the name of
	// its scheme at most 255.
	Hasher hashing.Hasher
	// Legacy has the formats of the tokens of other systems, for keys that Import has taken from
	// these systems. For a token that is not of the store's own form, Verify and Bind ask the
	// formats in this order, and take the first key that the store has. Tokens of the store's own
	// form are not affected. Empty means that the store accepts its own tokens only.
	Legacy []LegacyFormat
	// CacheSize is the number of keys held in memory. A key with a name, an owner and two scopes
	// takes some 450 bytes, 50 more until its last use is written, and 160 more if the key expires
	// or is restricted otherwise. 0 means 65,536. With a negative CacheSize, the store holds no
	// keys in memory, and every Verify reads the storage.
	CacheSize int
	// MaxLifetime is a policy: every key must expire, at most MaxLifetime after the Create or the
	// Update that sets the expiry. 0 or less means no policy. Existing keys keep their expiry until
	// the expiry is next changed.
	MaxLifetime time.Duration
	// EventRetention is how long the store keeps the events of changes, to the hour. 0 or less
	// means forever. The clock of the machine decides which events are old: a clock that is set far
	// ahead removes events too early.
	EventRetention time.Duration
	// Timeout is the longest time that a call waits for storage, unless the context of the call
	// ends earlier. 0 means 10 s. Negative means no limit; but if several processes may have the
	// store open, a write then ends after 10 s. In a call that makes many writes, Timeout bounds
	// each write.
	//
	// Timeout does not bound calls that read many keys or events: List, Count, Events, Follow,
	// RevokeAll, Purge, Backup, Restore, Import and CheckIntegrity. Timeout does not bound an
	// Observer. A read of the store's own directory cannot be interrupted, so Timeout does not
	// bound the read either.
	Timeout time.Duration
	// Freshness is for a backend.Feeder, which several processes may have open at the same time.
	// Freshness is how long a process may admit callers after its last proof that it knows every
	// change of every process. A process that loses contact with the storage, or with the feed of
	// the changes, refuses every call with ErrUnavailable after Freshness at the latest, and ends
	// its sessions. Without failures, each process has a new proof every quarter of Freshness.
	//
	// Freshness also bounds how long a change waits for a process that does not answer: 1.2 times
	// Freshness, because clocks do not run at the same speed. Timeout must be longer than that.
	// Events, Follow and RevokeAll wait until the other processes have removed a process that does
	// not answer, for about three times Freshness. With a shorter Timeout, Events and RevokeAll
	// return ErrUnavailable until then: call them again.
	//
	// Freshness belongs to the store, and all processes have the same value. 0 means the value of
	// the store, or 3 s for a new store. Any other value than the value of the store gives
	// ErrInvalid, unless no other process has the store open: then the store takes the value. The
	// shortest value is 400 ms. 3 s is longer than an election of etcd. A shorter value closes the
	// gates of all processes when the leader of the storage fails.
	//
	// For Open, and for New with a backend that is not a Feeder, a Freshness other than 0 gives
	// ErrInvalid: the store belongs to one process.
	Freshness time.Duration
	// Recover lets Open open a damaged directory with the data that remains. Open calls Recover
	// once, before Open returns. The argument is an error that wraps ErrCorrupt. The error says
	// what was damaged, and how much of the written data remains.
	//
	// Keys may then be as they were before the lost changes: if a lost change revoked a key, the
	// key is no longer revoked. Open keeps the damaged files inside the directory. If Recover is
	// nil, Open refuses a damaged directory with ErrCorrupt, and does not change the directory. New
	// does not use Recover.
	//
	// If Recover panics, Open returns the panic as an error, and closes the directory. If Recover
	// panics, or the process ends before Recover returns, the next Open calls Recover again. An
	// Open without Recover then returns ErrCorrupt. Recover never opens the database of another
	// program: Open refuses the directory of another program, and does not touch the directory.
	Recover func(lost error)
	// MustExist makes Open return an error if there is no store, instead of making a new and empty
	// store. There is no store if the directory does not exist, or if the directory is empty. The
	// mount point of a volume that is not mounted is empty, for example. The error matches
	// fs.ErrNotExist, and Open makes nothing. Set MustExist in a service once the store of the
	// service was made. New does not use MustExist.
	MustExist bool
	// RebuildIndexes makes Open and New remove all indexes and build the indexes again from the
	// keys and the events. Set RebuildIndexes for one Open after CheckIntegrity has named a damaged
	// index, while no other process has the store open: otherwise New returns ErrInvalid. Open and
	// New return once the indexes are complete, after about a minute for each million keys and
	// events. If the process is killed before the end, the next Open continues, whether
	// RebuildIndexes is set or not.
	//
	// If a process was suspended, and was removed from the store, it may wake up during the
	// rebuild. Until the indexes are complete, its calls that use an index, such as RevokeAll with
	// an Owner, return ErrUnavailable.
	//
	// RebuildIndexes brings no lost key and no lost event back. CheckIntegrity does not name an
	// event that was lost before the rebuild.
	RebuildIndexes bool
	// Observer is notified of what happens in the store. Nil means that there is no Observer. The
	// store logs a panic of the Observer.
	Observer Observer
	// Logger reports every change of a key and trouble with the storage. The store never logs a
	// secret. Nil means silence. If the Logger's handler panics, the line is lost.
	Logger *slog.Logger
}

// withDefaults returns the options with every default filled in.
func (o *Options) withDefaults() Options {
	var s Options
	if o != nil {
		s = *o
	}
	if s.Prefix == "" {
		s.Prefix = "oil"
	}
	if s.SecretLength == 0 {
		s.SecretLength = 64
	}
	if s.SecretCharset == "" {
		s.SecretCharset = ASCII62
	}
	if s.Hasher == nil {
		s.Hasher = hashing.SHA256()
	}
	if s.CacheSize == 0 {
		s.CacheSize = 1 << 16
	}
	if s.Timeout == 0 {
		s.Timeout = defaultTimeout
	}
	if s.Logger == nil {
		s.Logger = slog.New(slog.DiscardHandler)
	}
	return s
}

// defaultTimeout is the Timeout if Options.Timeout is 0.
const defaultTimeout = 10 * time.Second
