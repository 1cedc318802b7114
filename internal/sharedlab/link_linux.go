package sharedlab

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A link is a cable between two network namespaces: the process is in one of them, and the proxies
// listen in the other. The namespaces have no name: the kernel removes a namespace with the last
// file and the last process that uses the namespace, even if the test is killed.
type link struct {
	process, proxies *os.File
}

// The ends of the cable.
const (
	processEnd, processAddress = "process0", "10.0.0.1/24"
	proxiesEnd, proxiesAddress = "proxies0", "10.0.0.2/24"
)

// newLink returns a link, or an error that says what is missing. The link ends with the test, and
// with the process inside.
func newLink(t testing.TB) (*link, error) {
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("network namespaces need root, and this is user %d", os.Geteuid())
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("network namespaces need the command %s: %w", tool, err)
		}
	}
	l := new(link)
	for _, file := range []**os.File{&l.process, &l.proxies} {
		f, err := newNamespace()
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { _ = f.Close() })
		*file = f
	}
	// The child reads the descriptor of the other namespace in the table of this process.
	other := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.proxies.Fd())
	steps := []struct {
		in   *os.File
		args []string
	}{
		{l.process, []string{"link", "add", processEnd, "type", "veth", "peer", "name", proxiesEnd,
			"netns", other}},
		{l.process, []string{"link", "set", "lo", "up"}},
		{l.process, []string{"addr", "add", processAddress, "dev", processEnd}},
		{l.process, []string{"link", "set", processEnd, "up"}},
		{l.proxies, []string{"addr", "add", proxiesAddress, "dev", proxiesEnd}},
		{l.proxies, []string{"link", "set", proxiesEnd, "up"}},
	}
	for _, s := range steps {
		if err := command(s.in, "ip", s.args...); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// newNamespace makes a network namespace.
func newNamespace() (f *os.File, err error) {
	err = apart(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return f, err
}

// inside runs f on a thread that is in a namespace.
func inside(namespace *os.File, f func() error) error {
	return apart(func() error {
		if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter a network namespace: %w", err)
		}
		return f()
	})
}

// apart runs f on a separate thread, which then returns to the namespace of this process.
func apart(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			err = f()
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread() // otherwise the thread ends with the goroutine
			}
			_ = home.Close()
		}
		result <- err
	}()
	return <-result
}

// command runs a command in a namespace.
func command(namespace *os.File, name string, args ...string) error {
	return inside(namespace, func() error {
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s %q: %w: %s", name, args, err, out)
		}
		return nil
	})
}

// listen returns a listener for a proxy. Without a link, the listener is on 127.0.0.1.
func (l *link) listen() (listener net.Listener, err error) {
	if l == nil {
		return net.Listen("tcp", "127.0.0.1:0")
	}
	ip, _, err := net.ParseCIDR(proxiesAddress)
	if err != nil {
		return nil, err
	}
	err = inside(l.proxies, func() error {
		listener, err = net.Listen("tcp", net.JoinHostPort(ip.String(), "0"))
		return err
	})
	return listener, err
}

// start starts the process of the link. Without a link, the process has the namespace of the test.
func (l *link) start(cmd *exec.Cmd) error {
	if l == nil {
		return cmd.Start()
	}
	return inside(l.process, cmd.Start)
}

// drop makes the kernel drop the packets of the process. The zero Cut ends this.
func (l *link) drop(c Cut) error {
	rules := "flush ruleset\n"
	if c.ToServer {
		rules += "table ip lab { chain out { type filter hook output priority 0; " +
			"oifname " + processEnd + " drop; }; }\n"
	}
	if c.ToProcess {
		rules += "table ip lab { chain in { type filter hook input priority 0; " +
			"iifname " + processEnd + " drop; }; }\n"
	}
	return command(l.process, "nft", rules)
}
