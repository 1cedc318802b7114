package console_test

import (
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// The form of a key sets and adds credits. A form that is sent twice adds the credits once.
func TestCreditForms(t *testing.T) {
	r := newRig(t)
	b, _ := r.as(t, "keys:admin")
	id := keystoretest.MustCreate(t, r.store, keystore.Spec{Name: "metered"}).Key.ID
	path := "keys/" + id + "/credits"
	has := func(want *keystore.Credits) {
		t.Helper()
		c, err := r.store.Credits(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, want, c)
	}
	form := func(fields url.Values) url.Values {
		key, err := r.store.Get(t.Context(), id)
		require.NoError(t, err)
		fields.Set("revision", strconv.FormatUint(key.Revision, 10))
		return fields
	}
	require.Contains(t, b.get("keys/"+id).body, `<span class="none">not limited</span>`)
	require.Contains(t, b.get("keys/"+id).body, path+`"`)
	require.NotContains(t, b.get(path).body, "Add credits")

	p := b.post(path, form(url.Values{"credits": {"1,500"}, "refill": {"1000"},
		"refill_when": {"month"}, "refill_day": {"31"}}))
	require.Equal(t, "/keys/keys/"+id, p.url.Path)
	require.Contains(t, p.body, "Set the credits.")
	require.Contains(t, p.body, "1,500 left, filled up to 1,000 on day 31 of each month")
	has(&keystore.Credits{Remaining: 1500, Refill: keystore.Refill{Amount: 1000, MonthDay: 31}})
	shown := b.get(path).body
	for _, text := range []string{`value="1500"`, `value="1000"`, `value="31"`,
		`value="month" checked`} {
		require.Contains(t, shown, text)
	}

	add := form(url.Values{"do": {"add"}, "add": {"500"}})
	require.Contains(t, b.post(path, add).body, "Added 500 credits.")
	p = b.post(path, add)
	require.Equal(t, http.StatusConflict, p.status)
	require.Contains(t, b.post(path, form(url.Values{"do": {"add"}, "add": {"-1999"}})).body,
		"Added -1,999 credits.")
	has(&keystore.Credits{Remaining: 1, Refill: keystore.Refill{Amount: 1000, MonthDay: 31}})

	b.post(path, form(url.Values{"credits": {"0"}, "refill": {"7"}, "refill_when": {"every"},
		"refill_every": {"7d"}}))
	has(&keystore.Credits{Refill: keystore.Refill{Amount: 7, Every: 7 * 24 * time.Hour}})
	b.post(path, form(url.Values{"credits": {"3"}, "refill": {"7"}, "refill_when": {"day"}}))
	has(&keystore.Credits{Remaining: 3, Refill: keystore.Refill{Amount: 7, Daily: true}})
	b.post(path, form(url.Values{"credits": {"3"}, "refill_when": {"never"}}))
	has(&keystore.Credits{Remaining: 3})

	for field, wrong := range map[string][]url.Values{
		"credits": {
			{"credits": {"-1"}}, {"credits": {"1.5"}}, {"credits": {"many"}},
			{"credits": {"9007199254740993"}}, {"credits": {"99999999999999999999"}},
			{"refill": {"7"}, "refill_when": {"day"}},
		},
		"refill": {
			{"credits": {"1"}, "refill_when": {"day"}},
			{"credits": {"1"}, "refill_when": {"day"}, "refill": {"0"}},
			{"credits": {"1"}, "refill_when": {"day"}, "refill": {"9007199254740993"}},
		},
		"refill_when": {
			{"credits": {"1"}, "refill": {"7"}},
			{"credits": {"1"}, "refill": {"7"}, "refill_when": {"sometimes"}},
			{"credits": {"1"}, "refill": {"7"}, "refill_when": {"month"}},
			{"credits": {"1"}, "refill": {"7"}, "refill_when": {"month"}, "refill_day": {"32"}},
			{"credits": {"1"}, "refill": {"7"}, "refill_when": {"every"}},
			{"credits": {"1"}, "refill": {"7"}, "refill_when": {"every"}, "refill_every": {"1ms"}},
			{"credits": {"1"}, "refill": {"7"}, "refill_when": {"every"}, "refill_every": {"9999d"}},
		},
		"add": {
			{"do": {"add"}, "add": {""}}, {"do": {"add"}, "add": {"0"}}, {"do": {"add"}, "add": {"x"}},
			{"do": {"add"}, "add": {"9007199254740992"}}, {"do": {"add"}, "add": {"9007199254740993"}},
		},
	} {
		for _, fields := range wrong {
			p := b.post(path, form(fields))
			require.Equal(t, http.StatusUnprocessableEntity, p.status, "%v", fields)
			require.Contains(t, p.body, `id="`+field+`-error"`, "%v", fields)
			require.Contains(t, p.body, "Nothing was changed.")
			if field == "add" {
				continue
			}
			fields.Set("name", "new")
			fields.Set("expires", "never")
			p = b.post("keys/new", b.fill("keys/new", fields))
			require.Equal(t, http.StatusUnprocessableEntity, p.status, "%v", fields)
			require.Contains(t, p.body, `id="`+field+`-error"`, "%v", fields)
			require.Contains(t, p.body, `<details class="more" open>`)
		}
	}
	has(&keystore.Credits{Remaining: 3})

	b.post(path, form(url.Values{}))
	has(nil)
	p = b.post("keys/new", b.fill("keys/new", url.Values{"name": {"n"}, "expires": {"never"},
		"credits": {"40"}, "refill": {"50"}, "refill_when": {"day"}}))
	key, err := r.store.Verify(t.Context(), secretOf(t, p))
	require.NoError(t, err)
	c, err := r.store.Credits(t.Context(), key.ID)
	require.NoError(t, err)
	require.Equal(t, &keystore.Credits{Remaining: 39,
		Refill: keystore.Refill{Amount: 50, Daily: true}}, c)

	require.NoError(t, r.store.Revoke(t.Context(), id, ""))
	p = b.do(http.MethodGet, path, nil, nil)
	require.Equal(t, http.StatusConflict, p.status)
	require.Equal(t, http.StatusConflict, b.post(path, form(url.Values{"credits": {"1"}})).status)
}

// The page of a key shows that its balance is damaged, and the form repairs the balance.
func TestDamagedCredits(t *testing.T) {
	memory := backendtest.NewMemory()
	store, err := keystore.New(memory, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	r := newRigOver(t, store)
	b, _ := r.as(t, "keys:admin")
	issued := keystoretest.MustCreate(t, store, keystore.Spec{
		Credits: &keystore.Credits{Remaining: 5}})
	for e, err := range memory.Scan(t.Context(), []byte{'j'}, []byte{'j' + 1}) {
		require.NoError(t, err)
		require.NoError(t, memory.Apply(t.Context(),
			backend.Change{Key: e.Key, Value: []byte("\xff"), Expect: e.Revision}))
	}
	path := "keys/" + issued.Key.ID
	require.Contains(t, b.get(path).body, "damaged: the key is refused")
	require.Contains(t, b.get(path+"/credits").body, "Set the credits.")
	p := b.post(path+"/credits", b.fill(path+"/credits", url.Values{"credits": {"8"}}))
	require.Contains(t, p.body, "8 left, not filled up")
}
