package sharedlab

import "golang.org/x/sys/unix"

// awaitStop waits until a child that got SIGSTOP has stopped, with all its threads.
func awaitStop(pid int) error {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			return err
		}
	}
}
