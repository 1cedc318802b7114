package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A key admits three calls. A customer who pays gets more.
func ExampleStore_AddCredits() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()

	issued, err := store.Create(ctx, keystore.Spec{Name: "trial",
		Credits: &keystore.Credits{Remaining: 3}})
	if err != nil {
		log.Fatal(err)
	}
	token := issued.Secret.Reveal()

	key, err := store.Verify(ctx, token) // takes one credit
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("a dear call:", key.Spend(ctx, 2))
	_, err = store.Verify(ctx, token)
	var short *keystore.CreditsError
	fmt.Println(err, errors.As(err, &short), errors.Is(err, keystore.ErrDenied))

	credits, err := store.AddCredits(ctx, key.ID, 1000)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("remaining:", credits.Remaining)
	_, err = store.Verify(ctx, token)
	fmt.Println(err)
	// Output:
	// a dear call: <nil>
	// the API key has no credits left true false
	// remaining: 1000
	// <nil>
}

// A key admits 1,000 calls a month.
func ExampleStore_SetCredits() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()

	issued, err := store.Create(ctx, keystore.Spec{Name: "free plan"})
	if err != nil {
		log.Fatal(err)
	}
	err = store.SetCredits(ctx, issued.Key.ID, &keystore.Credits{
		Remaining: 1000,
		Refill:    keystore.Refill{Amount: 1000, MonthDay: 1},
	})
	if err != nil {
		log.Fatal(err)
	}
	key, err := store.Verify(ctx, issued.Secret.Reveal())
	fmt.Println(key.Metered(), err)
	credits, err := store.Credits(ctx, key.ID)
	fmt.Println(credits.Remaining, err)
	// Output:
	// true <nil>
	// 999 <nil>
}
