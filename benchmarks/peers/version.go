package peers

import (
	"os/exec"
	"path/filepath"
	"regexp"
)

var version = regexp.MustCompile(`\d+(\.\d+)+`)

// RedisVersion returns the version of the installed Redis server, or "".
func RedisVersion() string {
	out, _ := exec.Command("redis-server", "--version").Output()
	return version.FindString(string(out))
}

// PostgreSQLVersion returns the version of the installed PostgreSQL server, or "".
func PostgreSQLVersion() string {
	bin, err := postgresBinaries()
	if err != nil {
		return ""
	}
	out, _ := exec.Command(filepath.Join(bin, "postgres"), "--version").Output()
	return version.FindString(string(out))
}
