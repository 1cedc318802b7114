package peers

import (
	"os"
	"os/exec"
)

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
