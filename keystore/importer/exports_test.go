package importer_test

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

// exports are the files of testdata. Package hashing/sha2crypt tests that of flask-api-key.
var exports = []struct{ system, file string }{
	{"unkey", "unkey.csv"}, {"sanctum", "sanctum.csv"},
	{"drf", "drf-3.1.0.csv"}, {"drf", "drf-2.3.0.csv"},
	{"better-auth", "better-auth.jsonl"}, {"better-auth", "better-auth-plain.jsonl"},
	{"kong", "kong.yaml"}, {"aws", "aws.csv"}, {"plain", "plain.jsonl"},
}

// A secret is a token of testdata, and what a store says to the token.
type secret struct{ word, token string }

func secretsOf(t testing.TB, file string) (all []secret) {
	t.Helper()
	text, err := os.ReadFile("testdata/" + strings.TrimSuffix(file, filepath.Ext(file)) + ".tokens")
	require.NoError(t, err)
	for line := range strings.Lines(string(text)) {
		word, token, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		require.True(t, ok)
		all = append(all, secret{word, token})
	}
	return all
}

func word(err error) string {
	if err == nil {
		return "admitted"
	}
	return keystore.Reason(err)
}

// After the import of each export, each token gets the answer that its row says. No wrong token and
// no stored digest is admitted, and no problem of a row has a token or a digest.
func TestExports(t *testing.T) {
	table := "| export | rows | imported | refused rows | tokens |\n|---|---|---|---|---|\n"
	for _, e := range exports {
		text, err := os.ReadFile("testdata/" + e.file)
		require.NoError(t, err)
		s := openFor(t, e.system)
		dry, _ := load(t, s, e.system, string(text), &keystore.ImportOptions{DryRun: true})
		result, problems := load(t, s, e.system, string(text), nil)
		require.Equal(t, dry, result, e.file)
		tokens := secretsOf(t, e.file)
		words := make(map[string]int)
		for _, token := range tokens {
			_, err := s.Verify(t.Context(), token.token)
			require.Equal(t, token.word, word(err), "%s: %.6s…", e.file, token.token)
			words[token.word]++
			for _, bad := range []string{token.token + "0", token.token[:len(token.token)-1],
				strings.ToUpper(token.token)} {
				_, err := s.Verify(t.Context(), bad)
				require.ErrorIs(t, err, keystore.ErrDenied)
				require.Contains(t, []string{"unknown", "malformed"}, keystore.Reason(err))
			}
		}
		isToken := func(text string) bool {
			return slices.ContainsFunc(tokens, func(s secret) bool { return s.token == text })
		}
		for _, stored := range strings.FieldsFunc(string(text), func(c rune) bool {
			return strings.ContainsRune(" \n,\"':{}", c)
		}) {
			if !isToken(stored) {
				_, err := s.Verify(t.Context(), stored)
				require.ErrorIs(t, err, keystore.ErrDenied, "what stands in the export admits nobody")
			}
			for _, p := range problems {
				if len(stored) >= 18 && (isToken(stored) || strings.ContainsAny(stored, "=$-_")) {
					require.NotContains(t, p.Error(), stored)
				}
			}
		}
		again, _ := load(t, s, e.system, string(text), nil)
		require.Equal(t, 0, again.Imported)
		require.Equal(t, result.Imported, again.Unchanged)
		table += fmt.Sprintf("| %s | %d | %d | %s | %s |\n", e.file, result.Rows, result.Imported,
			counted(result.Problems), counted(words))
	}
	readme, err := os.ReadFile("testdata/README.md")
	require.NoError(t, err)
	require.Contains(t, string(readme), table, "the table of the README should be:\n%s", table)
}

func counted(words map[string]int) string {
	var parts []string
	for _, word := range slices.Sorted(maps.Keys(words)) {
		parts = append(parts, fmt.Sprintf("%d %s", words[word], word))
	}
	if len(parts) == 0 {
		return "–"
	}
	return strings.Join(parts, ", ")
}

// The properties of a key come from the columns of the export.
func TestProperties(t *testing.T) {
	find := func(system, file, name string) *keystore.Key {
		text, err := os.ReadFile("testdata/" + file)
		require.NoError(t, err)
		s := openFor(t, system)
		load(t, s, system, string(text), nil)
		for k, err := range s.List(t.Context(), keystore.Query{}) {
			require.NoError(t, err)
			if k.Name == name {
				return k
			}
		}
		t.Fatal("no key", name)
		return nil
	}
	k := find("unkey", "unkey.csv", "billing")
	require.Equal(t, "id_17", k.Owner)
	require.Equal(t, "blue", k.Metadata()["team"])
	require.Equal(t, "3", k.Metadata()["tier"])
	require.EqualValues(t, int64(1700000000001), k.CreatedAt.UnixMilli())
	require.EqualValues(t, 1764500000000/60000, k.LastUsedAt.Unix()/60)

	k = find("sanctum", "sanctum.csv", "partner")
	require.Equal(t, `App\Models\User:1068`, k.Owner)
	require.Equal(t, []string{"orders:read", "orders:write"}, k.Scopes())
	require.Equal(t, 2125, k.ExpiresAt.Year())
	require.Equal(t, "68", k.Metadata()["imported_id"])

	k = find("better-auth", "better-auth.jsonl", "ci")
	require.Equal(t, []string{"files:read", "files:write", "users:read"}, k.Scopes())
	require.Equal(t, "blue", k.Metadata()["team"])
	require.False(t, k.LastUsedAt.IsZero())
	k = find("better-auth", "better-auth.jsonl", "limited")
	require.Equal(t, keystore.RateLimit{PerSecond: 100. / 60, Burst: 100}, k.RateLimit)

	k = find("drf", "drf-3.1.0.csv", `partner, "quoted"`)
	require.Empty(t, k.Metadata(), "the column id has a digest")

	k = find("kong", "kong.yaml", "acme")
	require.Equal(t, "17", k.Owner)
	k = find("aws", "aws.csv", "partner")
	require.Equal(t, map[string]string{"description": "For the, partner",
		"usageplanids": "abc123,def456"}, k.Metadata())
	k = find("plain", "plain.jsonl", "ci")
	require.Equal(t, []string{"orders:read", "orders:write"}, k.Scopes())
	require.Equal(t, map[string]string{"a": "b"}, k.Metadata())
}

// A token of Sanctum works with and without its number, before and after the digest was replaced.
func TestSanctumWithoutNumber(t *testing.T) {
	s := openFor(t, "sanctum")
	load(t, s, "sanctum", vectors[4].export, nil)
	for _, token := range []string{sanctumToken, sanctumToken[3:], sanctumToken} {
		_, err := s.Verify(t.Context(), token)
		require.NoError(t, err)
	}
}

// A row that cannot be understood is refused with its line, and the others are imported.
func TestUnreadableRows(t *testing.T) {
	for _, tt := range []struct {
		system, export string
		imported       int
		problems       []string
	}{
		{"plain", "token,name\n\"" + commonToken + "\",n\nx,y,z\n\"a\"b,c\n" + commonToken + "2,n\n", 2,
			[]string{"line 3: ", "line 4: "}},
		{"plain", "\xef\xbb\xbf\nToken , NAME\n" + commonToken + ",n\n", 1, nil},
		{"plain", "{\"token\":\"" + commonToken + "\"}\n\n[1]\n{\"token\":7}\n{\"token\":null}\n", 1,
			[]string{"line 3: ", "line 4: ", "line 5: "}},
		{"plain", "", 0, nil},
		{"plain", "token,created_at\n" + commonToken + ",yesterday\n", 0, []string{"line 2: "}},
		{"plain", "digest,token\n" + commonHex + "," + commonToken + "\n", 0, []string{"line 2: "}},
		{"unkey", "hash,enabled\n" + commonBase64 + ",perhaps\n", 0, []string{"line 2: "}},
		{"unkey", "hash,meta\n" + commonBase64 + ",{\n", 0, []string{"line 2: "}},
		{"unkey", "hash,enabled\n" + commonToken + ",1\n", 0, []string{"line 2: "}},
		{"sanctum", "token,abilities\n" + sanctumSum + ",\"[1]\"\n", 0, []string{"line 2: "}},
		{"better-auth", "key,remaining\n" + commonURL + ",few\n", 0, []string{"line 2: "}},
		{"better-auth", "key,remaining\n" + commonURL + ",-1\n", 0, []string{"line 2: "}},
		{"better-auth", "key,remaining,refillAmount,refillInterval\n" + commonURL + ",1,5,999\n", 0,
			[]string{"line 2: "}},
		{"better-auth", "key,remaining,refillAmount,refillInterval\n" + commonURL +
			",1,5,9223372036854775807\n", 0, []string{"line 2: "}},
		{"unkey", "hash,remaining_requests,refill_amount,refill_day\n" + commonBase64 + ",1,5,0\n", 0,
			[]string{"line 2: "}},
		{"unkey", "hash,remaining_requests,refill_amount,refill_day\n" + commonBase64 + ",1,5,32\n", 0,
			[]string{"line 2: "}},
		{"unkey", "hash,remaining_requests,refill_amount\n" + commonBase64 + ",1,0\n", 0,
			[]string{"line 2: "}},
		{"better-auth", "key\n" + commonHex + "\n", 1, nil},
		{"drf", "prefix,hashed_key\nabcdefgh,sha512$$" + commonHex + "\n", 0, []string{"line 2: "}},
		{"drf", "prefix,hashed_key\nabcdefgh," + commonToken + "\n", 0, []string{"line 2: "}},
		{"kong", "key,ttl\n" + commonToken + ",60\n", 0, []string{"line 2: "}},
		{"kong", "{\"key\":\"" + commonToken + "\"}\n", 1, nil},
		{"kong", "consumers:\n- keyauth_credentials:\n  - key: [a]\n  - key: " + commonToken + "\n", 1,
			[]string{"line 3: "}},
	} {
		s := openFor(t, tt.system)
		result, problems := load(t, s, tt.system, tt.export, nil)
		require.Equal(t, tt.imported, result.Imported, "%q", tt.export)
		require.Len(t, problems, len(tt.problems), "%q", tt.export)
		for i, p := range problems {
			require.True(t, strings.HasPrefix(p.Error(), tt.problems[i]), p.Error())
			require.NotContains(t, p.Error(), commonToken)
			require.NotContains(t, p.Error(), commonHex)
		}
	}
	s := openFor(t, "kong")
	from, _ := importer.Named("kong")
	_, err := s.Import(t.Context(), from.Read(strings.NewReader("a: [b: "+commonToken+"\n"), nil), nil)
	require.Error(t, err)
	require.NotContains(t, err.Error(), commonToken)
}

// A file of another system is one mistake, and not a problem of each row.
func TestFileOfAnotherSystem(t *testing.T) {
	for system, export := range map[string]string{
		"sanctum": "prefix,hashed_key\nabcdefgh," + commonHex + "\nabcdefgi," + commonHex + "\n",
		"drf":     "id,token\n1," + sanctumSum + "\n2," + sanctumSum + "\n",
		"unkey":   "id;hash\n1;" + commonHex + "\n",
		"plain":   commonToken + "\n" + commonToken + "2\n",
	} {
		s := openFor(t, system)
		from, _ := importer.Named(system)
		result, err := s.Import(t.Context(), from.Read(strings.NewReader(export), nil), nil)
		require.ErrorContains(t, err, "the first line names no column", system)
		require.Zero(t, result.Rows)
		for _, secret := range []string{commonToken, commonHex, sanctumSum} {
			require.NotContains(t, err.Error(), secret)
		}
	}
}

// An endless is a reader without an end. It counts what was read.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'a'
	}
	e.read += len(p)
	return len(p), nil
}

// A quote without an end does not take the export into memory.
func TestQuoteWithoutAnEnd(t *testing.T) {
	s := openFor(t, "plain")
	from, _ := importer.Named("plain")
	tail := new(endless)
	export := io.MultiReader(strings.NewReader("token\n"+commonToken+"\n\""), tail)
	_, err := s.Import(t.Context(), from.Read(export, nil), nil)
	require.ErrorContains(t, err, "after line 2")
	require.NotContains(t, err.Error(), "aaa")
	require.Less(t, tail.read, 2<<20)
}

// The remaining uses and the refill of a row become credits. A row without remaining uses has none,
// whatever its refill.
func TestCredits(t *testing.T) {
	const unkey, betterAuth = "hash,remaining_requests,refill_amount,refill_day\n" + commonBase64,
		"key,remaining,refillAmount,refillInterval,lastRefillAt,createdAt\n" + commonURL
	past := time.Now().Add(-time.Hour).Format(time.RFC3339)
	for _, tt := range []struct {
		system, export string
		want           *keystore.Credits
	}{
		{"unkey", unkey + ",NULL,100,NULL\n", nil},
		{"unkey", unkey + ",0,NULL,NULL\n", &keystore.Credits{}},
		{"unkey", unkey + ",7,NULL,3\n", &keystore.Credits{Remaining: 7}},
		{"unkey", unkey + ",7,100,NULL\n", &keystore.Credits{Remaining: 7,
			Refill: keystore.Refill{Amount: 100, Daily: true}}},
		{"unkey", unkey + ",0,100,31\n", &keystore.Credits{
			Refill: keystore.Refill{Amount: 100, MonthDay: 31}}},
		{"better-auth", betterAuth + ",,100,60000,,\n", nil},
		{"better-auth", betterAuth + ",0,,,,\n", &keystore.Credits{}},
		{"better-auth", betterAuth + ",5,,60000,,\n", &keystore.Credits{Remaining: 5}},
		{"better-auth", betterAuth + ",5,100,,,\n", &keystore.Credits{Remaining: 5}},
		{"better-auth", betterAuth + ",5,100,86400000,," + past + "\n", &keystore.Credits{
			Remaining: 5, Refill: keystore.Refill{Amount: 100, Every: 24 * time.Hour}}},
		{"better-auth", betterAuth + ",0,100,60000,," + past + "\n", &keystore.Credits{ // is due
			Remaining: 100, Refill: keystore.Refill{Amount: 100, Every: time.Minute}}},
		{"better-auth", betterAuth + ",5,100,60000," + time.Now().Format(time.RFC3339) + "," + past +
			"\n", &keystore.Credits{Remaining: 5,
			Refill: keystore.Refill{Amount: 100, Every: time.Minute}}},
	} {
		s := openFor(t, tt.system)
		result, _ := load(t, s, tt.system, tt.export, nil)
		require.Equal(t, 1, result.Imported, "%q", tt.export)
		require.Equal(t, tt.want != nil, result.Metered == 1)
		for k, err := range s.List(t.Context(), keystore.Query{}) {
			require.NoError(t, err)
			credits, err := s.Credits(t.Context(), k.ID)
			require.NoError(t, err)
			require.Equal(t, tt.want, credits, "%q", tt.export)
		}
	}
	for file, want := range map[string]*keystore.Credits{ // the rows with the name metered
		"unkey.csv":         {Remaining: 100, Refill: keystore.Refill{Amount: 100, Daily: true}},
		"better-auth.jsonl": {Remaining: 5},
	} {
		system, _, _ := strings.Cut(file, ".")
		text, err := os.ReadFile("testdata/" + file)
		require.NoError(t, err)
		s := openFor(t, system)
		result, _ := load(t, s, system, string(text), nil)
		require.Equal(t, 1, result.Metered)
		for k, err := range s.List(t.Context(), keystore.Query{Text: "metered"}) {
			require.NoError(t, err)
			credits, err := s.Credits(t.Context(), k.ID)
			require.NoError(t, err)
			require.Equal(t, want, credits)
		}
	}
}

// With IgnoreCredits, a key with a limited number of uses loses the limit.
func TestIgnoreCredits(t *testing.T) {
	from := importer.BetterAuth()
	s := openFor(t, "better-auth")
	export := "key,remaining\n" + commonURL + ",5\n"
	result, err := s.Import(t.Context(),
		from.Read(strings.NewReader(export), &importer.Options{IgnoreCredits: true}), nil)
	require.NoError(t, err)
	require.Equal(t, 1, result.Imported)
	require.Zero(t, result.Metered)
	_, ok := importer.Named("nobody")
	require.False(t, ok)
}

// A store that holds keys of all systems admits the tokens of all.
func TestAllSystemsInOneStore(t *testing.T) {
	var names []string
	for _, s := range importer.Systems() {
		names = append(names, s.Name())
	}
	require.True(t, slices.IsSorted(names))
	s := openFor(t, names...)
	for _, e := range exports {
		if e.file == "drf-2.3.0.csv" {
			continue // slow
		}
		text, err := os.ReadFile("testdata/" + e.file)
		require.NoError(t, err)
		load(t, s, e.system, string(text), nil)
	}
	for _, e := range exports {
		for _, token := range secretsOf(t, e.file) {
			if e.file != "drf-2.3.0.csv" {
				_, err := s.Verify(t.Context(), token.token)
				require.Equal(t, token.word, word(err), "%s: %.6s…", e.file, token.token)
			}
		}
	}
	require.NoError(t, s.CheckIntegrity(t.Context()))
}
