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
		for _, err := range []error{syscall.Setgroups(nil), syscall.Setgid(c.UID), syscall.Setuid(c.UID)} {
			if err != nil {
				panic(err)
			}
		}
	}
}
