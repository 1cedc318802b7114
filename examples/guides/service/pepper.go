package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"strings"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

// hasherFrom returns the Hasher for peppers in the form ID=FILE, with the current pepper first. The
// word sha256 means digests without a pepper. If there is no pepper, the Hasher is SHA256.
func hasherFrom(peppers []string) (hashing.Hasher, error) {
	if len(peppers) == 0 {
		return hashing.SHA256(), nil
	}
	var hashers []hashing.Hasher
	for _, pepper := range peppers {
		if pepper == "sha256" {
			hashers = append(hashers, hashing.SHA256())
			continue
		}
		id, file, ok := strings.Cut(pepper, "=")
		if !ok {
			return nil, fmt.Errorf("-pepper is ID=FILE, and not %q", pepper)
		}
		hasher, err := fromFile(id, file)
		if err != nil {
			return nil, fmt.Errorf("pepper %s: %w", id, err)
		}
		hashers = append(hashers, hasher)
	}
	return hashing.Keyring(hashers[0], hashers[1:]...)
}

// fromFile reads a pepper in base64, as "openssl rand -base64 32" prints one. A line break at the
// end of the file changes nothing, which is why the file does not hold the bytes themselves.
func fromFile(id, file string) (hashing.Hasher, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pepper, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(text)))
	if err != nil {
		// The error of base64 would show a part of the pepper.
		return nil, fmt.Errorf("%s does not hold base64", file)
	}
	return hashing.HMACSHA256(id, pepper)
}
