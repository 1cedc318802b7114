package httpkeys_test

import (
	"bytes"
	"io"
	"mime/multipart"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

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
					require.NoError(t, err)
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
