package peers

import (
	"net"
	"os"
	"os/exec"
)

// freePort returns a port of 127.0.0.1 that was free a moment ago.
func freePort() (int, error) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer lis.Close()
	return lis.Addr().(*net.TCPAddr).Port, nil
}

// output runs a command whose output goes to a file. A pipe would be held open by the server that it leaves behind.
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
