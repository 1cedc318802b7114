package hashing_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

const token = "oil_01k2rx7y72f969t3gz58xmrqbe_" +
	"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ010xsMAL"

func peppered(t testing.TB, id string, pepper []byte) hashing.Hasher {
	t.Helper()
	h, err := hashing.HMACSHA256(id, pepper)
	require.NoError(t, err)
	return h
}

func keyring(t testing.TB, current hashing.Hasher, earlier ...hashing.Hasher) hashing.Hasher {
	t.Helper()
	h, err := hashing.Keyring(current, earlier...)
	require.NoError(t, err)
	return h
}

// The vectors are NIST's examples for FIPS 180, and one of 128 bytes that was computed with
// Python's hashlib. The last two just fill the buffer on the stack, and overflow the buffer.
func TestSHA256Vectors(t *testing.T) {
	for message, sum := range map[string]string{
		"":    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
		"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": "" +
			"248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
		strings.Repeat("a", 128): "" +
			"6836cf13bac400e9105071cd6af47084dfacad4e5e302c94bfed24e013afb73e",
		strings.Repeat("a", 1_000_000): "" +
			"cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
	} {
		d := hashing.SHA256().Digest(message)
		require.Equal(t, "sha256", d.Scheme)
		require.Equal(t, sum, hex.EncodeToString(d.Sum))
		require.Equal(t, hashing.Match, hashing.SHA256().Match(d, message))
	}
}

// The vectors are test cases 1, 3, 4, 6 and 7 of RFC 4231. The key of case 2 is too short for a
// pepper, and the sum of case 5 is truncated.
func TestHMACSHA256Vectors(t *testing.T) {
	counting := make([]byte, 25)
	for i := range counting {
		counting[i] = byte(i + 1)
	}
	for _, v := range []struct {
		key       []byte
		data, sum string
	}{
		{
			bytes.Repeat([]byte{0x0b}, 20), "Hi There",
			"b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
		},
		{
			bytes.Repeat([]byte{0xaa}, 20), strings.Repeat("\xdd", 50),
			"773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
		},
		{
			counting, strings.Repeat("\xcd", 50),
			"82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
		},
		{
			bytes.Repeat([]byte{0xaa}, 131),
			"Test Using Larger Than Block-Size Key - Hash Key First",
			"60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
		},
		{bytes.Repeat([]byte{0xaa}, 131),
			"This is a test using a larger than block-size key " +
				"and a larger than block-size data. " +
				"The key needs to be hashed before being used by the HMAC algorithm.",
			"9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"},
	} {
		h := peppered(t, "rfc4231", v.key)
		for range 2 { // first with a new state, then with a used state
			d := h.Digest(v.data)
			require.Equal(t, "hmac-sha256:rfc4231", d.Scheme)
			require.Equal(t, v.sum, hex.EncodeToString(d.Sum))
		}
	}
}

func TestMatch(t *testing.T) {
	all := map[string]hashing.Hasher{
		"sha256":        hashing.SHA256(),
		"hmac-sha256:a": peppered(t, "a", []byte("0123456789abcdef")),
		"hmac-sha256:b": peppered(t, "b", []byte("fedcba9876543210")),
	}
	for scheme, h := range all {
		t.Run(scheme, func(t *testing.T) {
			d := h.Digest(token)
			require.Equal(t, scheme, d.Scheme)
			require.Equal(t, hashing.Match, h.Match(d, token))

			for _, other := range []string{
				"", token + "x", token[1:], strings.ToUpper(token), strings.Repeat("x", 1000),
			} {
				require.Equal(t, hashing.Mismatch, h.Match(d, other))
				require.Equal(t, hashing.Match, h.Match(h.Digest(other), other))
			}
			for name, other := range all {
				if name != scheme {
					require.Equal(t, hashing.Mismatch, other.Match(d, token), "another scheme")
					claimed := hashing.Digest{Scheme: name, Sum: d.Sum}
					require.Equal(t, hashing.Mismatch, other.Match(claimed, token),
						"a digest with the name of another scheme")
				}
			}
			for _, damaged := range [][]byte{
				nil, {}, d.Sum[:31], append(bytes.Clone(d.Sum), 0), make([]byte, 32),
			} {
				require.Equal(t, hashing.Mismatch,
					h.Match(hashing.Digest{Scheme: scheme, Sum: damaged}, token))
			}
			for i := range d.Sum {
				d.Sum[i] ^= 1
				require.Equal(t, hashing.Mismatch, h.Match(d, token))
				d.Sum[i] ^= 1
			}
			require.Equal(t, hashing.Match, h.Match(d, token),
				"digests are not shared between calls")
			require.Equal(t, hashing.Mismatch, h.Match(hashing.Digest{}, ""))
		})
	}
}

func TestTheZeroResultIsNo(t *testing.T) {
	var r hashing.Result
	require.Equal(t, hashing.Mismatch, r)
}

func TestThePepperIsCopied(t *testing.T) {
	pepper := []byte("0123456789abcdef")
	h := peppered(t, "a", pepper)
	clear(pepper)
	digest := peppered(t, "a", []byte("0123456789abcdef")).Digest(token)
	require.Equal(t, hashing.Match, h.Match(digest, token))
}

func TestHMACSHA256Refuses(t *testing.T) {
	pepper := []byte("secret text, of more than 16 bytes")
	for _, id := range []string{"", "a b", "a:b", "a/b", "ä", "a\x00", strings.Repeat("a", 65)} {
		h, err := hashing.HMACSHA256(id, pepper)
		require.ErrorContains(t, err, "the id of a pepper must consist of 1 to 64 ASCII letters")
		require.Nil(t, h)
	}
	for _, id := range []string{"a", "2026-11", "A.b_c-9", strings.Repeat("a", 64)} {
		require.Equal(t, "hmac-sha256:"+id, peppered(t, id, pepper[:16]).Digest(token).Scheme)
	}
	h, err := hashing.HMACSHA256("a", pepper[:15])
	require.ErrorContains(t, err, "the pepper has 15 bytes and needs at least 16: use 32 bytes")
	require.NotContains(t, err.Error(), "secret")
	require.Nil(t, h)
}

func TestKeyring(t *testing.T) {
	older, old := hashing.SHA256(), peppered(t, "1", make([]byte, 16))
	current := peppered(t, "2", make([]byte, 32))
	ring := keyring(t, current, old, older)
	require.Equal(t, "hmac-sha256:2", ring.Digest(token).Scheme)
	require.Equal(t, hashing.Match, ring.Match(ring.Digest(token), token))
	for _, h := range []hashing.Hasher{old, older} {
		require.Equal(t, hashing.MatchOutdated, ring.Match(h.Digest(token), token))
		require.Equal(t, hashing.Mismatch, ring.Match(h.Digest(token), token+"x"))
	}
	unknown := peppered(t, "3", make([]byte, 16))
	require.Equal(t, hashing.Mismatch, ring.Match(unknown.Digest(token), token))
	require.Equal(t, hashing.Mismatch, ring.Match(hashing.Digest{}, token))

	alone := keyring(t, current)
	require.Equal(t, hashing.Match, alone.Match(current.Digest(token), token))
	require.Equal(t, hashing.Mismatch, alone.Match(old.Digest(token), token))

	nested := keyring(t, ring, unknown)
	require.Equal(t, hashing.Match, nested.Match(current.Digest(token), token))
	require.Equal(t, hashing.MatchOutdated, nested.Match(old.Digest(token), token),
		"the inner keyring reports the digest as outdated")
	require.Equal(t, hashing.MatchOutdated, nested.Match(unknown.Digest(token), token))
	around := keyring(t, unknown, ring)
	require.Equal(t, hashing.MatchOutdated, around.Match(current.Digest(token), token))

	same := keyring(t, current, old, peppered(t, "2", make([]byte, 32)))
	require.Equal(t, hashing.Match, same.Match(current.Digest(token), token),
		"the same pepper twice")

	earlier := []hashing.Hasher{old}
	ring = keyring(t, current, earlier...)
	earlier[0] = nil
	require.Equal(t, hashing.MatchOutdated, ring.Match(old.Digest(token), token),
		"Keyring copies the list")
}

func TestKeyringRefusesNil(t *testing.T) {
	h, err := hashing.Keyring(nil, hashing.SHA256())
	require.ErrorContains(t, err, "the current hasher of the keyring is nil")
	require.Nil(t, h)
	h, err = hashing.Keyring(hashing.SHA256(), hashing.SHA256(), nil)
	require.ErrorContains(t, err, "earlier[1] of the keyring is nil")
	require.Nil(t, h)
}

// A store could not tell two peppers with the same id apart: it would take digests of one pepper
// for digests of the other.
func TestKeyringRefusesTwoPeppersWithOneID(t *testing.T) {
	a := peppered(t, "2026", make([]byte, 32))
	changed := peppered(t, "2026", append(make([]byte, 32), '\n'))
	other := peppered(t, "2025", make([]byte, 32))
	for name, hashers := range map[string][]hashing.Hasher{
		"first earlier":  {a, changed},
		"second earlier": {a, other, changed},
		"both earlier":   {other, a, changed},
		"in a nested":    {a, keyring(t, other, changed)},
		"in two nested":  {keyring(t, other, a), keyring(t, changed)},
	} {
		h, err := hashing.Keyring(hashers[0], hashers[1:]...)
		require.ErrorContains(t, err, `the scheme "hmac-sha256:2026"`, name)
		require.Nil(t, h)
	}
}

// A keyring returns the result of a Hasher that has failed, and never takes that result for a
// match.
func TestKeyringPassesOnAFailure(t *testing.T) {
	const failed = hashing.MatchOutdated + 7
	ring := keyring(t, hashing.SHA256(), failing{failed})
	d := hashing.Digest{Scheme: "x", Sum: []byte{1}}
	require.Equal(t, failed, ring.Match(d, token))
	require.Equal(t, failed, keyring(t, failing{failed}, hashing.SHA256()).Match(d, token))
}

type failing struct{ result hashing.Result }

func (f failing) Digest(string) hashing.Digest {
	return hashing.Digest{Scheme: "failing", Sum: []byte{1}}
}
func (f failing) Match(hashing.Digest, string) hashing.Result { return f.result }

func TestNothingSecretIsPrinted(t *testing.T) {
	pepper := []byte("PEPPERPEPPERPEPPER")
	h := peppered(t, "2026", pepper)
	// Afterwards the pool has a state that has hashed a token.
	require.Equal(t, hashing.Match, h.Match(h.Digest(token), token))
	ring := keyring(t, h, h)

	type options struct{ hasher hashing.Hasher } // fmt calls no methods of an unexported field
	values := []any{
		h, &h, ring, &ring, options{h}, &options{h}, options{ring}, []hashing.Hasher{h},
		map[string]options{"a": {ring}},
	}
	var out strings.Builder
	for _, v := range values {
		for _, verb := range []string{
			"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T", "%p",
		} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		text, err := json.Marshal(v)
		require.NoError(t, err)
		out.Write(text)
	}
	var failures printed
	// The text of a failed assertion follows pointers.
	assert.Equal(&failures, []hashing.Hasher{h, ring}, []hashing.Hasher{ring, h})
	require.NotEmpty(t, failures.String())
	out.WriteString(failures.String())
	for _, part := range []string{
		"PEPPER", hex.EncodeToString(pepper[:6]), strings.ToUpper(hex.EncodeToString(pepper[:6])),
		"80 69 80 80 69 82", "0x50, 0x45", token[31:40], hex.EncodeToString([]byte(token[31:40])),
	} {
		require.False(t, strings.Contains(out.String(), part))
	}
	require.Equal(t, "hashing.hmac-sha256:2026", fmt.Sprintf("%+v", h))
}

// A printed collects what failed assertions print.
type printed struct{ strings.Builder }

func (p *printed) Errorf(format string, args ...any) { fmt.Fprintf(p, format, args...) }

func TestHMACSHA256IsSafeForConcurrentUse(t *testing.T) {
	h := peppered(t, "a", make([]byte, 32))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			mine := fmt.Sprint(token, i)
			d := h.Digest(mine)
			for range 500 {
				if h.Match(d, mine) != hashing.Match || h.Match(d, token) != hashing.Mismatch {
					t.Error("a digest matched the token of another goroutine")
					return
				}
			}
		})
	}
	wg.Wait()
}
