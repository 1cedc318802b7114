package importer_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"strings"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

// The tokens that another system has issued stay valid. A row that cannot be imported is reported,
// and the import continues.
func Example() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := keystore.Open(dir, &keystore.Options{Legacy: importer.Plain().Formats()})
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	ctx := context.Background()

	export := strings.NewReader("token,name\nk7Qm2xV9tR4wZ8bN3cF6,billing\nshort,test\n")
	result, err := store.Import(ctx, importer.Plain().Read(export, nil), &keystore.ImportOptions{
		Problem: func(p *keystore.ImportProblem) { fmt.Println(p.Row, p.Reason) },
	})
	fmt.Println(result.Imported, result.Refused, err)

	key, err := store.Verify(ctx, "k7Qm2xV9tR4wZ8bN3cF6")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(key.Name)

	// Rotate gives the key a token of the store. During the grace, both tokens are valid.
	issued, err := store.Rotate(ctx, key.ID, 0)
	if err != nil {
		log.Fatal(err)
	}
	_, err = store.Verify(ctx, "k7Qm2xV9tR4wZ8bN3cF6")
	fmt.Println(err)
	_, err = store.Verify(ctx, issued.Secret.Reveal())
	fmt.Println(err)
	// Output:
	// line 3 weak
	// 1 1 <nil>
	// billing
	// API key denied: unknown
	// <nil>
}
