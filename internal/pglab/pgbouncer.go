package pglab

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// PgBouncer starts a PgBouncer in front of the server, as the user of the server, and returns its
// address. The settings, such as "pool_mode = session", are those of pgbouncer.ini. The PgBouncer
// ends with the test. A test on a machine without PgBouncer is skipped.
func (s *Server) PgBouncer(t TB, settings ...string) (addr string) {
	t.Helper()
	program, err := exec.LookPath("pgbouncer")
	if err != nil {
		// Debian has the program in a directory that only root has in PATH.
		if program, err = exec.LookPath("/usr/sbin/pgbouncer"); err != nil {
			t.Skip("PgBouncer IS NOT INSTALLED: install the Debian package pgbouncer")
		}
	}
	port, err := freeport.Port()
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprint("pgbouncer-", port)
	s.write(t, name+".users", fmt.Sprintf("%q \"\"\n", Superuser))
	ini := fmt.Sprintf("[databases]\n* = host=127.0.0.1 port=%d\n[pgbouncer]\n"+
		"listen_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\n"+
		"auth_type = trust\nauth_file = %s\n", s.Port, port, filepath.Join(s.Dir, name+".users"))
	for _, setting := range settings {
		ini += setting + "\n"
	}
	s.write(t, name+".ini", ini)
	log, err := os.Create(filepath.Join(s.Dir, name+".log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := s.command("", filepath.Join(s.Dir, name+".ini"))
	cmd.Path, cmd.Args[0] = program, program
	cmd.Stdout, cmd.Stderr = log, log
	endWithParent(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGQUIT) // immediately
		<-exited
	})
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		_, err := s.run("pg_isready", "-q", "-h", "127.0.0.1", "-p", strconv.Itoa(port))
		if err == nil {
			return net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		}
		select {
		case <-exited:
			text, _ := os.ReadFile(log.Name())
			t.Fatalf("PgBouncer has ended:\n%s", text)
		default:
		}
	}
	t.Fatal("PgBouncer is not ready")
	return ""
}
