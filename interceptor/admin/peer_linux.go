package admin

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerOfSocket asks the kernel for the process that has connected, as the process was when it
// connected.
func peerOfSocket(fd int) (peerUser, error) {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return peerUser{}, err
	}
	groups, err := peerGroups(fd)
	if err != nil {
		return peerUser{}, err
	}
	return peerUser{uid: int(cred.Uid), gids: append(groups, int(cred.Gid))}, nil
}

// peerGroups returns the supplementary groups of the process that has connected. Package unix has
// no function for SO_PEERGROUPS.
func peerGroups(fd int) ([]int, error) {
	list := make([]uint32, 32)
	for {
		size := uint32(len(list)) * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET,
			unix.SO_PEERGROUPS, uintptr(unsafe.Pointer(&list[0])),
			uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE: // size is what the kernel needs
			list = make([]uint32, size/4)
			continue
		case errno != 0:
			return nil, errno
		}
		var gids []int
		for _, gid := range list[:size/4] {
			gids = append(gids, int(gid))
		}
		return gids, nil
	}
}
