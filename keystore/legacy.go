package keystore

import (
	"crypto/sha256"
	"errors"
	"io"
	"slices"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A LegacyFormat finds the key of a token that another system has issued. Package
// [github.com/grpc-api-key/grpc-api-key/keystore/importer] has the formats of several systems.
//
// The store keeps no index of imported keys. The ID of an imported key is derived from the Name of
// the format and from the lookup, and so the store finds the key with one read, as any other key.
type LegacyFormat struct {
	// Name names the format: 1 to 32 ASCII letters, digits and inner underscores. The Name is a
	// part of the ID of each imported key, so never change the Name while the store has keys of the
	// format. Until a key is rotated, its Hint begins with the Name.
	Name string
	// Parse reports whether a token has the format. For such a token, Parse returns two texts that
	// are not empty. The lookup finds the key: the public part of the token, or, if the token has
	// none, a digest of the secret part. The ID shows in logs, and a caller who knows the lookup
	// can compute the ID, so the lookup is never a secret. The secret is the part of the token that
	// the stored digest covers: the whole token in most systems.
	//
	// Parse runs for each token that is not a token of the store itself, so strangers decide what
	// Parse receives: at most 512 bytes. A strict Parse saves a read of the storage. Parse must be
	// safe for concurrent use. If Parse panics, the token does not have the format.
	Parse func(token string) (lookup, secret string, ok bool)
}

// checkLegacy returns the formats of the options, or an error if the formats cannot be used.
func checkLegacy(formats []LegacyFormat) ([]LegacyFormat, error) {
	for i, f := range formats {
		if !token.ValidPrefix(f.Name) {
			return nil, invalid("the Name of Options.Legacy[%d] is invalid: use 1 to 32 ASCII "+
				"letters, digits and inner underscores", i)
		}
		if f.Parse == nil {
			return nil, invalid("Options.Legacy[%d] %q has no Parse", i, f.Name)
		}
		if formatNamed(formats[:i], f.Name) != nil {
			return nil, invalid("Options.Legacy has two formats with the Name %q", f.Name)
		}
	}
	return slices.Clone(formats), nil
}

func formatNamed(formats []LegacyFormat, name string) *LegacyFormat {
	for i := range formats {
		if formats[i].Name == name {
			return &formats[i]
		}
	}
	return nil
}

// legacyID returns the ID of an imported key:
//
//	6 zero bytes, 10 bytes of SHA-256("grpc-api-key/legacy/1" 0 format 0 lookup)
//
// with the version and variant bits of a UUIDv8 (RFC 9562), so that 74 bits remain. Two of ten
// million keys have the same ID with a probability of 3e-9. The import then refuses the second key.
// The zero bytes are the time of the ID: the imported keys sort before all others.
func legacyID(format, lookup string) (id token.ID) {
	h := sha256.New()
	for _, text := range []string{"grpc-api-key/legacy/1\x00", format, "\x00", lookup} {
		_, _ = io.WriteString(h, text)
	}
	copy(id[6:], h.Sum(nil))
	id[6] = 0x80 | id[6]&0x0f
	id[8] = 0x80 | id[8]&0x3f
	return id
}

// importedEnd is greater than the IDs of all imported keys, and less than any other ID.
var importedEnd = token.ID{5: 1}

// isImported reports whether the key with an ID was imported.
func isImported(id token.ID) bool { return string(id[:]) < string(importedEnd[:]) }

// parseLegacy calls Parse of a format. The format is one of the application.
func (s *Store) parseLegacy(f *LegacyFormat, text string) (id token.ID, secret string, ok bool) {
	defer s.panics.recovered("LegacyFormat.Parse")
	lookup, secret, ok := f.Parse(text)
	if !ok || lookup == "" || secret == "" {
		return id, "", false
	}
	return legacyID(f.Name, lookup), secret, true
}

// tryLegacy calls try for the key of each format that the text has, until try does not return
// ErrUnknown. tryLegacy returns the last error of try, or ErrMalformed if the text has no format.
// secret takes the place of the text from then on: the digest of the key covers the secret.
func (s *Store) tryLegacy(text string, try func(id token.ID, secret string) error) error {
	err := ErrMalformed
	if len(text) > token.MaxLength {
		return err
	}
	for i := range s.legacy {
		id, secret, ok := s.parseLegacy(&s.legacy[i], text)
		if !ok {
			continue
		}
		if err = try(id, secret); !errors.Is(err, ErrUnknown) {
			return err
		}
	}
	return err
}

// tryToken calls try for the key of a token: see tryLegacy. A text with the shape of a token of the
// store has no other format.
func (s *Store) tryToken(text string, try func(id token.ID, secret string) error) error {
	id, ok := token.Parse(text)
	if !ok && len(s.legacy) > 0 {
		return s.tryLegacy(text, try)
	}
	// The checksum saves a look at the cache, and a read of the store, for a mistyped token.
	if !ok || !token.ChecksumOK(text) {
		return ErrMalformed
	}
	return try(id, text)
}

// KeyID returns the ID of the key in the text of a token, as ParseID does, and also if the token
// has a format of Options.Legacy. If the text has several of the formats, the ID is the ID of the
// first. The store may have no key with the ID, and the ID proves nothing about the sender of the
// token.
func (s *Store) KeyID(text string) (id string, ok bool) {
	if id, ok := ParseID(text); ok {
		return id, true
	}
	_ = s.tryLegacy(text, func(found token.ID, _ string) error {
		id, ok = found.String(), true
		return nil
	})
	return id, ok
}

// recognizes reports whether the Hasher can match a digest.
func (s *Store) recognizes(d hashing.Digest) bool {
	if keyring, ok := s.hasher.(interface{ Recognizes(hashing.Digest) bool }); ok {
		return keyring.Recognizes(d)
	}
	return d.Scheme == s.dummyDigest.Scheme && len(d.Sum) == len(s.dummyDigest.Sum)
}
