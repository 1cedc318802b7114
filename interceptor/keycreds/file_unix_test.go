//go:build unix

package keycreds_test

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

// While one call hangs in the file system, the other calls use the previous key. (A named pipe is a
// file whose opening hangs until a writer opens it.)
func TestFromFileThatHangs(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(dir, "api-key")
		write(t, path, testKey)
		creds := keycreds.FromFile(path, keycreds.AllowInsecure())
		require.Equal(t, "Bearer "+testKey, sent(t, creds))
		require.NoError(t, os.Remove(path))
		require.NoError(t, syscall.Mkfifo(path, 0o600))
		time.Sleep(time.Second)
		hung := make(chan string, 1)
		go func() {
			md, err := creds.GetRequestMetadata(t.Context())
			assert.NoError(t, err)
			hung <- md["authorization"]
		}()
		pipe, err := os.OpenFile(path, os.O_WRONLY, 0) // returns when the other has opened the pipe
		require.NoError(t, err)
		for range 10 {
			require.Equal(t, "Bearer "+testKey, sent(t, creds))
		}
		_, err = pipe.WriteString(testKey2)
		require.NoError(t, err)
		require.NoError(t, pipe.Close())
		require.Equal(t, "Bearer "+testKey2, <-hung)
	})
}

// A file without an end, or a large file, is not read completely.
func TestFromFileThatDoesNotEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "api-key")
	require.NoError(t, syscall.Mkfifo(path, 0o600))
	written := make(chan error, 1)
	go func() {
		pipe, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			_, err = pipe.Write(make([]byte, 1<<20))
			_ = pipe.Close()
		}
		written <- err
	}()
	_, err := keycreds.FromFile(path, keycreds.AllowInsecure()).GetRequestMetadata(t.Context())
	require.ErrorContains(t, err, "longer than 512 bytes")
	require.ErrorIs(t, <-written, syscall.EPIPE)
}
