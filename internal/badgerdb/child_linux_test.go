package badgerdb

import "syscall"

// prepareChild makes the process one of another host or user. Only root may do that.
func prepareChild(c child) {
	if c.Host != "" {
		if err := syscall.Sethostname([]byte(c.Host)); err != nil {
			panic(err)
		}
	}
	if c.UID != 0 {
		if err := syscall.Setgroups(nil); err != nil {
			panic(err)
		}
		if err := syscall.Setgid(c.UID); err != nil {
			panic(err)
		}
		if err := syscall.Setuid(c.UID); err != nil {
			panic(err)
		}
	}
}
