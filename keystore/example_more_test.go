package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A key that works from one network only. The interceptors tell the store a caller's address;
// elsewhere WithClientAddr does.
func ExampleWithClientAddr() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{
		Name:            "office",
		AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
	})
	if err != nil {
		log.Fatal(err)
	}
	for _, addr := range []string{"192.0.2.7", "198.51.100.1"} {
		_, err := store.Verify(keystore.WithClientAddr(ctx, netip.MustParseAddr(addr)),
			issued.Secret.Reveal())
		fmt.Println(addr, err)
	}
	// Output:
	// 192.0.2.7 <nil>
	// 198.51.100.1 API key denied: wrong network
}

// A key that may be used twice, and then once an hour.
func ExampleRateLimitError() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{
		Name:      "trial",
		RateLimit: keystore.RateLimit{PerSecond: 1.0 / 3600, Burst: 2},
	})
	if err != nil {
		log.Fatal(err)
	}
	for range 3 {
		_, err = store.Verify(ctx, issued.Secret.Reveal())
		var limited *keystore.RateLimitError
		if errors.As(err, &limited) {
			fmt.Println("again in", limited.RetryAfter.Round(time.Hour),
				errors.Is(err, keystore.ErrDenied))
			continue
		}
		fmt.Println(err)
	}
	// Output:
	// <nil>
	// <nil>
	// again in 1h0m0s false
}

// Who did what to a key, and why.
func ExampleStore_Events() {
	store, done := exampleStore()
	defer done()
	ctx := keystore.WithActor(context.Background(), "alice")
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}
	if err := store.Revoke(keystore.WithActor(ctx, "bob"), issued.Key.ID, "leaked"); err != nil {
		log.Fatal(err)
	}
	for event, err := range store.Events(ctx, keystore.EventQuery{KeyID: issued.Key.ID}) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%d %s by %s %q\n", event.Revision, event.Action, event.Actor, event.Reason)
	}
	// Output:
	// 1 create by alice ""
	// 2 revoke by bob "leaked"
}

// All keys of an owner are revoked: first it is seen which.
func ExampleStore_RevokeAll() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	for _, owner := range []string{"team-a", "team-b", "team-a"} {
		if _, err := store.Create(ctx, keystore.Spec{Name: "ci", Owner: owner}); err != nil {
			log.Fatal(err)
		}
	}
	query := keystore.Query{Owner: "team-a"}
	n, err := store.RevokeAll(ctx, query, "team dissolved", &keystore.RevokeAllOptions{
		DryRun:   true,
		Progress: func(k *keystore.Key, done int) { fmt.Println("would revoke", done, k.Owner) },
	})
	fmt.Println(n, err)
	n, err = store.RevokeAll(ctx, query, "team dissolved", nil)
	fmt.Println(n, err)
	// Output:
	// would revoke 1 team-a
	// would revoke 2 team-a
	// 2 <nil>
	// 2 <nil>
}

// Keys that died more than a year ago are removed; here there are none.
func ExampleStore_Purge() {
	store, done := exampleStore()
	defer done()
	n, err := store.Purge(context.Background(), time.Now().AddDate(-1, 0, 0))
	fmt.Println(n, err)
	// Output:
	// 0 <nil>
}

// A backup is restored into another store. What is not a whole backup changes nothing.
func ExampleStore_Backup() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}
	var backup bytes.Buffer
	if err := store.Backup(ctx, &backup); err != nil {
		log.Fatal(err)
	}

	other, doneToo := exampleStore()
	defer doneToo()
	err = other.Restore(ctx, bytes.NewReader(backup.Bytes()[:backup.Len()-1]))
	fmt.Println(errors.Is(err, keystore.ErrCorrupt))
	if err := other.Restore(ctx, &backup); err != nil {
		log.Fatal(err)
	}
	_, err = other.Verify(ctx, issued.Secret.Reveal())
	fmt.Println(err)
	// Output:
	// true
	// <nil>
}

// metrics counts, as an application's would.
type metrics struct{ verified, refused, changed, ended atomic.Int64 }

func (m *metrics) Verified(keystore.Verification) { m.verified.Add(1) }
func (m *metrics) Refused(keystore.Refusal)       { m.refused.Add(1) }
func (m *metrics) Changed(keystore.Event)         { m.changed.Add(1) }
func (m *metrics) Ended(keystore.BindEnd)         { m.ended.Add(1) }

func ExampleObserver() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	m := new(metrics)
	store, err := keystore.Open(dir, &keystore.Options{Observer: m})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}
	_, _ = store.Verify(ctx, issued.Secret.Reveal())
	_, _ = store.Verify(ctx, "not a key")
	fmt.Println(m.verified.Load(), m.refused.Load(), m.changed.Load())
	// Output:
	// 1 1 1
}

// A pepper is introduced: digests without it still match, and are replaced when their keys are
// used. When Stats().Outdated is 0, the keyring can be dropped for the new hasher alone.
func ExampleStats() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	store, err := keystore.Open(dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}
	store.Close()

	peppered, err := hashing.HMACSHA256("2026", bytes.Repeat([]byte("pepper"), 6))
	if err != nil {
		log.Fatal(err)
	}
	ring, err := hashing.Keyring(peppered, hashing.SHA256())
	if err != nil {
		log.Fatal(err)
	}
	store, err = keystore.Open(dir, &keystore.Options{Hasher: ring})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	for store.Stats().Outdated < 0 { // it is counted in the background
		time.Sleep(time.Millisecond)
	}
	fmt.Println("outdated:", store.Stats().Outdated)
	_, err = store.Verify(ctx, issued.Secret.Reveal())
	fmt.Println(err)
	// Output:
	// outdated: 1
	// <nil>
}

// A token has been found in a public place. Anybody could have written it, so only a token that
// proves its secret ends the key.
func ExampleStore_Inspect() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		log.Fatal(err)
	}
	found := issued.Secret.Reveal()

	inspection, err := store.Inspect(ctx, found)
	if err != nil {
		log.Fatal(err)
	}
	if inspection.Key == nil {
		log.Fatal("no key of ours: ", keystore.Reason(inspection.Refusal))
	}
	fmt.Println(inspection.Key.Name, inspection.Refusal)
	if err := store.Revoke(ctx, inspection.KeyID, "found in a public repository"); err != nil {
		log.Fatal(err)
	}
	inspection, err = store.Inspect(ctx, found)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(inspection.Key.RevokeReason)
	fmt.Println(inspection.Refusal)
	// Output:
	// ci <nil>
	// found in a public repository
	// API key denied: revoked
}
