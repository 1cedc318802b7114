package crashtest

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// A disk is a file system of a test's own, mounted for as long as it takes.
type disk struct {
	kind  string
	image string // of an ext4 or a btrfs on a loop device; empty for a tmpfs
	root  string // where it is mounted
	point string // the directory in it to use
	mib   int64
}

// quota is the kind of file system that has more free space than a quota allows to use: a btrfs
// with a qgroup.
const quota = "quota"

// mount makes a file system of so many MiB, or with a quota of so many, and mounts it. Without the
// rights, the tools or a loop device the test is skipped.
func mount(t *testing.T, kind string, size int64) *disk {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT RUN: mounting a file system needs root")
	}
	root := t.TempDir()
	d := &disk{kind: kind, root: root, point: root, mib: size}
	t.Cleanup(d.unmount)
	if kind == "tmpfs" {
		run(t, "mount", "-t", "tmpfs", "-o", "size="+strconv.FormatInt(size, 10)+"m", "crashtest",
			d.point)
		return d
	}
	tools := []string{"mkfs.ext4", "losetup"}
	if kind == quota {
		tools = []string{"mkfs.btrfs", "btrfs", "losetup"}
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("NOT RUN: there is no %s", tool)
		}
	}
	if err := exec.Command("losetup", "--find").Run(); err != nil {
		t.Skip("NOT RUN: there is no free loop device")
	}
	d.image = filepath.Join(t.TempDir(), "image")
	require.NoError(t, os.WriteFile(d.image, nil, 0o600))
	if kind == quota {
		require.NoError(t, os.Truncate(d.image, 1500<<20))
		run(t, "mkfs.btrfs", "-q", d.image)
		out, err := exec.Command("mount", "-o", "loop", d.image, d.root).CombinedOutput()
		if err != nil {
			t.Skipf("NOT RUN: no btrfs can be mounted: %v: %s", err, out)
		}
		d.point = filepath.Join(d.root, "limited")
		run(t, "btrfs", "quota", "enable", d.root)
		run(t, "btrfs", "subvolume", "create", d.point)
		run(t, "btrfs", "qgroup", "limit", strconv.FormatInt(size, 10)+"M", d.point)
		return d
	}
	require.NoError(t, os.Truncate(d.image, size<<20))
	// No blocks are kept for root, and none are cleared in the background.
	run(t, "mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", d.image)
	d.mount(t)
	return d
}

func (d *disk) mount(t *testing.T) {
	t.Helper()
	run(t, "mount", "-o", "loop", d.image, d.root)
}

func (d *disk) unmount() { _ = exec.Command("umount", d.root).Run() }

// losePower drops everything that is not on the disk yet: the page cache and the journal of the
// file system, as a power cut does.
func (d *disk) losePower() error {
	const (
		shutdown   = 0x8004587d // FS_IOC_SHUTDOWN
		noLogFlush = 2
	)
	f, err := os.Open(d.point)
	if err != nil {
		return err
	}
	flags := uint32(noLogFlush)
	_, _, errno := syscall.Syscall(
		syscall.SYS_IOCTL, f.Fd(), shutdown, uintptr(unsafe.Pointer(&flags)))
	if errno != 0 {
		err = errno
	}
	return errors.Join(err, f.Close())
}

// powerUp mounts the disk again, which replays its journal.
func (d *disk) powerUp(t *testing.T) {
	t.Helper()
	run(t, "umount", d.root)
	d.mount(t)
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
}
