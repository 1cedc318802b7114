package httpkeys_test

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
)

// A client sends its key to one host, over https alone.
func ExampleTransport() {
	client := &http.Client{Transport: &httpkeys.Transport{
		Source: func(context.Context) (string, error) { return os.Getenv("API_KEY"), nil },
		Hosts:  []string{"api.example.com"},
	}}
	_, err := client.Get("http://api.example.com/orders")
	fmt.Println(err)
	// Output:
	// Get "http://api.example.com/orders": httpkeys: Transport: the API key is not sent to api.example.com over http: use https
}
