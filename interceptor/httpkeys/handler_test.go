package httpkeys_test

import (
	"bytes"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// A header may be the result of a request, as a session cookie is. So no header and no trailer that
// the handler has set goes to the caller after Revoke has returned. The headers of middleware
// around Wrap do.
func TestHeadersAfterRevoke(t *testing.T) {
	for _, protocol := range protocols {
		for _, middleware := range []bool{false, true} {
			store := keystoretest.New(t, nil)
			key, token := issue(t, store, keystore.Spec{})
			handler := newAuth(t, store).Wrap(http.HandlerFunc(
				func(w http.ResponseWriter, r *http.Request) {
					w.Header().Set("Trailer", "X-Sum")
					w.Header().Set("X-Request-Id", "of the handler")
					assert.NoError(t, store.Revoke(t.Context(), key.ID, ""))
					w.Header().Set("Set-Cookie", "session=result")
					w.Header().Set("X-Sum", "result")
					w.Header().Set(http.TrailerPrefix+"X-Other", "result")
					_, err := io.WriteString(w, "result")
					assert.ErrorIs(t, err, keystore.ErrRevoked)
				}))
			url, client := serve(t, protocol.h2, http.HandlerFunc(
				func(w http.ResponseWriter, r *http.Request) {
					if middleware {
						w.Header().Set("X-Request-Id", "7")
					}
					handler.ServeHTTP(w, r)
				}))
			response, err := client.Do(request(t, "GET", url, token, nil))
			require.NoError(t, err)
			body, err := io.ReadAll(response.Body)
			require.NoError(t, err)
			require.NoError(t, response.Body.Close())
			require.Equal(t, http.StatusUnauthorized, response.StatusCode)
			require.Contains(t, string(body), "API_KEY_REVOKED")
			require.NotContains(t, response.Header, "Set-Cookie")
			require.NotContains(t, response.Header, "X-Sum")
			require.Empty(t, response.Trailer)
			want := []string(nil)
			if middleware {
				want = []string{"7"}
			}
			require.Equal(t, want, response.Header.Values("X-Request-Id"))
		}
	}
}

// The temporary files of a form with files are removed after the request, as net/http does it
// without Wrap. Otherwise, each upload would leave a file on the disk for ever.
func TestFilesOfAForm(t *testing.T) {
	for _, protocol := range protocols {
		for _, c := range []struct {
			name   string
			public bool
			revoke bool // after the handler has begun the response, which is then aborted
		}{{"public", true, false}, {"with a key", false, false}, {"aborted", false, true}} {
			t.Run(protocol.name+", "+c.name, func(t *testing.T) {
				dir := t.TempDir()
				t.Setenv("TMPDIR", dir)
				t.Setenv("TMP", dir) // on Windows
				files := func() int {
					entries, err := os.ReadDir(dir)
					assert.NoError(t, err)
					return len(entries)
				}
				store := keystoretest.New(t, nil)
				key, token := issue(t, store, keystore.Spec{})
				var opts []httpkeys.Option
				if c.public {
					opts, token = append(opts, httpkeys.Public("/")), ""
				}
				url, client := serve(t, protocol.h2, newAuth(t, store, opts...).Wrap(http.HandlerFunc(
					func(w http.ResponseWriter, r *http.Request) {
						if err := r.ParseMultipartForm(1); err != nil {
							t.Error(err)
						}
						if n := files(); n != 1 {
							t.Errorf("the form has %d files", n)
						}
						_, _ = io.WriteString(w, "begun")
						if c.revoke {
							if err := store.Revoke(t.Context(), key.ID, ""); err != nil {
								t.Error(err)
							}
						}
					})))
				var body bytes.Buffer
				form := multipart.NewWriter(&body)
				part, err := form.CreateFormFile("file", "name")
				require.NoError(t, err)
				_, err = part.Write(make([]byte, 1<<16))
				require.NoError(t, err)
				require.NoError(t, form.Close())
				r := request(t, "POST", url, token, &body)
				r.Header.Set("Content-Type", form.FormDataContentType())
				response, err := client.Do(r)
				if err == nil {
					require.NoError(t, response.Body.Close())
				} else {
					require.True(t, c.revoke, err)
				}
				// net/http removes the files after it has sent the response.
				require.Eventually(t, func() bool { return files() == 0 }, 20*time.Second,
					time.Millisecond)
			})
		}
	}
}
