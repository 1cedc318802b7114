package keystore

import (
	"log/slog"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Character sets for Options.SecretCharset, by the names that Python's passlib gives them.
const (
	ASCII62 = token.ASCII62 // digits and letters
	ASCII50 = token.ASCII50 // without those that are easily taken for one another
	Hex     = token.Hex     // lower-case hexadecimal digits
)

// Options are the settings of a Store. Nil and the zero value are valid. They are copied: later changes have no effect.
type Options struct {
	// Prefix begins every new key, so that people and leak scanners know whose it is: letters, digits and inner
	// underscores, at most 32. Empty means "oil".
	Prefix string
	// SecretLength is the number of characters in a new key's secret, without its checksum. 0 means 64; less than 22,
	// or fewer than 112 bits with the charset, is an error.
	SecretLength int
	// SecretCharset is what new secrets are made of: 10 or more distinct printable ASCII characters without '_' and
	// space. Empty means ASCII62.
	SecretCharset string
	// Hasher makes the digests that are stored, and matches tokens with them. Nil means
	// hashing.SHA256(). Where there are keys already, another one has to be a hashing.Keyring that
	// holds the earlier one too: without it, every earlier key is refused as unknown. Another
	// pepper under the same id is an error of Open, ErrInvalid: the store keeps a check value for
	// each scheme, which is the digest of a fixed text. The first Open with a new scheme reads all
	// keys once. A Hasher that panics, or that returns what package hashing does not declare, makes
	// the call fail with ErrUnavailable; the panic is logged. A digest has at most 1,024 bytes, and
	// the name of its scheme 255.
	Hasher hashing.Hasher
	// CacheSize is the number of keys held in memory, some 900 bytes each. 0 means 65,536. With a
	// negative CacheSize, the store holds no keys in memory, and every Verify reads the storage.
	CacheSize int
	// MaxLifetime is a policy: every key must expire, at most so long after the Create or the Update that says when. 0 or
	// less means that there is none. Keys that exist keep their expiry until it is next changed.
	MaxLifetime time.Duration
	// EventRetention is how long the events of changes are kept, to the hour. 0 or less means for ever.
	EventRetention time.Duration
	// Timeout is the longest that a call waits for storage if its context does not end earlier. 0 means 10 s; negative
	// means no limit. It bounds each write of a call that makes many. It does not bound what reads all that is stored,
	// which is List, Events, RevokeAll, Purge, Backup, Restore and CheckIntegrity, nor an Observer; and a read of the
	// store's own directory cannot be interrupted, and is not.
	Timeout time.Duration
	// Recover opens a directory that is damaged with what is left of it. It is called once, before
	// Open returns, with an error that wraps ErrCorrupt and says what was damaged, and how much of
	// what was written is left. Keys may then be as they were before the changes that were lost:
	// one that was revoked in one of those is not revoked. The damaged files are kept inside the
	// directory. Nil means that Open refuses such a directory, with ErrCorrupt, and leaves it as it
	// is. New does not use it.
	//
	// If Recover panics, Open returns the panic as an error, and the directory is closed. If the
	// process ends before Recover returns, or Recover panics, the next Open calls Recover again; an
	// Open without Recover then returns ErrCorrupt. Recover never opens the database of another
	// program: Open refuses such a directory, and does not touch it.
	Recover func(lost error)
	// MustExist makes Open return an error, instead of making a new and empty store, where there is
	// no store: where the directory does not exist, and where the directory is empty, as the mount
	// point of a volume that is not mounted. The error matches fs.ErrNotExist, and nothing is made.
	// Set MustExist in a service once its store was made. New does not use it.
	MustExist bool
	// Observer is told of what happens. Nil means nobody. A panic of the Observer is logged.
	Observer Observer
	// Logger is told of every change of a key and of trouble with the storage; never of a secret.
	// Nil means silence. If the Logger's handler panics, the line is lost.
	Logger *slog.Logger
}

// settled returns the options with every default filled in.
func (o *Options) settled() Options {
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
		s.Timeout = 10 * time.Second
	}
	if s.Logger == nil {
		s.Logger = slog.New(slog.DiscardHandler)
	}
	return s
}
