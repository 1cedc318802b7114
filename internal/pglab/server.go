package pglab

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// Superuser is the user that owns the database cluster.
const Superuser = "postgres"

// patience is the longest time for which a test waits for a server.
const patience = time.Minute

// A TB is what the package needs of a testing.TB. A program that is not a test has another TB.
// Fatal, Fatalf and Skip do not return.
type TB interface {
	Helper()
	Cleanup(func())
	Error(args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Skip(args ...any)
}

// Config are the settings of a Server. The zero Config is a server with PostgreSQL's defaults.
type Config struct {
	// NoSync makes the server write without waiting for the disk. A server that is killed still
	// loses nothing, unless the machine ends too.
	NoSync bool
	// Settings are settings of the server, each as "name=value".
	Settings []string
	// HBA are the lines of pg_hba.conf that come before the lines that trust every local user.
	HBA []string
}

// A Server is a PostgreSQL server. A Server is not safe for concurrent use.
type Server struct {
	Port int
	// Dir is the directory of the server, which the user of the server can enter. The socket is in
	// Dir, and the database cluster in Dir/data.
	Dir string

	bin    string
	config Config
	as     *syscall.Credential // nil: the user of the test
	cmd    *exec.Cmd           // nil: the server does not run
	exited chan struct{}       // closed when cmd has exited
}

// Start starts a server with a new database cluster.
func Start(t TB, c Config) *Server {
	t.Helper()
	s := newServer(t, c)
	s.mustRun(t, "initdb", "-D", s.data(), "-U", Superuser, "-A", "trust", "--no-sync", "-E",
		"UTF8", "--locale=C")
	hba := strings.Join(c.HBA, "\n") + "\nlocal all all trust\nhost all all 127.0.0.1/32 trust\n" +
		"local replication all trust\nhost replication all 127.0.0.1/32 trust\n"
	s.write(t, "data/pg_hba.conf", hba)
	s.mustStart(t)
	return s
}

// Standby starts a standby of the server, which names itself when it connects. The standby has all
// that the server has.
func (s *Server) Standby(t TB, name string) *Server {
	t.Helper()
	b := newServer(t, s.config)
	b.copy(t, s, name)
	b.mustStart(t)
	s.awaitStandby(t, name)
	return b
}

// New returns a server that has a port, no database cluster, and does not run. Follow or Backup
// gives the server a cluster.
func New(t TB, c Config) *Server {
	t.Helper()
	s := newServer(t, c)
	var err error
	if s.Port, err = freeport.Port(); err != nil {
		t.Fatal(err)
	}
	return s
}

// Follow ends a server, if it runs, and starts the server as a new standby of another server. The
// port stays the same.
func (s *Server) Follow(t TB, primary *Server, name string) {
	t.Helper()
	s.Kill()
	s.copy(t, primary, name)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	primary.awaitStandby(t, name)
}

// Backup ends a server, if it runs, and gives the server a copy of another server. After Start, the
// server is a primary, and has what the other server had when Backup was called.
func (s *Server) Backup(t TB, primary *Server) {
	t.Helper()
	s.Kill()
	s.copy(t, primary, "")
}

// copy replaces the database cluster by a copy of that of another server, as a standby with the
// name, or as a primary if the name is empty.
func (s *Server) copy(t TB, primary *Server, name string) {
	t.Helper()
	if err := os.RemoveAll(s.data()); err != nil {
		t.Fatal(err)
	}
	args := []string{"-h", primary.Dir, "-p", strconv.Itoa(primary.Port), "-U", Superuser, "-D",
		s.data(), "-c", "fast", "--no-sync"}
	conf := ""
	if name != "" {
		args = append(args, "-R")
		conf = fmt.Sprintf("primary_conninfo = 'host=%s port=%d user=%s application_name=%s'\n",
			primary.Dir, primary.Port, Superuser, name)
	}
	s.mustRun(t, "pg_basebackup", args...)
	s.write(t, "data/postgresql.auto.conf", conf)
}

// awaitStandby waits until a standby receives the log of the server.
func (s *Server) awaitStandby(t TB, name string) {
	t.Helper()
	s.Await(t, fmt.Sprintf("select count(*) from pg_stat_replication where state = 'streaming' "+
		"and application_name = '%s'", name), "1")
}

func newServer(t TB, c Config) *Server {
	bin := programs(t)
	// The path of a socket has at most 107 bytes, and the directory of t belongs to the user of the
	// test alone.
	dir, err := os.MkdirTemp("", "pglab-")
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{Dir: dir, bin: bin, config: c}
	t.Cleanup(func() {
		s.Kill()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if os.Getuid() == 0 {
		s.as = unprivileged(t)
		if err := os.Chown(dir, int(s.as.Uid), int(s.as.Gid)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// binEnv is an environment variable with the directory of PostgreSQL's programs. Without the
// variable, PATH and Debian's directories are searched.
const binEnv = "PGLAB_BIN"

// programs returns the directory of PostgreSQL's programs, or skips the test.
func programs(t TB) string {
	t.Helper()
	var dirs []string
	if dir := os.Getenv(binEnv); dir != "" {
		dirs, _ = filepath.Glob(dir)
	} else {
		if path, err := exec.LookPath("initdb"); err == nil {
			if path, err = filepath.EvalSymlinks(path); err == nil {
				dirs = append(dirs, filepath.Dir(path))
			}
		}
		debian, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
		dirs = append(dirs, debian...)
	}
	if len(dirs) == 0 {
		t.Skip("PostgreSQL IS NOT INSTALLED: install the Debian package postgresql, or put " +
			"initdb into PATH")
	}
	return dirs[len(dirs)-1]
}

// unprivileged returns a user who may run a server.
func unprivileged(t TB) *syscall.Credential {
	t.Helper()
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err == nil {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		}
	}
	t.Skip("POSTGRESQL DOES NOT RUN AS ROOT, AND THERE IS NO OTHER USER: the machine has neither " +
		"the user postgres nor the user nobody")
	return nil
}

func (s *Server) data() string { return filepath.Join(s.Dir, "data") }

// command returns a command that runs one of PostgreSQL's programs as the user of the server.
func (s *Server) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.bin, program), args...)
	cmd.Dir = s.Dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.as}
	return cmd
}

func (s *Server) run(program string, args ...string) (string, error) {
	cmd := s.command(program, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s%s", program, err, out.Bytes(), errs.Bytes())
	}
	return strings.TrimSpace(out.String()), nil
}

func (s *Server) mustRun(t TB, program string, args ...string) string {
	t.Helper()
	out, err := s.run(program, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// write writes a file that belongs to the user of the server.
func (s *Server) write(t TB, name, text string) {
	t.Helper()
	path := filepath.Join(s.Dir, name)
	err := os.WriteFile(path, []byte(text), 0o600)
	if err == nil && s.as != nil {
		err = os.Chown(path, int(s.as.Uid), int(s.as.Gid))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// mustStart starts the server on a port that is free.
func (s *Server) mustStart(t TB) {
	t.Helper()
	// The port was free a moment ago. If another process has taken the port, mustStart tries
	// another port.
	var err error
	for range 5 {
		if s.Port, err = freeport.Port(); err == nil {
			if err = s.Start(); err == nil {
				return
			}
		}
	}
	t.Fatal(err)
}

// Start starts a server that does not run, and waits until the server accepts connections.
func (s *Server) Start() error {
	args := []string{"-D", s.data(), "-p", strconv.Itoa(s.Port), "-k", s.Dir,
		"-h", "127.0.0.1", "-c", "max_connections=200", "-c", "shared_buffers=64MB"}
	if s.config.NoSync {
		args = append(args, "-c", "fsync=off")
	}
	for _, setting := range s.config.Settings {
		args = append(args, "-c", setting)
	}
	log, err := os.OpenFile(filepath.Join(s.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := s.command("postgres", args...)
	cmd.Stdout, cmd.Stderr = log, log
	endWithParent(cmd.SysProcAttr)
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	s.cmd, s.exited = cmd, exited
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s.ready() {
			return nil
		}
		select {
		case <-exited:
			s.cmd = nil
			return fmt.Errorf("the server has ended:\n%s", s.Log())
		default:
		}
	}
	s.Kill()
	return fmt.Errorf("the server is not ready:\n%s", s.Log())
}

func (s *Server) ready() bool {
	_, err := s.run("pg_isready", "-q", "-h", s.Dir, "-p", strconv.Itoa(s.Port))
	return err == nil
}

// Log returns the last lines that the server has logged.
func (s *Server) Log() string {
	text, err := os.ReadFile(filepath.Join(s.Dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

// Stop stops the server in order, and ends all connections.
func (s *Server) Stop() { s.end(syscall.SIGINT) }

// Crash stops the server without a checkpoint, as a crash of the machine would: the next Start
// recovers from the log.
func (s *Server) Crash() { s.end(syscall.SIGQUIT) }

// Kill is like Crash, and also ends a server that is stopped by Pause.
func (s *Server) Kill() {
	if s.cmd != nil {
		_ = s.Resume()
		s.end(syscall.SIGQUIT)
	}
}

func (s *Server) end(signal syscall.Signal) {
	if s.cmd == nil {
		return
	}
	_ = s.cmd.Process.Signal(signal)
	select {
	case <-s.exited:
	case <-time.After(patience):
		_ = s.cmd.Process.Kill()
		<-s.exited
	}
	s.cmd = nil
}

// Pause stops all processes of the server, as SIGSTOP does. The connections stay open.
func (s *Server) Pause() error { return s.signalAll(syscall.SIGSTOP) }

// Resume ends Pause.
func (s *Server) Resume() error { return s.signalAll(syscall.SIGCONT) }

// signalAll sends a signal to the first process of the server and to its children.
func (s *Server) signalAll(signal syscall.Signal) error {
	parent := strconv.Itoa(s.cmd.Process.Pid)
	err := s.cmd.Process.Signal(signal)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text, readErr := os.ReadFile(name)
		if readErr != nil {
			continue // the process has ended
		}
		// The second field is the name of the program in parentheses.
		_, rest, _ := strings.Cut(string(text), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == parent {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(name)))
			if killErr := syscall.Kill(pid, signal); killErr != syscall.ESRCH {
				err = errors.Join(err, killErr)
			}
		}
	}
	return err
}

// Promote makes a standby a primary, and waits until the server accepts writes.
func (s *Server) Promote(t TB) {
	t.Helper()
	s.mustRun(t, "pg_ctl", "-D", s.data(), "-w", "promote")
}

// Set changes settings of a running server, each as "name = value". A value of text is quoted.
func (s *Server) Set(t TB, settings ...string) {
	t.Helper()
	for _, setting := range settings {
		s.Exec(t, "alter system set "+setting)
	}
	s.Exec(t, "select pg_reload_conf()")
	for _, setting := range settings {
		name, value, _ := strings.Cut(setting, " = ")
		s.Await(t, "show "+name, strings.Trim(value, "'"))
	}
}

// Replicate makes the server wait for a standby with this name before a commit returns. An empty
// name ends synchronous replication.
func (s *Server) Replicate(t TB, standby string) {
	t.Helper()
	s.Set(t, fmt.Sprintf("synchronous_standby_names = '%s'", standby))
	if standby != "" {
		s.Await(t, fmt.Sprintf("select sync_state from pg_stat_replication where "+
			"application_name = '%s'", standby), "sync")
	}
}

// Exec runs a command as the superuser, and returns what psql prints.
func (s *Server) Exec(t TB, sql string) string {
	t.Helper()
	out, err := s.exec(sql)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *Server) exec(sql string) (string, error) {
	return s.run("psql", "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1", "-h", s.Dir, "-p",
		strconv.Itoa(s.Port), "-U", Superuser, "-d", "postgres", "-c", sql)
}

// Await waits until a query returns a text. A query that fails is repeated.
func (s *Server) Await(t TB, query, want string) {
	t.Helper()
	var got string
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if got, err = s.exec(query); err == nil && got == want {
			return
		}
	}
	t.Fatalf("%s: %q, %v, want %q", query, got, err, want)
}

// Addr returns the host and the port of the server.
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port)) }

// URL returns a connection string for the superuser and the database postgres. The parameters are
// in pairs, such as "pool_max_conns", "4".
func (s *Server) URL(parameters ...string) string {
	return URL(s.Addr(), parameters...)
}

// URL returns a connection string for a server at an address, such as a proxy. Several addresses
// are separated by commas.
func URL(addr string, parameters ...string) string {
	q := url.Values{"sslmode": {"disable"}}
	for i := 0; i+1 < len(parameters); i += 2 {
		q.Set(parameters[i], parameters[i+1])
	}
	u := url.URL{Scheme: "postgres", User: url.User(Superuser), Host: addr, Path: "/postgres",
		RawQuery: q.Encode()}
	return u.String()
}

// File writes a file that belongs to the user of the server, and returns its path.
func (s *Server) File(t TB, name string, text []byte) string {
	t.Helper()
	s.write(t, name, string(text))
	return filepath.Join(s.Dir, name)
}

// Mkdir makes a directory that belongs to the user of the server, and returns its path.
func (s *Server) Mkdir(t TB, name string) string {
	t.Helper()
	path := filepath.Join(s.Dir, name)
	err := os.Mkdir(path, 0o700)
	if err == nil && s.as != nil {
		err = os.Chown(path, int(s.as.Uid), int(s.as.Gid))
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
