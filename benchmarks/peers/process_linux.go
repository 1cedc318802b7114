package peers

import (
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
)

// own prepares the command of a server, so that the kernel kills the server at the end of this
// process. A Ctrl-C on the terminal does not reach the server, because Close stops the server.
func own(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// unprivileged returns a function that prepares a command to run as a user other than root.
// unprivileged makes this user the owner of dir.
func unprivileged(dir string) (func(*exec.Cmd), error) {
	if os.Geteuid() != 0 {
		return func(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, err
		}
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return nil, err
	}
	return func(cmd *exec.Cmd) {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Setpgid:    true,
			Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
		}
	}, os.Chown(dir, uid, gid)
}
