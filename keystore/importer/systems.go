package importer

import (
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Unkey is unkey (https://unkey.com). The export is the table keys. Read takes external_id and
// permissions too, if the export has these columns from a join. Keys that unkey has itself taken
// from seam, with the SHA-256 of their last part in hexadecimal, have the second format.
//
// The columns remaining_requests, refill_amount and refill_day become the credits of the key. Unkey
// refills at the end of a day, and the store at the beginning of the day, in UTC.
func Unkey() System {
	return System{
		name: "unkey",
		formats: []keystore.LegacyFormat{
			sumFormat("unkey", func(token string) bool {
				prefix, random := tail(token)
				return only(random, alnum, 16) && only(prefix, alnum+"_-.", 0)
			}),
			{Name: "unkey_seam", Parse: func(token string) (lookup, secret string, ok bool) {
				rest, long := tail(token)
				prefix, short := tail(rest)
				if prefix == "" || !only(short, alnum, 1) || !only(long, alnum, 16) {
					return "", "", false
				}
				return lookupOf(long), long, true
			}},
		},
		rows: table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "unkey"
			digest := r.need("hash")
			if len(digest) == hex.EncodedLen(32) {
				k.Format = "unkey_seam"
			}
			r.sumDigest(&k, digest)
			k.Spec = keystore.Spec{
				Name:      firstOf(r.text("name", "start", "id"), "unkey"),
				Owner:     r.text("external_id", "owner_id", "identity_id"),
				Scopes:    r.list("permissions"),
				Metadata:  r.metadata("meta"),
				ExpiresAt: r.time("expires"),
			}
			k.CreatedAt = r.time("created_at_m", "created_at")
			k.LastUsedAt = r.time("last_used_at")
			k.RevokedAt = r.time("deleted_at_m", "deleted_at")
			if !r.flag("enabled", true) {
				k.DisabledAt = r.time("updated_at_m")
				r.disabled(&k)
			}
			if k.Spec.Credits = r.credits("remaining_requests"); k.Spec.Credits != nil &&
				r.text("refill_amount") != "" {
				k.Spec.Credits.Refill = keystore.Refill{Amount: r.integer("refill_amount"),
					Daily:    r.text("refill_day") == "",
					MonthDay: int(min(r.integer("refill_day"), 32))} // 32 is refused
			}
			return k
		},
	}
}

// disabled disables a key whose time is not known.
func (r *row) disabled(k *keystore.Imported) {
	if k.DisabledAt.IsZero() {
		k.DisabledAt = r.now
	}
}

// Sanctum is Laravel Sanctum. The export is the table personal_access_tokens. A client may present
// a token with or without the number and the vertical bar before the secret, as Sanctum permits.
func Sanctum() System {
	const random = 40 // characters; the checksum of newer tokens follows
	return System{
		name: "sanctum",
		formats: []keystore.LegacyFormat{{
			Name: "sanctum",
			Parse: func(token string) (lookup, secret string, ok bool) {
				id, secret, found := strings.Cut(token, "|")
				if !found {
					secret = token
				} else if !only(id, digits, 1) {
					return "", "", false
				}
				n := len(secret) - random
				if n < 0 || !only(secret[n:], alnum, random) || !only(secret[:n], alnum+"_-.", 0) {
					return "", "", false
				}
				return lookupOf(secret), secret, true
			},
		}},
		rows: table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "sanctum"
			r.sumDigest(&k, r.need("token"))
			k.Spec = keystore.Spec{
				Name:      firstOf(r.text("name", "id"), "sanctum"),
				Scopes:    r.list("abilities"),
				Metadata:  r.metadata(""),
				ExpiresAt: r.time("expires_at"),
			}
			if id := r.text("tokenable_id"); id != "" {
				k.Spec.Owner = strings.TrimPrefix(r.text("tokenable_type")+":"+id, ":")
			}
			k.CreatedAt, k.LastUsedAt = r.time("created_at"), r.time("last_used_at")
			return k
		},
	}
}

// DRF is djangorestframework-api-key. The export is the table rest_framework_api_key_apikey. Keys
// of version 3 need hashing.SHA512, and older keys hashing.PBKDF2SHA256, as earlier hashers in the
// hashing.Keyring of the store. Argon2 and bcrypt are refused.
func DRF() System {
	return System{
		name: "drf",
		formats: []keystore.LegacyFormat{{
			Name: "drf",
			Parse: func(token string) (lookup, secret string, ok bool) {
				prefix, random, _ := strings.Cut(token, ".")
				return prefix, token, only(prefix, alnum, 4) && only(random, alnum, 16)
			},
		}},
		rows: table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "drf"
			k.Lookup = r.need("prefix")
			k.Digest = djangoDigest(r.need("hashed_key"))
			r.columns["id"] = "" // of the prefix and the digest
			k.Spec = keystore.Spec{
				Name:      firstOf(r.text("name", "prefix"), "drf"),
				Metadata:  r.metadata(""),
				ExpiresAt: r.time("expiry_date"),
			}
			k.CreatedAt = r.time("created")
			if r.flag("revoked", false) {
				k.RevokedAt = r.now
			}
			return k
		},
	}
}

// djangoDigest returns the digest in a text of Django. The scheme of a method that no Hasher of
// this module matches is the name of the method.
func djangoDigest(text string) hashing.Digest {
	if sum, ok := strings.CutPrefix(text, "sha512$$"); ok {
		if b, err := hex.DecodeString(sum); err == nil {
			return hashing.Digest{Scheme: "sha512", Sum: b}
		}
	}
	method, _, _ := strings.Cut(text, "$")
	if method == "pbkdf2_sha256" {
		return hashing.Digest{Scheme: "pbkdf2-sha256", Sum: []byte(text)}
	}
	if !slices.Contains([]string{"argon2", "bcrypt", "bcrypt_sha256", "scrypt", "pbkdf2_sha1",
		"sha512", "plain_sha512", "plain_sha256"}, method) {
		method = "unknown" // what stands there may be no method
	}
	return hashing.Digest{Scheme: "django " + method, Sum: []byte(text)}
}

// FlaskAPIKey is flask-api-key, after which the tokens of this module are modelled. The export is
// the table of the application, with the columns uuid, hashed_key and label, and perhaps owner,
// created_at, expires_at, last_used_at and revoked. The hasher of the module hashing/sha2crypt must
// be an earlier hasher in the hashing.Keyring of the store.
func FlaskAPIKey() System {
	return System{
		name: "flask-api-key",
		formats: []keystore.LegacyFormat{{
			Name: "flask_api_key",
			Parse: func(token string) (lookup, secret string, ok bool) {
				// flask-api-key takes a dot and an underscore for the same.
				parts := strings.Split(strings.ReplaceAll(token, "_", "."), ".")
				if len(parts) != 3 || !only(parts[0], alnum, 1) || len(parts[1]) != 32 ||
					!only(parts[1], hexes, 32) || !only(parts[2], alnum, 16) {
					return "", "", false
				}
				return parts[1], token, true
			},
		}},
		rows: table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "flask_api_key"
			k.Lookup = strings.ToLower(strings.ReplaceAll(r.need("uuid"), "-", ""))
			if !only(k.Lookup, hexes, 32) || len(k.Lookup) != 32 {
				r.refuse(keystore.ImportUnreadable, "the column uuid is no UUID")
			}
			digest := r.need("hashed_key")
			k.Digest = hashing.Digest{Scheme: "sha2-crypt", Sum: []byte(digest)}
			if !strings.HasPrefix(digest, "$5$") && !strings.HasPrefix(digest, "$6$") {
				k.Digest.Scheme = "another method than sha512_crypt"
			}
			k.Spec = keystore.Spec{
				Name:      firstOf(r.text("label", "name"), k.Lookup),
				Owner:     r.text("owner", "owner_id", "user_id"),
				Metadata:  r.metadata("metadata"),
				ExpiresAt: r.time("expires_at", "expires"),
			}
			k.CreatedAt, k.LastUsedAt = r.time("created_at", "created"), r.time("last_used_at")
			if k.RevokedAt = r.time("revoked_at"); k.RevokedAt.IsZero() && r.flag("revoked", false) {
				k.RevokedAt = r.now
			}
			return k
		},
	}
}

// BetterAuth is the plugin api-key of better-auth. The export is the table apikey. The column key
// holds a digest, or the token itself if disableKeyHashing is set. The columns remaining,
// refillAmount and refillInterval become the credits of the key. Better-auth deletes a key without
// remaining uses and without a refill; the store keeps the key.
func BetterAuth() System {
	return System{
		name: "better-auth",
		formats: []keystore.LegacyFormat{
			sumFormat("better_auth", func(token string) bool { return only(token, alnum+"_-.", 20) }),
		},
		rows: table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "better_auth"
			stored := r.need("key")
			// A digest has 43 characters, and is never taken for a token: the digest would become
			// a credential. A token has the prefix and, unless the length was changed, 64 letters.
			random := strings.TrimPrefix(stored, r.text("prefix"))
			if len(stored) != 43 && only(random, letters, 20) {
				k.Token = keystore.NewSecret(stored)
			} else {
				r.sumDigest(&k, stored)
			}
			k.Spec = keystore.Spec{
				Name:      firstOf(r.text("name", "start", "id"), "better-auth"),
				Owner:     r.text("referenceid", "userid"),
				Scopes:    r.permissions("permissions"),
				Metadata:  r.metadata("metadata"),
				ExpiresAt: r.time("expiresat"),
			}
			calls, window := r.number("ratelimitmax"), r.number("ratelimittimewindow")
			if r.flag("ratelimitenabled", false) && calls >= 1 && window > 0 {
				k.Spec.RateLimit = keystore.RateLimit{
					PerSecond: calls * 1000 / window, Burst: int(min(calls, 1<<30))}
			}
			k.CreatedAt, k.LastUsedAt = r.time("createdat"), r.time("lastrequest")
			if !r.flag("enabled", true) {
				k.DisabledAt = r.time("updatedat")
				r.disabled(&k)
			}
			k.Spec.Credits = r.credits("remaining")
			r.refillEvery(k.Spec.Credits)
			return k
		},
	}
}

// refillEvery sets the refill of better-auth, which refills at the first use after the interval. If
// a refill is due, better-auth would make it at the next use, so refillEvery makes it.
func (r *row) refillEvery(c *keystore.Credits) {
	amount, millis := r.integer("refillamount"), r.integer("refillinterval")
	if c == nil || amount == 0 || millis == 0 {
		return
	}
	c.Refill = keystore.Refill{Amount: amount,
		Every: time.Duration(min(millis, 1<<40)) * time.Millisecond} // 1<<40 is refused
	last := r.time("lastrefillat", "createdat")
	if !last.IsZero() && r.now.Sub(last) > c.Refill.Every {
		c.Remaining = amount
	}
}

// permissions returns the scopes for a JSON object of lists: {"files": ["read"]} is files:read.
func (r *row) permissions(name string) (scopes []string) {
	var object map[string][]string
	r.object(name, &object)
	for resource, actions := range object {
		for _, action := range actions {
			scopes = append(scopes, resource+":"+action)
		}
	}
	slices.Sort(scopes)
	return scopes
}

// AWS is the API keys of AWS API Gateway: the file format of its import and export.
func AWS() System {
	return System{
		name:    "aws",
		formats: []keystore.LegacyFormat{sumFormat("aws", anyToken)},
		rows:    table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "aws"
			k.Token = keystore.NewSecret(r.need("key"))
			k.Spec = keystore.Spec{
				Name:     firstOf(r.text("name"), "aws"),
				Metadata: r.metadata("", "description", "usageplanids"),
			}
			k.CreatedAt = r.time("createddate")
			if !r.flag("enabled", true) {
				k.DisabledAt = r.time("lastupdateddate")
				r.disabled(&k)
			}
			return k
		},
	}
}

// anyToken reports whether a text can be a credential.
func anyToken(token string) bool {
	return !strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' })
}

// Plain is an export in the form of this module, for any other system. Each row has a column token,
// or a column digest with the SHA-256 of the token, in hexadecimal or base64. A column scheme, if
// there is one, is sha256. The other columns are name, owner, scopes (a list in JSON, or words),
// metadata (a JSON object), created_at, expires_at, not_before, last_used_at, revoked_at and
// disabled_at.
//
// Do not put digests into the column token. The digests would become the credentials.
func Plain() System {
	return System{
		name:    "plain",
		formats: []keystore.LegacyFormat{sumFormat("plain", anyToken)},
		rows:    table,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "plain"
			if digest := r.text("digest"); digest != "" {
				r.sumDigest(&k, digest)
				if scheme := r.text("scheme"); scheme != "" && scheme != "sha256" {
					r.refuse(keystore.ImportDigest, "the scheme is not sha256: only the SHA-256 of "+
						"a token finds the key of the token")
				}
			} else if r.text("token") == "" {
				r.refuse(keystore.ImportUnreadable, "the row has neither a token nor a digest")
				r.needOneOf("token", "digest")
			}
			if token := r.text("token"); token != "" {
				k.Token = keystore.NewSecret(token)
			}
			k.Spec = keystore.Spec{
				Name:      firstOf(r.text("name", "owner"), "imported"),
				Owner:     r.text("owner"),
				Scopes:    r.list("scopes"),
				Metadata:  r.metadata("metadata"),
				ExpiresAt: r.time("expires_at"),
				NotBefore: r.time("not_before"),
			}
			k.CreatedAt, k.LastUsedAt = r.time("created_at"), r.time("last_used_at")
			k.RevokedAt, k.DisabledAt = r.time("revoked_at"), r.time("disabled_at")
			return k
		},
	}
}

// Kong is the plugin key-auth of Kong. The export is the output of deck gateway dump, as YAML or
// JSON, or rows with the columns key, username, custom_id, created_at and ttl.
func Kong() System {
	return System{
		name:    "kong",
		formats: []keystore.LegacyFormat{sumFormat("kong", anyToken)},
		rows:    kongRows,
		key: func(r *row) (k keystore.Imported) {
			k.Format = "kong"
			k.Token = keystore.NewSecret(r.need("key"))
			k.Spec = keystore.Spec{
				Name:     firstOf(r.text("username", "custom_id", "id"), "kong"),
				Owner:    r.text("custom_id", "username", "consumer", "consumer_id"),
				Metadata: r.metadata("", "tags"),
			}
			k.CreatedAt = r.time("created_at")
			if ttl := r.number("ttl"); ttl > 0 {
				if k.CreatedAt.IsZero() {
					r.refuse(keystore.ImportUnreadable, "the key has a ttl, and no created_at: "+
						"write the columns from the database")
				}
				k.Spec.ExpiresAt = k.CreatedAt.Add(time.Duration(ttl * float64(time.Second)))
			}
			return k
		},
	}
}
