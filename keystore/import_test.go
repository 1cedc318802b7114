package keystore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// The formats of the tests. The public part of a pub token is between two dots, and the token is
// hashed as a whole. A sum token has no public part.
var (
	pubFormat = LegacyFormat{Name: "pub",
		Parse: func(text string) (lookup, secret string, ok bool) {
			parts := strings.Split(text, ".")
			if len(parts) != 3 || parts[0] != "pub" {
				return "", "", false
			}
			return parts[1], text, true
		}}
	sumFormat = LegacyFormat{Name: "sum",
		Parse: func(text string) (lookup, secret string, ok bool) {
			text, ok = strings.CutPrefix(text, "sum.")
			return hexSum(text), text, ok
		}}
)

func hexSum(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}

func pubToken(n int) string { return fmt.Sprintf("pub.%d.%064d", n, n) }

// pubRow returns the row of pubToken, with a digest of SHA-512.
func pubRow(n int) Imported {
	return Imported{
		Row: fmt.Sprint("line ", n), Format: "pub", Lookup: fmt.Sprint(n),
		Digest: hashing.SHA512().Digest(pubToken(n)), Spec: Spec{Name: "n", Owner: "acme"},
	}
}

func rowsOf(rows ...Imported) iter.Seq2[Imported, error] {
	return func(yield func(Imported, error) bool) {
		for _, r := range rows {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func pubRows(n int) (rows []Imported) {
	for i := range n {
		rows = append(rows, pubRow(i))
	}
	return rows
}

func legacyOptions(t testing.TB) *Options {
	t.Helper()
	h, err := hashing.Keyring(hashing.SHA256(), hashing.SHA512(), hashing.PBKDF2SHA256())
	require.NoError(t, err)
	return &Options{Hasher: h, Legacy: []LegacyFormat{pubFormat, sumFormat}}
}

func newLegacyStore(t testing.TB, b backend.Backend) *Store {
	t.Helper()
	opts := legacyOptions(t)
	if _, ok := b.(backend.Feeder); ok {
		opts.Freshness, opts.Timeout = realTime().Freshness, realTime().Timeout
	}
	s, err := New(b, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// importAll imports rows, and requires that all of them are new keys.
func importAll(t testing.TB, s *Store, rows ...Imported) {
	t.Helper()
	result, err := s.Import(t.Context(), rowsOf(rows...), &ImportOptions{
		Problem: func(p *ImportProblem) { t.Log(p) }})
	require.NoError(t, err)
	require.Equal(t, len(rows), result.Imported)
}

// The IDs are a part of the format of a store. They were computed with Python's hashlib.
func TestLegacyIDs(t *testing.T) {
	for _, tt := range []struct{ format, lookup, id string }{
		{"unkey", "a502cd8fe51bf47138a6a8ca2828f7e10f6e1c46e44e298ae19ea9dd2aaf8fdc",
			"0000000000gqkvec8z6mg8x71w"},
		{"drf", "abcdefgh", "0000000000gwgs8apqbk1pyyxa"},
	} {
		id := legacyID(tt.format, tt.lookup)
		require.Equal(t, tt.id, id.String())
		require.True(t, isImported(id))
		require.EqualValues(t, 8, id[6]>>4, "the version of a UUID")
		require.EqualValues(t, 2, id[8]>>6, "the variant of a UUID")
	}
	require.NotEqual(t, legacyID("a", "bc"), legacyID("ab", "c"))
	require.False(t, isImported(token.First(time.UnixMilli(1))))
}

// An imported key is a key as any other key: its digest is replaced, and it can be rotated,
// disabled and revoked.
func TestLifeOfAnImportedKey(t *testing.T) {
	for _, open := range map[string]func() backend.Backend{
		"one process":       func() backend.Backend { return backendtest.NewMemory() },
		"several processes": func() backend.Backend { return backendtest.NewShared().Open() },
	} {
		s := newLegacyStore(t, open())
		ctx := t.Context()
		row := pubRow(1)
		row.CreatedAt = time.Date(2020, 1, 2, 3, 4, 5, 6, time.UTC)
		row.LastUsedAt = time.Date(2021, 1, 2, 3, 4, 0, 0, time.UTC)
		importAll(t, s, row)
		id := legacyID("pub", "1").String()
		key, err := s.Get(ctx, id)
		require.NoError(t, err)
		require.Equal(t, row.CreatedAt, key.CreatedAt)
		require.Equal(t, row.LastUsedAt, key.LastUsedAt)
		require.Equal(t, "pub_"+id+"_…", key.Hint)
		require.EqualValues(t, 1, key.Revision)

		session, err := s.Bind(ctx, pubToken(1))
		require.NoError(t, err)
		for { // until the background has replaced the digest
			key, err = s.Verify(ctx, pubToken(1))
			require.NoError(t, err)
			if key.Revision == 2 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		issued, err := s.Rotate(ctx, id, time.Hour)
		require.NoError(t, err)
		for _, text := range []string{pubToken(1), issued.Secret.Reveal()} {
			key, err = s.Verify(ctx, text)
			require.NoError(t, err)
			require.Equal(t, id, key.ID)
			i, err := s.Inspect(ctx, text)
			require.NoError(t, err)
			require.NotNil(t, i.Key)
			require.Equal(t, id, i.KeyID)
		}
		require.True(t, strings.HasPrefix(issued.Key.Hint, "oil_"))
		require.NoError(t, session.Cause())
		require.NoError(t, s.Disable(ctx, id, ""))
		require.ErrorIs(t, session.Cause(), ErrDisabled)
		_, err = s.Verify(ctx, pubToken(1))
		require.ErrorIs(t, err, ErrDisabled)
		require.NoError(t, s.Enable(ctx, id))
		require.NoError(t, s.Revoke(ctx, id, ""))
		_, err = s.Verify(ctx, pubToken(1))
		require.ErrorIs(t, err, ErrRevoked)

		var actions []Action
		for e, err := range s.Events(ctx, EventQuery{KeyID: id}) {
			require.NoError(t, err)
			actions = append(actions, e.Action)
		}
		require.Equal(t, []Action{ActionImport, ActionRehash, ActionRotate, ActionDisable,
			ActionEnable, ActionRevoke}, actions)
		require.NoError(t, s.CheckIntegrity(ctx))
	}
}

// An import is repeated: nothing changes, whatever has become of the keys since.
func TestImportTwice(t *testing.T) {
	b := backendtest.NewMemory()
	s := newLegacyStore(t, b)
	ctx := t.Context()
	rows := append(pubRows(100), pubRow(7), Imported{
		Format: "sum", Token: NewSecret("sum.0123456789abcdefghij"), Spec: Spec{Name: "n"}})
	dry, err := s.Import(ctx, rowsOf(rows...), &ImportOptions{DryRun: true})
	require.NoError(t, err)
	require.Empty(t, read(t, b, keySpace, eventSpace))
	first, err := s.Import(ctx, rowsOf(rows...), nil)
	require.NoError(t, err)
	require.Equal(t, ImportResult{Rows: 102, Imported: 101, Unchanged: 1,
		Problems: map[string]int{}}, first)
	require.Equal(t, first, dry)
	requireIndexed(t, b)

	_, err = s.Rotate(ctx, legacyID("pub", "1").String(), 0)
	require.NoError(t, err)
	require.NoError(t, s.Revoke(ctx, legacyID("pub", "2").String(), ""))
	require.NoError(t, s.Revoke(ctx, legacyID("pub", "3").String(), ""))
	_, err = s.Purge(ctx, time.Now())
	require.NoError(t, err)
	require.NoError(t, s.Revoke(ctx, legacyID("pub", "4").String(), ""))
	other := pubRow(5)
	other.Digest = hashing.SHA512().Digest("another secret")
	before := read(t, b)
	for _, dry := range []bool{false, true} {
		again, err := s.Import(ctx, rowsOf(append(rows, other)...), &ImportOptions{DryRun: dry})
		require.NoError(t, err)
		require.Equal(t, ImportResult{Rows: 103, Unchanged: 100, Refused: 3,
			Problems: map[string]int{ImportPurged: 2, ImportDuplicate: 1}}, again)
	}
	require.Equal(t, before, read(t, b))
	_, err = s.Verify(ctx, pubToken(4))
	require.ErrorIs(t, err, ErrRevoked)
	_, err = s.Verify(ctx, pubToken(3))
	require.ErrorIs(t, err, ErrUnknown)
	_, err = s.Verify(ctx, "sum.0123456789abcdefghij")
	require.NoError(t, err)
	require.NoError(t, s.CheckIntegrity(ctx))
}

// The keys survive a rebuild of the indexes, a backup and a restore.
func TestImportedKeysSurvive(t *testing.T) {
	b := backendtest.NewMemory()
	s, err := New(open{b}, legacyOptions(t))
	require.NoError(t, err)
	importAll(t, s, pubRows(50)...)
	require.NoError(t, s.Revoke(t.Context(), legacyID("pub", "2").String(), ""))
	_, err = s.Purge(t.Context(), time.Now())
	require.NoError(t, err)
	var saved strings.Builder
	require.NoError(t, s.Backup(t.Context(), &saved))
	require.NoError(t, s.Close())
	opts := legacyOptions(t)
	opts.RebuildIndexes = true
	s, err = New(open{b}, opts)
	require.NoError(t, err)
	require.NoError(t, s.CheckIntegrity(t.Context()))
	requireIndexed(t, b)
	require.NoError(t, s.Close())

	other := newLegacyStore(t, backendtest.NewMemory())
	require.NoError(t, other.Restore(t.Context(), strings.NewReader(saved.String())))
	_, err = other.Verify(t.Context(), pubToken(1))
	require.NoError(t, err)
	result, err := other.Import(t.Context(), rowsOf(pubRows(50)...), nil)
	require.NoError(t, err)
	require.Equal(t, ImportResult{Rows: 50, Unchanged: 49, Refused: 1,
		Problems: map[string]int{ImportPurged: 1}}, result)
}

// Keys that the other system does not admit are imported, and refused with the reason.
func TestImportOfDeadKeys(t *testing.T) {
	b := backendtest.NewMemory()
	opts := legacyOptions(t)
	opts.MaxLifetime = time.Hour
	s, err := New(b, opts)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	rows := pubRows(4)
	past := time.Now().Add(-time.Hour)
	rows[0].RevokedAt = past
	rows[1].DisabledAt, rows[1].Spec.ExpiresAt = past, time.Now().Add(time.Minute)
	rows[2].Spec.ExpiresAt = past
	result, err := s.Import(t.Context(), rowsOf(rows...), nil)
	require.NoError(t, err)
	require.Equal(t, ImportResult{Rows: 4, Imported: 3, Refused: 1,
		Problems: map[string]int{ImportLifetime: 1}}, result)
	for i, want := range []error{ErrRevoked, ErrDisabled, ErrExpired, ErrUnknown} {
		_, err := s.Verify(t.Context(), pubToken(i))
		require.ErrorIs(t, err, want)
	}
}

// Each row that cannot be imported has a reason, and no text of a problem has a secret.
func TestImportRefuses(t *testing.T) {
	s := newLegacyStore(t, backendtest.NewMemory())
	const secret = "0123456789secret0123456789"
	_, native := s.format.New()
	edit := func(f func(*Imported)) Imported {
		row := pubRow(1)
		row.Lookup = secret
		row.Digest.Sum = []byte(secret)
		row.Digest.Sum = append(row.Digest.Sum, make([]byte, 64-len(secret))...)
		f(&row)
		return row
	}
	plain := func(text string) func(*Imported) {
		return func(r *Imported) { r.Token, r.Lookup, r.Digest = NewSecret(text), "", hashing.Digest{} }
	}
	for _, tt := range []struct {
		reason string
		edit   func(*Imported)
	}{
		{ImportUnreadable, func(r *Imported) { r.Digest = hashing.Digest{} }},
		{ImportUnreadable, func(r *Imported) { r.Lookup = "" }},
		{ImportUnreadable, func(r *Imported) { r.Token = NewSecret(secret) }},
		{ImportFormat, func(r *Imported) { r.Format = "other" }},
		{ImportFormat, plain(secret)},
		{ImportFormat, plain("pub.1." + secret + " x")},
		{ImportFormat, plain("pub.1." + strings.Repeat(secret, 20))},
		{ImportFormat, plain("pub.1." + secret + "é")},
		{ImportWeak, plain("pub.1.0123456789")},
		{ImportNative, plain(native)},
		{ImportDigest, func(r *Imported) { r.Digest.Scheme = "sha2-crypt" }},
		{ImportDigest, func(r *Imported) { r.Digest.Sum = r.Digest.Sum[:63] }},
		{ImportDigest, func(r *Imported) {
			r.Digest = hashing.Digest{Scheme: "pbkdf2-sha256", Sum: []byte("pbkdf2_sha256$1$" + secret)}
		}},
		{ImportSpec, func(r *Imported) { r.Spec.Name = "" }},
		{ImportSpec, func(r *Imported) { r.Spec.Scopes = []string{secret + " with space"} }},
		{ImportSpec, func(r *Imported) { r.Spec.Metadata = map[string]string{"a": secret + "\x00"} }},
		{ImportSpec, func(r *Imported) {
			r.Spec.Metadata = map[string]string{"a": strings.Repeat(secret, 1000)}
		}},
		{ImportSpec, func(r *Imported) { r.CreatedAt = time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC) }},
		{ImportSpec, func(r *Imported) {
			r.Spec.AllowedNetworks = []netip.Prefix{netip.MustParsePrefix("10.1.2.3/8")}
		}},
	} {
		var problems []*ImportProblem
		result, err := s.Import(t.Context(), rowsOf(edit(tt.edit)), &ImportOptions{
			Problem: func(p *ImportProblem) { problems = append(problems, p) }})
		require.NoError(t, err)
		require.Equal(t, ImportResult{Rows: 1, Refused: 1,
			Problems: map[string]int{tt.reason: 1}}, result)
		require.Len(t, problems, 1)
		require.Equal(t, tt.reason, problems[0].Reason)
		require.True(t, strings.HasPrefix(problems[0].Error(), "line 1: "), problems[0].Error())
		require.NotContains(t, problems[0].Error(), "secret")
	}
	weak := edit(plain("pub.1.0123456789"))
	_, err := s.Import(t.Context(), rowsOf(weak), &ImportOptions{AllowWeak: true})
	require.NoError(t, err)
	_, err = s.Verify(t.Context(), "pub.1.0123456789")
	require.NoError(t, err)
}

// An error of the rows ends the import, after the rows before the error. A problem does not.
func TestImportErrors(t *testing.T) {
	s := newLegacyStore(t, backendtest.NewMemory())
	broken := errors.New("the reader is broken")
	result, err := s.Import(t.Context(), func(yield func(Imported, error) bool) {
		for _, step := range []struct {
			row Imported
			err error
		}{{pubRow(1), nil}, {Imported{}, &ImportProblem{Reason: ImportUnreadable}},
			{pubRow(2), nil}, {Imported{}, broken}} {
			if !yield(step.row, step.err) {
				return
			}
		}
	}, nil)
	require.ErrorIs(t, err, broken)
	require.Equal(t, 3, result.Rows)
	require.Equal(t, 1, result.Problems[ImportUnreadable])

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = s.Import(ctx, rowsOf(pubRows(100)...), nil)
	require.ErrorIs(t, err, context.Canceled)
	_, err = s.Import(t.Context(), nil, nil)
	require.ErrorIs(t, err, ErrInvalid)
	_, err = s.Import(IfRevision(t.Context(), 1), rowsOf(), nil)
	require.ErrorIs(t, err, ErrInvalid)
	plain, err := New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	_, err = plain.Import(t.Context(), rowsOf(pubRow(1)), nil)
	require.ErrorIs(t, err, ErrInvalid)
	require.NoError(t, plain.Close())
	_, err = plain.Import(t.Context(), rowsOf(pubRow(1)), nil)
	require.Error(t, err)
	for _, formats := range [][]LegacyFormat{
		{{Name: "", Parse: pubFormat.Parse}}, {{Name: "a b", Parse: pubFormat.Parse}},
		{{Name: "a"}}, {pubFormat, pubFormat},
	} {
		_, err := New(backendtest.NewMemory(), &Options{Legacy: formats})
		require.ErrorIs(t, err, ErrInvalid)
	}
}

// A RevokeAll that begins while a batch of Import reads, or writes, revokes the keys of the batch.
func TestRevokeAllBesideImport(t *testing.T) {
	for _, tt := range []struct {
		place func(*gated) **gate
		wrong variant
		left  int
	}{
		{func(b *gated) **gate { return &b.afterGet }, 0, 0},
		{func(b *gated) **gate { return &b.beforeApply }, 0, 0},
		{func(b *gated) **gate { return &b.afterApply }, 0, 0},
		{func(b *gated) **gate { return &b.afterGet }, noImportStamp, 9},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := &gated{Backend: backendtest.NewMemory()}
			s, err := New(b, legacyOptions(t))
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			s.wrong = tt.wrong
			_, err = s.Create(t.Context(), Spec{Name: "native", Owner: "acme"})
			require.NoError(t, err)
			importAll(t, s, pubRow(0)) // so that the batch conflicts, and reads
			synctest.Wait()
			stop := b.set(tt.place(b))
			imported := start(func() error {
				_, err := s.Import(context.Background(), rowsOf(pubRows(10)...), nil)
				return err
			})
			<-stop.arrived
			b.clear(tt.place(b))
			var returned atomic.Bool
			revoked := start(func() error {
				_, err := s.RevokeAll(context.Background(), Query{Owner: "acme"}, "leak", nil)
				returned.Store(true)
				return err
			})
			synctest.Wait()
			require.Equal(t, tt.wrong != 0, returned.Load(), "RevokeAll waits for the batch")
			close(stop.open)
			require.NoError(t, imported())
			require.NoError(t, revoked())
			left := 0
			for i := range 10 {
				if _, err := s.Verify(t.Context(), pubToken(i)); err == nil {
					left++
				}
			}
			require.Equal(t, tt.left, left)
		})
	}
}

// Two imports of the same rows at the same time import each key once.
func TestConcurrentImports(t *testing.T) {
	b := backendtest.NewMemory()
	s := newLegacyStore(t, b)
	var imported atomic.Int64
	var running sync.WaitGroup
	for range 4 {
		running.Go(func() {
			result, err := s.Import(t.Context(), rowsOf(pubRows(300)...), nil)
			if err != nil || result.Imported+result.Unchanged != 300 {
				t.Error(result, err)
			}
			imported.Add(int64(result.Imported))
		})
	}
	running.Wait()
	require.EqualValues(t, 300, imported.Load())
	requireIndexed(t, b)
	require.NoError(t, s.CheckIntegrity(t.Context()))
}

// The IDs of imported keys say nothing about their time: queries find them all the same.
func TestQueriesFindImportedKeys(t *testing.T) {
	for _, owner := range []string{"", "acme"} {
		s := newLegacyStore(t, backendtest.NewMemory())
		start := time.Now().Add(-24 * time.Hour)
		var want []string
		for i := range 40 {
			row := pubRow(i)
			row.CreatedAt = start.Add(time.Duration(i) * time.Minute)
			importAll(t, s, row)
			if i >= 20 {
				want = append(want, legacyID("pub", fmt.Sprint(i)).String())
			}
		}
		for range 5 {
			issued, err := s.Create(t.Context(), Spec{Name: "n", Owner: "acme"})
			require.NoError(t, err)
			want = append(want, issued.Key.ID)
		}
		slices.Sort(want)
		for _, newest := range []bool{false, true} {
			q := Query{Owner: owner, CreatedAfter: start.Add(19*time.Minute + time.Second),
				Newest: newest, Limit: 7}
			var got []string
			for { // page by page
				n := len(got)
				for k, err := range s.List(t.Context(), q) {
					require.NoError(t, err)
					got = append(got, k.ID)
				}
				if len(got) == n {
					break
				}
				q.Cursor = got[len(got)-1]
			}
			require.Equal(t, want, got)
			slices.Reverse(want)
		}
		n, err := s.Count(t.Context(), Query{Owner: owner, CreatedBefore: start.Add(time.Minute)})
		require.NoError(t, err)
		require.Equal(t, 1, n)
	}
}

// The store does not know the uses of a key before its import. A last use in the future counts as a
// use at the time of the import.
func TestUnusedSinceTheImport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := New(backendtest.NewMemory(), legacyOptions(t))
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		time.Sleep(10 * time.Hour)
		row := pubRow(1)
		row.CreatedAt = time.Now().Add(-1000 * 24 * time.Hour)
		ahead := pubRow(2)
		ahead.LastUsedAt = time.Now().Add(1000 * 24 * time.Hour)
		importAll(t, s, row, ahead)
		q := Query{UnusedSince: time.Now().Add(-9 * time.Hour)}
		n, err := s.RevokeAll(t.Context(), q, "", nil)
		require.NoError(t, err)
		require.Zero(t, n)
		time.Sleep(10 * time.Hour)
		q.UnusedSince = time.Now().Add(-9 * time.Hour)
		n, err = s.RevokeAll(t.Context(), q, "", nil)
		require.NoError(t, err)
		require.Equal(t, 2, n)
	})
}

// A Parse that panics, or returns nothing, refuses the token. Formats are tried in their order.
func TestParseOfLegacyFormats(t *testing.T) {
	opts := legacyOptions(t)
	opts.Legacy = append([]LegacyFormat{
		{Name: "panics", Parse: func(string) (string, string, bool) { panic("at once") }},
		{Name: "empty", Parse: func(string) (string, string, bool) { return "", "", true }},
		{Name: "loose", Parse: func(text string) (string, string, bool) { return "x", text, true }},
	}, opts.Legacy...)
	s, err := New(backendtest.NewMemory(), opts)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	importAll(t, s, pubRow(1))
	for range 2 {
		_, err = s.Verify(t.Context(), pubToken(1))
		require.NoError(t, err)
		_, err = s.Verify(t.Context(), pubToken(2))
		require.ErrorIs(t, err, ErrUnknown)
		_, err = s.Verify(t.Context(), strings.Repeat("x", token.MaxLength+1))
		require.ErrorIs(t, err, ErrMalformed)
	}
	id, ok := s.KeyID(pubToken(1))
	require.True(t, ok)
	require.Equal(t, legacyID("loose", "x").String(), id, "of the first format")
	_, ok = s.KeyID(strings.Repeat("x", token.MaxLength+1))
	require.False(t, ok)
	i, err := s.Inspect(t.Context(), pubToken(1))
	require.NoError(t, err)
	require.Equal(t, legacyID("pub", "1").String(), i.KeyID)
	session, err := s.Bind(t.Context(), pubToken(1))
	require.NoError(t, err)
	session.Close()
}

// An import has found neither a record nor a grave of a key. Before the import writes the key,
// another import adds the key, and the key is purged. The key does not come back.
func TestPurgeBesideImport(t *testing.T) {
	for _, wrong := range []variant{0, noGrave} {
		synctest.Test(t, func(t *testing.T) {
			ctx := t.Context()
			b := &gated{Backend: backendtest.NewMemory()}
			s, err := New(b, legacyOptions(t))
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			s.wrong = wrong
			stop := b.set(&b.beforeApply)
			var result ImportResult
			imported := start(func() (err error) {
				result, err = s.Import(context.Background(), rowsOf(pubRow(1)), nil)
				return err
			})
			<-stop.arrived
			b.clear(&b.beforeApply)
			importAll(t, s, pubRow(1))
			require.NoError(t, s.Revoke(ctx, legacyID("pub", "1").String(), ""))
			time.Sleep(time.Second)
			n, err := s.Purge(ctx, time.Now())
			require.NoError(t, err)
			require.Equal(t, 1, n)
			close(stop.open)
			require.NoError(t, imported())
			_, err = s.Verify(ctx, pubToken(1))
			if wrong != 0 {
				require.NoError(t, err, "the purged key is back")
				return
			}
			require.ErrorIs(t, err, ErrUnknown)
			require.Equal(t, map[string]int{ImportPurged: 1}, result.Problems)
			require.NoError(t, s.CheckIntegrity(ctx))
			requireIndexed(t, b)
		})
	}
}

// The record of an imported key leads to the event of the import, and so does the grave of the key.
// Keys that a Restore has added have entries in the event index instead.
func TestEventsOfImportedKeys(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newLegacyStore(t, b)
	importAll(t, s, pubRows(20)...)
	require.Empty(t, read(t, b, eventIndexSpace, graveSpace))
	var saved strings.Builder
	require.NoError(t, s.Backup(ctx, &saved))
	other := backendtest.NewMemory()
	restored := newLegacyStore(t, other)
	importAll(t, restored, pubRows(10)...)
	require.NoError(t, restored.Restore(ctx, strings.NewReader(saved.String())))
	for store, firsts := range map[*Store][2]Action{
		s: {ActionImport, ActionImport}, restored: {ActionImport, ActionRestore},
	} {
		for _, purged := range []bool{false, true} {
			for i := range 20 {
				id := legacyID("pub", fmt.Sprint(i)).String()
				for _, newest := range []bool{false, true} {
					var actions []Action
					for e, err := range store.Events(ctx, EventQuery{KeyID: id, Newest: newest}) {
						require.NoError(t, err)
						actions = append(actions, e.Action)
					}
					if newest {
						slices.Reverse(actions)
					}
					require.Equal(t, firsts[i/10], actions[0])
					require.Len(t, actions, map[bool]int{false: 1, true: 3}[purged])
				}
				if !purged {
					require.NoError(t, store.Revoke(ctx, id, ""))
				}
			}
			require.NoError(t, store.CheckIntegrity(ctx))
			if !purged {
				n, err := store.Purge(ctx, time.Now())
				require.NoError(t, err)
				require.Equal(t, 20, n)
			}
		}
	}
	requireIndexed(t, b)
	requireIndexed(t, other)

	// The check of the integrity finds a lost event.
	lost := backendtest.NewMemory()
	s = newLegacyStore(t, lost)
	importAll(t, s, pubRow(1))
	for _, e := range read(t, lost, eventSpace) {
		require.NoError(t, lost.Apply(ctx,
			backend.Change{Key: e.Key, Expect: e.Revision, Delete: true}))
	}
	require.ErrorIs(t, s.CheckIntegrity(ctx), ErrCorrupt)
}

// The problems of an import come in the order of the rows, whether a row is refused when it is read
// or when its window is written. Of rows with one ID, the first is imported, wherever its batch is.
func TestImportReportsInOrder(t *testing.T) {
	const n = maxWindow + 1000 // two windows
	b := backendtest.NewMemory()
	s := newLegacyStore(t, b)
	importAll(t, s, pubRow(1), pubRow(n-1))
	row := func(i int) (Imported, error) {
		r := Imported{Row: fmt.Sprint("line ", i), Format: "pub", Lookup: fmt.Sprint(i),
			Digest: hashing.SHA256().Digest(pubToken(i)), Spec: Spec{Name: "n"}}
		switch {
		case i%1000 == 3:
			return Imported{}, &ImportProblem{Row: r.Row, Reason: ImportUnreadable}
		case i%1000 == 2: // as the row before
			r.Lookup, r.Digest = fmt.Sprint(i-1), hashing.SHA256().Digest("another")
		case i%1000 == 5: // the same key as the row before
			r.Lookup, r.Digest = fmt.Sprint(i-1), hashing.SHA256().Digest(pubToken(i-1))
		}
		return r, nil
	}
	rows := func(yield func(Imported, error) bool) {
		for i := range n {
			if !yield(row(i)) {
				return
			}
		}
	}
	var want []string
	wanted := ImportResult{Rows: n, Problems: make(map[string]int)}
	for i := range n {
		reason := ""
		switch {
		case i%1000 == 3:
			reason = ImportUnreadable
		case i%1000 == 2, i == 1, i == n-1:
			reason = ImportDuplicate
		case i%1000 == 5:
			wanted.Unchanged++
		default:
			wanted.Imported++
		}
		if reason != "" {
			want = append(want, fmt.Sprint("line ", i))
			wanted.Refused++
			wanted.Problems[reason]++
		}
	}
	for _, dry := range []bool{true, false} {
		var got []string
		result, err := s.Import(t.Context(), rows, &ImportOptions{DryRun: dry,
			Problem: func(p *ImportProblem) { got = append(got, p.Row) }})
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.Equal(t, wanted, result)
	}
	for i := 7; i < n; i += 1000 {
		_, err := s.Verify(t.Context(), pubToken(i))
		require.NoError(t, err)
		_, err = s.Verify(t.Context(), pubToken(i-6))
		require.NoError(t, err, "the first row with the ID")
	}
}

// An imported key with credits is never there without its balance, and a further import gives no
// credits, even after all were spent.
func TestImportOfCredits(t *testing.T) {
	ctx := t.Context()
	metered := func(n int) []Imported {
		rows := pubRows(n)
		for i := range rows {
			rows[i].Spec.Credits = &Credits{Remaining: int64(i % 3)}
			rows[i].LastUsedAt = time.Now().Add(-time.Hour) // the largest number of changes
		}
		return rows
	}
	for _, open := range []func() backend.Backend{
		func() backend.Backend { return backendtest.NewMemory() },
		func() backend.Backend { return backendtest.NewShared().Open() },
	} {
		b := &watchedBalances{Backend: open()}
		var on backend.Backend = b
		if f, ok := b.Backend.(backend.Feeder); ok {
			on = struct {
				*watchedBalances
				feeds
			}{b, f}
		}
		// A balance without a record is left over.
		left := balance{Balance: new(record.Balance), id: legacyID("pub", "8")}
		left.set(new(record.Record), 7, &Credits{Remaining: 1000})
		change, err := left.change()
		require.NoError(t, err)
		require.NoError(t, b.Backend.Apply(ctx, *change))

		s := newLegacyStore(t, on)
		dry, err := s.Import(ctx, rowsOf(metered(100)...), &ImportOptions{DryRun: true})
		require.NoError(t, err)
		for _, want := range []ImportResult{
			{Rows: 100, Imported: 100, Metered: 100, Problems: map[string]int{}},
			{Rows: 100, Unchanged: 100, Problems: map[string]int{}},
		} {
			result, err := s.Import(ctx, rowsOf(metered(100)...), nil)
			require.NoError(t, err)
			require.Equal(t, want, result)
			if want.Imported > 0 {
				require.Equal(t, result, dry)
				require.Equal(t, 100, b.seen)
			}
			for i := range 100 {
				for range i % 3 {
					if want.Imported > 0 {
						_, err := s.Verify(ctx, pubToken(i))
						require.NoError(t, err)
					}
				}
				_, err := s.Verify(ctx, pubToken(i))
				require.ErrorAs(t, err, new(*CreditsError), "key %d has spent its credits", i)
			}
		}
		for e, err := range s.Events(ctx, EventQuery{KeyID: legacyID("pub", "8").String(), Limit: 1}) {
			require.NoError(t, err)
			require.Equal(t, ActionImport, e.Action)
			require.Equal(t, &Credits{Remaining: 2}, e.Credits)
		}
		require.NoError(t, s.CheckIntegrity(ctx))
	}
}

// feeds is the part of a backend.Feeder that a backend.Backend lacks.
type feeds interface {
	Feed(context.Context, []byte, []byte, backend.Position) iter.Seq2[backend.Batch, error]
}

// watchedBalances refuses an Apply that writes the first record of a key with credits without the
// balance of the key.
type watchedBalances struct {
	backend.Backend
	mu   sync.Mutex
	seen int
}

func (b *watchedBalances) Apply(ctx context.Context, changes ...backend.Change) error {
	for _, c := range changes {
		if c.Key[0] != keySpace || c.Expect != 0 {
			continue
		}
		r, err := record.Decode(c.Value)
		if err != nil {
			return err
		}
		with := slices.ContainsFunc(changes, func(other backend.Change) bool {
			return string(other.Key) == string(creditKey(token.ID(c.Key[1:])))
		})
		if (r.CreditsRevision != 0) != with {
			return errors.New("a key with credits is written without its balance")
		}
	}
	err := b.Backend.Apply(ctx, changes...)
	for _, c := range changes {
		if err == nil && c.Key[0] == keySpace && c.Expect == 0 {
			b.mu.Lock()
			b.seen++
			b.mu.Unlock()
		}
	}
	return err
}
