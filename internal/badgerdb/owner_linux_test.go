package badgerdb

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
)

// stranger is a user that owns nothing.
const stranger = 61234

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: only root can run a process as another user, or mount a file system")
	}
}

// reachable is a temporary directory that every user can reach.
func reachable(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "badgerdb")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	return dir
}

// made is a directory with a store in it, of a user.
func made(t *testing.T, dir string, uid int) {
	t.Helper()
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
	require.NoError(t, db.Close())
	give(t, dir, uid)
	for _, name := range names(t, dir) {
		give(t, filepath.Join(dir, name), uid)
	}
}

func give(t *testing.T, path string, uid int) {
	t.Helper()
	require.NoError(t, os.Chown(path, uid, uid))
}

// A store of which root has left a file behind, as one command in a container does: the error says
// whose it is and what to do, matches fs.ErrPermission, and changes nothing. After what it says was
// done, the store opens.
func TestWhatRootLeavesBehind(t *testing.T) {
	needRoot(t)
	leave := map[string]func(t *testing.T, dir string) (path string){
		"the directory": func(t *testing.T, dir string) string {
			give(t, dir, 0)
			return dir
		},
		"all": func(t *testing.T, dir string) string {
			give(t, dir, 0)
			for _, name := range names(t, dir) {
				give(t, filepath.Join(dir, name), 0)
			}
			return dir
		},
		"a log": func(t *testing.T, dir string) string {
			path := filepath.Join(dir, "00007.mem")
			require.NoError(t, os.WriteFile(path, make([]byte, 100), 0o644))
			return path
		},
	}
	for _, name := range []string{
		"LAST", "MANIFEST", "KEYREGISTRY", "DISCARD", "000001.sst", "000001.vlog",
	} {
		leave[name] = func(t *testing.T, dir string) string {
			path := filepath.Join(dir, name)
			require.FileExists(t, path)
			give(t, path, 0)
			return path
		}
	}
	for name, leave := range leave {
		for _, withRecover := range []bool{false, true} {
			t.Run(fmt.Sprint(name, " ", withRecover), func(t *testing.T) {
				dir := filepath.Join(reachable(t), "store")
				made(t, dir, stranger)
				path := leave(t, dir)
				before := tree(t, dir)
				_, told, v := child{Dir: dir, UID: stranger, Recover: withRecover}.run(t)
				require.NotEmpty(t, v.Text)
				require.True(t, v.Denied, v.Text)
				require.False(t, v.Corrupt || v.Locked || v.NotExist || told, v.Text)
				require.Contains(t, v.Text, path+" (mode ")
				require.Contains(t, v.Text, "belongs to root (uid 0)")
				require.Contains(t, v.Text, "this process runs as uid 61234")
				if name != "the directory" && name != "all" {
					require.Contains(t, v.Text, fmt.Sprintf("chown -R %d %q", stranger, dir))
				}
				require.NotContains(t, v.Text, "inside it")
				require.NotContains(t, v.Text, "\n")
				require.Equal(t, before, tree(t, dir))
				out, err := exec.Command("chown", "-R", fmt.Sprint(stranger), dir).CombinedOutput()
				require.NoError(t, err, "%s", out)
				_, _, v = child{Dir: dir, UID: stranger}.run(t)
				require.Empty(t, v.Text)
			})
		}
	}
	t.Run("LOCK, which is replaced", func(t *testing.T) {
		dir := filepath.Join(reachable(t), "store")
		made(t, dir, stranger)
		require.NoError(t, os.WriteFile(filepath.Join(dir, fsys.LockName), []byte("1\n"), 0o600))
		_, _, v := child{Dir: dir, UID: stranger}.run(t)
		require.Empty(t, v.Text)
	})
	t.Run("a mode", func(t *testing.T) {
		dir := filepath.Join(reachable(t), "store")
		made(t, dir, stranger)
		require.NoError(t, os.Chmod(filepath.Join(dir, commitfile.Name), 0o400))
		_, _, v := child{Dir: dir, UID: stranger}.run(t)
		require.True(t, v.Denied)
		require.Contains(t, v.Text, "its mode")
		require.NotContains(t, v.Text, "chown")
	})
}

// What is advised depends on what the directory is: nobody is to make a store inside a store.
func TestAdvice(t *testing.T) {
	needRoot(t)
	run := func(t *testing.T, dir string) string {
		t.Helper()
		before := tree(t, dir)
		_, _, v := child{Dir: dir, UID: stranger}.run(t)
		require.NotEmpty(t, v.Text)
		require.True(t, v.Denied, v.Text)
		require.Equal(t, before, tree(t, dir))
		return v.Text
	}
	t.Run("an empty directory of root's, in which the process may make files", func(t *testing.T) {
		dir := filepath.Join(reachable(t), "volume")
		require.NoError(t, os.Mkdir(dir, 0o775))
		require.NoError(t, os.Chown(dir, 0, stranger))
		require.NoError(t, os.Chmod(dir, 0o775))
		require.Contains(t, run(t, dir), "name a directory inside it")
		_, _, v := child{Dir: filepath.Join(dir, "keys"), UID: stranger}.run(t)
		require.Empty(t, v.Text)
	})
	t.Run("the same with a store in it", func(t *testing.T) {
		dir := filepath.Join(reachable(t), "volume")
		made(t, dir, stranger)
		require.NoError(t, os.Chown(dir, 0, stranger))
		require.NoError(t, os.Chmod(dir, 0o775))
		text := run(t, dir)
		require.NotContains(t, text, "inside it")
		require.Contains(t, text, fmt.Sprintf("chown -R %d %q", stranger, dir))
	})
	t.Run("an empty directory of root's", func(t *testing.T) {
		dir := filepath.Join(reachable(t), "volume")
		require.NoError(t, os.Mkdir(dir, 0o755))
		text := run(t, dir)
		require.NotContains(t, text, "inside it")
		require.Contains(t, text, "belongs to root")
	})
	t.Run("a directory to be made in one of root's", func(t *testing.T) {
		dir := reachable(t)
		_, _, v := child{Dir: filepath.Join(dir, "a", "b"), UID: stranger}.run(t)
		require.True(t, v.Denied, v.Text)
		require.Contains(t, v.Text, dir+" (mode ")
		require.Empty(t, names(t, dir))
	})
	t.Run("a read-only file system", func(t *testing.T) {
		dir := t.TempDir()
		mount := func(args ...string) {
			out, err := exec.Command("mount", append(args, dir)...).CombinedOutput()
			if err != nil {
				t.Skipf("SKIPPED: root cannot mount a file system here: %v: %s", err, out)
			}
		}
		mount("-t", "tmpfs", "-o", "mode=0755,size=200m", "tmpfs")
		defer func() { require.NoError(t, exec.Command("umount", dir).Run()) }()
		for _, content := range []string{"nothing", "a store"} {
			if content == "a store" {
				mount("-o", "remount,rw")
				made(t, dir, 0)
			}
			require.NoError(t, os.Chmod(dir, 0o755))
			mount("-o", "remount,ro")
			before := tree(t, dir)
			for _, dir := range []string{dir, filepath.Join(dir, "new")} {
				for _, opts := range []Options{{}, {Recover: func(error) {}}} {
					_, err := Open(dir, opts)
					require.ErrorIs(t, err, syscall.EROFS, content)
					require.ErrorContains(t, err, "read-only file system, and a store has to write")
					require.NotContains(t, err.Error(), "inside it")
					require.NotContains(t, err.Error(), "chmod 700")
				}
			}
			require.Equal(t, before, tree(t, dir))
		}
	})
}

// Two containers on one volume, in each of which the process has pid 1.
func TestLockOfAnotherContainer(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	container := func(c child) (*exec.Cmd, verdict) {
		c.Dir = dir
		cmd := c.command(t)
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
		}
		in, err := cmd.StdinPipe()
		require.NoError(t, err)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		if err := cmd.Start(); err != nil {
			t.Skipf("SKIPPED: root cannot make a pid namespace here: %v", err)
		}
		t.Cleanup(func() {
			_ = in.Close()
			_ = cmd.Wait()
		})
		return cmd, readVerdict(t, bufio.NewScanner(out))
	}
	_, first := container(child{Host: "api-one", Hold: true})
	require.Empty(t, first.Text)
	require.Equal(t, 1, first.Pid)
	for _, host := range []string{"api-two", "api-one"} { // two replicas may even share a host name
		_, second := container(child{Host: host})
		require.Equal(t, 1, second.Pid)
		require.True(t, second.Locked)
		require.NotContains(t, second.Text, "this process")
		require.Contains(t, second.Text, `the process with pid 1 on host "api-one", which started`)
	}
}
