package peers

import (
	"net"
	"os"
	"os/exec"
)

// freePort returns a port of 127.0.0.1 that was free at the time of the call.
func freePort() (int, error) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer lis.Close()
	return lis.Addr().(*net.TCPAddr).Port, nil
}

// output runs a command, writes its output to a file, and returns the output. A pipe would not
// work: the command starts a server, which would keep the pipe open.
func output(cmd *exec.Cmd, path string) (string, error) {
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	err = cmd.Run()
	text, _ := os.ReadFile(path)
	return string(text), err
}
