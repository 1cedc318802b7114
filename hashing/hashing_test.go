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

const token = "oil_01k2rx7y72f969t3gz58xmrqbe_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ010xsMAL"

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

// NIST's examples for FIPS 180, and one of Python's hashlib, of 128 bytes; the last two just fill the buffer on the
// stack, and overflow it.
func TestSHA256Vectors(t *testing.T) {
	for message, sum := range map[string]string{
		"":    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
		"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
		"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
		strings.Repeat("a", 128):                                   "6836cf13bac400e9105071cd6af47084dfacad4e5e302c94bfed24e013afb73e",
		strings.Repeat("a", 1_000_000):                             "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
	} {
		d := hashing.SHA256().Digest(message)
		require.Equal(t, "sha256", d.Scheme)
		require.Equal(t, sum, hex.EncodeToString(d.Sum))
		require.Equal(t, hashing.Match, hashing.SHA256().Match(d, message))
	}
}

// RFC 4231, test cases 1, 3, 4, 6 and 7; the key of 2 is too short for a pepper, and the sum of 5 is cut.
func TestHMACSHA256Vectors(t *testing.T) {
	counting := make([]byte, 25)
	for i := range counting {
		counting[i] = byte(i + 1)
	}
	for _, v := range []struct {
		key       []byte
		data, sum string
	}{
		{bytes.Repeat([]byte{0x0b}, 20), "Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
		{bytes.Repeat([]byte{0xaa}, 20), strings.Repeat("\xdd", 50), "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"},
		{counting, strings.Repeat("\xcd", 50), "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"},
		{bytes.Repeat([]byte{0xaa}, 131), "Test Using Larger Than Block-Size Key - Hash Key First", "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
		{bytes.Repeat([]byte{0xaa}, 131), "This is a test using a larger than block-size key and a larger than block-size data. " +
			"The key needs to be hashed before being used by the HMAC algorithm.", "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"},
	} {
		h := peppered(t, "rfc4231", v.key)
		for range 2 { // with a new state, and with a used one
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

			for _, other := range []string{"", token + "x", token[1:], strings.ToUpper(token), strings.Repeat("x", 1000)} {
				require.Equal(t, hashing.Mismatch, h.Match(d, other))
				require.Equal(t, hashing.Match, h.Match(h.Digest(other), other))
			}
			for name, other := range all {
				if name != scheme {
					require.Equal(t, hashing.Mismatch, other.Match(d, token), "another scheme")
					require.Equal(t, hashing.Mismatch, other.Match(hashing.Digest{Scheme: name, Sum: d.Sum}, token),
						"the scheme of another, claimed")
				}
			}
			for _, damaged := range [][]byte{nil, {}, d.Sum[:31], append(bytes.Clone(d.Sum), 0), make([]byte, 32)} {
				require.Equal(t, hashing.Mismatch, h.Match(hashing.Digest{Scheme: scheme, Sum: damaged}, token))
			}
			for i := range d.Sum {
				d.Sum[i] ^= 1
				require.Equal(t, hashing.Mismatch, h.Match(d, token))
				d.Sum[i] ^= 1
			}
			require.Equal(t, hashing.Match, h.Match(d, token), "digests are not shared between calls")
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
	require.Equal(t, hashing.Match, h.Match(peppered(t, "a", []byte("0123456789abcdef")).Digest(token), token))
}

func TestHMACSHA256Refuses(t *testing.T) {
	pepper := []byte("the pepper, of more than 16 bytes")
	for _, id := range []string{"", "a b", "a:b", "a/b", "ä", "a\x00", strings.Repeat("a", 65)} {
		h, err := hashing.HMACSHA256(id, pepper)
		require.ErrorContains(t, err, "the id of a pepper must have")
		require.Nil(t, h)
	}
	for _, id := range []string{"a", "2026-11", "A.b_c-9", strings.Repeat("a", 64)} {
		require.Equal(t, "hmac-sha256:"+id, peppered(t, id, pepper[:16]).Digest(token).Scheme)
	}
	h, err := hashing.HMACSHA256("a", pepper[:15])
	require.ErrorContains(t, err, "a pepper of 15 bytes is too short: use 16 or more")
	require.NotContains(t, err.Error(), "the pepper")
	require.Nil(t, h)
}

func TestKeyring(t *testing.T) {
	older, old, current := hashing.SHA256(), peppered(t, "1", make([]byte, 16)), peppered(t, "2", make([]byte, 32))
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
	require.Equal(t, hashing.MatchOutdated, nested.Match(old.Digest(token), token), "outdated for the inner one")
	require.Equal(t, hashing.MatchOutdated, nested.Match(unknown.Digest(token), token))
	require.Equal(t, hashing.MatchOutdated, keyring(t, unknown, ring).Match(current.Digest(token), token))

	same := keyring(t, current, old, peppered(t, "2", make([]byte, 32)))
	require.Equal(t, hashing.Match, same.Match(current.Digest(token), token), "one pepper twice")

	earlier := []hashing.Hasher{old}
	ring = keyring(t, current, earlier...)
	earlier[0] = nil
	require.Equal(t, hashing.MatchOutdated, ring.Match(old.Digest(token), token), "the list was copied")
}

func TestKeyringRefusesNil(t *testing.T) {
	h, err := hashing.Keyring(nil, hashing.SHA256())
	require.ErrorContains(t, err, "the current hasher of a keyring is nil")
	require.Nil(t, h)
	h, err = hashing.Keyring(hashing.SHA256(), hashing.SHA256(), nil)
	require.ErrorContains(t, err, "earlier hasher 1 of a keyring")
	require.Nil(t, h)
}

// Two peppers with one id could not be told apart: digests of the one would be taken for those of
// the other.
func TestKeyringRefusesTwoPeppersWithOneID(t *testing.T) {
	a, changed := peppered(t, "2026", make([]byte, 32)), peppered(t, "2026", append(make([]byte, 32), '\n'))
	other := peppered(t, "2025", make([]byte, 32))
	for name, hashers := range map[string][]hashing.Hasher{
		"at once":         {a, changed},
		"further back":    {a, other, changed},
		"both earlier":    {other, a, changed},
		"in a nested one": {a, keyring(t, other, changed)},
		"in two nested":   {keyring(t, other, a), keyring(t, changed)},
	} {
		h, err := hashing.Keyring(hashers[0], hashers[1:]...)
		require.ErrorContains(t, err, `the scheme "hmac-sha256:2026"`, name)
		require.Nil(t, h)
	}
}

// A Hasher that has failed is not taken for one that matches.
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
	require.Equal(t, hashing.Match, h.Match(h.Digest(token), token)) // there is a keyed state that has seen a token
	ring := keyring(t, h, h)

	type options struct{ hasher hashing.Hasher } // unexported: fmt calls no methods of what is in it
	values := []any{h, &h, ring, &ring, options{h}, &options{h}, options{ring}, []hashing.Hasher{h}, map[string]options{"a": {ring}}}
	var out strings.Builder
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%T", "%p"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		text, err := json.Marshal(v)
		require.NoError(t, err)
		out.Write(text)
	}
	var failures printed
	assert.Equal(&failures, []hashing.Hasher{h, ring}, []hashing.Hasher{ring, h}) // a failed assertion follows pointers
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

// A printed is a test that remembers what its assertions print.
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
					t.Error("another goroutine's token got in")
					return
				}
			}
		})
	}
	wg.Wait()
}
