package httpkeys_test

import (
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

var protocols = []struct {
	name string
	h2   bool
}{{"HTTP/1.1", false}, {"HTTP/2", true}}

// A handler is unblocked wherever it waits, and the caller does not take half a response for a
// whole one.
func TestRevokeUnblocksTheHandler(t *testing.T) {
	waits := map[string]func(w http.ResponseWriter, r *http.Request, ready chan<- struct{}) error{
		"for its context": func(_ http.ResponseWriter, r *http.Request, ready chan<- struct{}) error {
			close(ready)
			<-r.Context().Done()
			assert.ErrorIs(t, context.Cause(r.Context()), keystore.ErrRevoked)
			_, err := r.Body.Read(make([]byte, 1))
			return err
		},
		"in Read": func(_ http.ResponseWriter, r *http.Request, ready chan<- struct{}) error {
			_, err := io.ReadFull(r.Body, make([]byte, 1))
			assert.NoError(t, err)
			close(ready)
			_, err = io.ReadAll(r.Body)
			return err
		},
		"in Write": func(w http.ResponseWriter, _ *http.Request, ready chan<- struct{}) error {
			close(ready)
			for page := make([]byte, 1<<16); ; {
				if _, err := w.Write(page); err != nil {
					return err
				}
			}
		},
		"in Flush": func(w http.ResponseWriter, _ *http.Request, ready chan<- struct{}) error {
			close(ready)
			for control := http.NewResponseController(w); ; {
				if _, err := io.WriteString(w, "event: tick\n\n"); err != nil {
					return err
				}
				if err := control.Flush(); err != nil {
					return err
				}
			}
		},
	}
	for _, protocol := range protocols {
		for name, wait := range waits {
			t.Run(protocol.name+", "+name, func(t *testing.T) {
				store := keystoretest.New(t, nil)
				key, token := issue(t, store, keystore.Spec{})
				ready, returned := make(chan struct{}), make(chan error, 1)
				url, client := serve(t, protocol.h2, newAuth(t, store).Wrap(http.HandlerFunc(
					func(w http.ResponseWriter, r *http.Request) { returned <- wait(w, r, ready) })))
				writes := name == "in Write" || name == "in Flush"
				var body io.Reader // in HTTP/1.1, the first Write would read the whole body
				if !writes {
					toServer, pipe := io.Pipe()
					defer pipe.Close()
					go func() { _, _ = pipe.Write([]byte("x")) }()
					body = toServer
				}
				type answer struct {
					response *http.Response
					err      error
				}
				answers := make(chan answer, 1)
				go func() {
					response, err := client.Do(request(t, "POST", url, token, body))
					answers <- answer{response, err}
				}()
				<-ready
				if writes {
					a := <-answers // the client does not read the body
					require.NoError(t, a.err)
					defer a.response.Body.Close()
					answers <- a
					time.Sleep(50 * time.Millisecond) // fills the buffers, most likely
				}
				require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
				begin := time.Now()
				err := <-returned
				t.Logf("the handler returned %v after Revoke", time.Since(begin))
				var ended *httpkeys.EndedError
				require.ErrorAs(t, err, &ended)
				require.ErrorIs(t, err, keystore.ErrRevoked)
				a := <-answers
				require.NoError(t, a.err)
				defer a.response.Body.Close()
				text, err := io.ReadAll(a.response.Body)
				if writes {
					require.Equal(t, http.StatusOK, a.response.StatusCode)
					require.Error(t, err, "the response is not complete")
				} else {
					require.NoError(t, err)
					require.Equal(t, http.StatusUnauthorized, a.response.StatusCode)
					require.Contains(t, string(text), "API_KEY_REVOKED")
				}
				require.Zero(t, store.Stats().Live)
			})
		}
	}
}

// The session can end while the handler returns. A deadline that is set afterwards would end the
// process.
func TestNoDeadlineAfterTheHandlerHasReturned(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(protocol.name, func(t *testing.T) { endAfterReturn(t, protocol.h2, false) })
	}
}

// endAfterReturn lets the cut of a session begin before its handler returns, and continue after
// net/http has forgotten the request.
func endAfterReturn(t *testing.T, h2, wrong bool) {
	store := keystoretest.New(t, nil)
	key, token := issue(t, store, keystore.Spec{})
	_, other := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store)
	cutting, mayCut, cut := make(chan struct{}), make(chan struct{}), make(chan struct{})
	auth.SetBeforeCut(func() {
		close(cutting)
		<-mayCut
		close(cut)
	})
	if wrong {
		auth.ForgetReturned()
	}
	url, client := serve(t, h2, auth.Wrap(http.HandlerFunc(
		func(_ http.ResponseWriter, r *http.Request) {
			if k, _ := httpkeys.FromContext(r.Context()); k.ID == key.ID {
				if assert.NoError(t, store.Revoke(t.Context(), key.ID, "")) {
					<-cutting
				}
			}
		})))
	// The body is at its end neither for the server nor for the client.
	body, pipe := io.Pipe()
	defer pipe.Close()
	status, _, _ := do(t, client, request(t, "POST", url, token, body))
	require.Equal(t, http.StatusUnauthorized, status)
	works := func() {
		for range 10 {
			status, _, _ = do(t, client, request(t, "GET", url, other, nil))
			require.Equal(t, http.StatusOK, status)
		}
	}
	works() // meanwhile net/http forgets the request
	close(mayCut)
	<-cut
	works()
}

// The test above would notice a deadline after the return: this variant ends its process.
func TestADeadlineAfterTheReturnEndsTheProcess(t *testing.T) {
	if os.Getenv("HTTPKEYS_WRONG") != "" {
		for range 100 { // until the deadline comes after net/http has forgotten the request
			endAfterReturn(t, true, true)
		}
		return
	}
	child := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	child.Env = append(os.Environ(), "HTTPKEYS_WRONG=1")
	out, err := child.CombinedOutput()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit, "%s", out)
	require.Contains(t, string(out), "nil pointer dereference")
	require.Contains(t, string(out), "SetReadDeadline")
}
