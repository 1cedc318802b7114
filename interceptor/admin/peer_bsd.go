//go:build darwin || freebsd

package admin

import "golang.org/x/sys/unix"

// peerOfSocket asks the kernel for the process that has connected. The list of groups has the group
// of the process and some of its supplementary groups.
func peerOfSocket(fd int) (peerUser, error) {
	cred, err := unix.GetsockoptXucred(fd, solLocal, unix.LOCAL_PEERCRED)
	if err != nil {
		return peerUser{}, err
	}
	u := peerUser{uid: int(cred.Uid)}
	for _, gid := range cred.Groups[:min(int(cred.Ngroups), len(cred.Groups))] {
		u.gids = append(u.gids, int(gid))
	}
	return u, nil
}

const solLocal = 0 // the level of the options of unix sockets
