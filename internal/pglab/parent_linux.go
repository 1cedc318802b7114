package pglab

import "syscall"

// endWithParent ends a server when the process of the test ends, even if the process is killed.
// PostgreSQL shuts down immediately on SIGQUIT.
func endWithParent(a *syscall.SysProcAttr) { a.Pdeathsig = syscall.SIGQUIT }
