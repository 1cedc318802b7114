// Command web serves server-sent events and a websocket behind API keys. It opens both, revokes the
// key, and prints how both end:
//
//	go run -C examples/web .
//
// The page of a browser cannot add a header to an EventSource or to a WebSocket. Give such a page
// another kind of session: an API key is for programs.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/coder/websocket"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func main() {
	dir, err := os.MkdirTemp("", "web")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := run(dir, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// newHandler returns the handler of the server.
func newHandler(store *keystore.Store) (http.Handler, error) {
	auth, err := httpkeys.New(store,
		httpkeys.Require("GET /events", "events:read"),
		httpkeys.Require("GET /socket", "events:read"))
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", serveEvents)
	mux.HandleFunc("GET /socket", serveSocket)
	return auth.Wrap(mux), nil
}

// serveEvents sends events until the client leaves, or until the key of the client ends.
func serveEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	control := http.NewResponseController(w)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for n := 1; ; n++ {
		fmt.Fprintf(w, "data: %d\n\n", n)
		if err := control.Flush(); err != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-tick.C:
		}
	}
}

// serveSocket sends each message back. It returns only when the connection is closed, because the
// context ends with the handler.
func serveSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return // Accept has written the response
	}
	defer conn.CloseNow()
	// The context ends with the key. Without the next lines, the server would close the connection
	// one second later, and the client would not know why.
	stop := context.AfterFunc(r.Context(), func() {
		_ = conn.Close(websocket.StatusPolicyViolation, "the API key has ended")
	})
	defer stop()
	for {
		kind, message, err := conn.Read(context.WithoutCancel(r.Context()))
		if err != nil {
			return
		}
		if err := conn.Write(context.WithoutCancel(r.Context()), kind, message); err != nil {
			return
		}
	}
}

// run serves, opens both streams, and revokes the key.
func run(dir string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	handler, err := newHandler(store)
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	go server.Serve(listener)
	defer server.Close()

	issued, err := store.Create(ctx, keystore.Spec{Name: "web", Scopes: []string{"events:read"}})
	if err != nil {
		return err
	}
	base := &http.Transport{}
	defer base.CloseIdleConnections()
	client := &http.Client{Transport: &httpkeys.Transport{
		Base:          base,
		Source:        func(context.Context) (string, error) { return issued.Secret.Reveal(), nil },
		Hosts:         []string{listener.Addr().String()},
		AllowInsecure: true, // the example has no certificate
	}}
	url := "http://" + listener.Addr().String()

	response, err := client.Get(url + "/events")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	lines := bufio.NewReader(response.Body)
	line, err := lines.ReadString('\n')
	if err != nil {
		return err
	}
	fmt.Fprint(out, "events: ", line)

	conn, _, err := websocket.Dial(ctx, url+"/socket", &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		return err
	}
	defer conn.CloseNow()
	if err := conn.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
		return err
	}
	_, message, err := conn.Read(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "socket: %s\n", message)

	if err := store.Revoke(ctx, issued.Key.ID, "leaked"); err != nil {
		return err
	}
	for err == nil {
		_, err = lines.ReadString('\n')
	}
	fmt.Fprintln(out, "the events ended:", err)
	_, _, err = conn.Read(ctx)
	fmt.Fprintln(out, "the socket ended:", websocket.CloseStatus(err), err)
	if response, err = client.Get(url + "/events"); err != nil {
		return err
	}
	defer response.Body.Close()
	fmt.Fprintln(out, "another request:", response.Status)
	return nil
}
