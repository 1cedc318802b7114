package keycreds_test

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
}

// replace replaces a file by a new file.
func replace(t *testing.T, path, text string) {
	t.Helper()
	write(t, path+".new", text)
	require.NoError(t, os.Rename(path+".new", path))
}

// mount creates a directory in which a secret is mounted as Kubernetes does: api-key ->
// ..data/api-key, and ..data -> ..version.
func mount(t *testing.T, dir, version, text string) (path string) {
	t.Helper()
	require.NoError(t, os.Mkdir(filepath.Join(dir, version), 0o700))
	write(t, filepath.Join(dir, version, "api-key"), text)
	require.NoError(t, os.Symlink(version, filepath.Join(dir, "..data_tmp")))
	require.NoError(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	path = filepath.Join(dir, "api-key")
	if _, err := os.Lstat(path); err != nil {
		require.NoError(t, os.Symlink(filepath.Join("..data", "api-key"), path))
	}
	return path
}

// sent returns the key that credentials send.
func sent(t *testing.T, creds credentials.PerRPCCredentials) string {
	t.Helper()
	md, err := creds.GetRequestMetadata(t.Context())
	require.NoError(t, err)
	return md["authorization"]
}

func TestFromFileReadsAChangedFile(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, dir, path string){
		"a rename": func(t *testing.T, _, path string) { replace(t, path, testKey2+"\n") },
		"a swap of a link": func(t *testing.T, dir, _ string) {
			mount(t, dir, "..2", testKey2+"\n")
		},
		"a write": func(t *testing.T, _, path string) { write(t, path, testKey2+"\n") },
		"a write with old times": func(t *testing.T, _, path string) {
			before, err := os.Stat(path)
			require.NoError(t, err)
			write(t, path, testKey2+"\n")
			require.NoError(t, os.Chtimes(path, before.ModTime(), before.ModTime()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := mount(t, dir, "..1", testKey+"\n")
			synctest.Test(t, func(t *testing.T) {
				creds := keycreds.FromFile(path, keycreds.AllowInsecure())
				require.Equal(t, "Bearer "+testKey, sent(t, creds))
				change(t, dir, path)
				time.Sleep(time.Second - time.Nanosecond)
				require.Equal(t, "Bearer "+testKey, sent(t, creds),
					"the file is read once a second")
				time.Sleep(time.Nanosecond)
				require.Equal(t, "Bearer "+testKey2, sent(t, creds))
			})
		})
	}
}

// A file that is being written, or is missing for a moment, makes no call fail. A longer problem
// does.
func TestFromFileWithoutKey(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(t *testing.T, path string)
		code  codes.Code
		text  string
	}{
		"empty": {func(t *testing.T, path string) {
			write(t, path, "")
		}, codes.Unauthenticated, "the API key is empty"},
		"quoted": {func(t *testing.T, path string) {
			write(t, path, `"`+testKey2+`"`)
		}, codes.Unauthenticated, "quotation marks"},
		"too large": {func(t *testing.T, path string) {
			write(t, path, string(make([]byte, 1<<20)))
		}, codes.Unauthenticated, "longer than"},
		"missing": {func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
		}, codes.Unavailable, "no such file"},
		"a directory": {func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Mkdir(path, 0o700))
		}, codes.Unavailable, "api-key"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				path := filepath.Join(dir, "api-key")
				write(t, path, testKey)
				creds := keycreds.FromFile(path, keycreds.AllowInsecure())
				require.Equal(t, "Bearer "+testKey, sent(t, creds))
				tt.spoil(t, path)
				time.Sleep(time.Second)
				require.Equal(t, "Bearer "+testKey, sent(t, creds))
				for range 3 {
					time.Sleep(time.Second)
					_, err := creds.GetRequestMetadata(t.Context())
					require.Equal(t, tt.code, status.Code(err), err)
					require.ErrorContains(t, err, tt.text)
					require.NotContains(t, err.Error(), "notAReal")
				}
				require.NoError(t, os.RemoveAll(path))
				write(t, path, testKey2)
				time.Sleep(time.Second)
				require.Equal(t, "Bearer "+testKey2, sent(t, creds))
			})
		})
	}
}

func TestFromFileCreatedLater(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(dir, "api-key")
		creds := keycreds.FromFile(path, keycreds.AllowInsecure())
		_, err := creds.GetRequestMetadata(t.Context())
		require.Equal(t, codes.Unavailable, status.Code(err))
		require.ErrorIs(t, err, os.ErrNotExist)
		require.ErrorContains(t, err, path)
		write(t, path, testKey)
		_, err = creds.GetRequestMetadata(t.Context())
		require.Error(t, err, "a failure is not looked into more often than once a second either")
		time.Sleep(time.Second)
		require.Equal(t, "Bearer "+testKey, sent(t, creds))
	})
}

// On an open connection, calls carry the new key after Kubernetes has swapped the secret.
func TestFromFileOnAConnection(t *testing.T) {
	s, dir := serveTLS(t), t.TempDir()
	path := mount(t, dir, "..1", testKey)
	client := s.dial(t, grpc.WithPerRPCCredentials(keycreds.FromFile(path)))
	require.NoError(t, check(t, client))
	require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
	mount(t, dir, "..2", testKey2)
	require.NoError(t, os.RemoveAll(filepath.Join(dir, "..1")))
	require.Eventually(t, func() bool {
		return check(t, client) == nil && s.last(t).Get("authorization")[0] == "Bearer "+testKey2
	}, time.Minute, 10*time.Millisecond)
	require.Equal(t, 1, s.connections())
}
