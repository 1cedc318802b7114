package browsertest

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// The process of examples/server serves the console: a key that the console makes opens a stream,
// and the stream ends when the console revokes the key.
func TestExampleServer(t *testing.T) {
	browser := startBrowser(t)
	dir := t.TempDir()
	binary := filepath.Join(dir, "server")
	build := exec.Command("go", "build", "-o", binary,
		"github.com/grpc-api-key/grpc-api-key/examples/server")
	build.Env = append(os.Environ(), "GOWORK=off")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	server := exec.Command(binary, "-addr", "127.0.0.1:0", "-console", "127.0.0.1:0")
	server.Dir = dir
	stdout, err := server.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, server.Start())
	t.Cleanup(func() {
		_ = server.Process.Signal(os.Interrupt)
		_ = server.Wait()
	})
	var addr, base string
	for lines := bufio.NewScanner(stdout); addr == "" || base == ""; {
		require.True(t, lines.Scan(), "the server has ended")
		_, _ = fmt.Sscanf(lines.Text(), "listening on %s", &addr)
		_, _ = fmt.Sscanf(lines.Text(), "the console is on %s", &base)
	}

	var operator string
	require.Eventually(t, func() bool { // the socket opens later
		conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "run/admin.sock"),
			grpc.WithTransportCredentials(local.NewCredentials()))
		require.NoError(t, err)
		defer conn.Close()
		made, err := adminpb.NewKeyServiceClient(conn).CreateKey(t.Context(), &adminpb.CreateKeyRequest{
			Key: &adminpb.Key{DisplayName: "me", Scopes: []string{"keys:admin"}}})
		operator = made.GetSecret()
		return err == nil
	}, patience, tick)

	p := open(t, browser, base, true)
	p.logIn(operator)
	p.click("New key")
	p.fill("Name", "laptop")
	p.click("Create the key")
	p.at("New key laptop")
	roots, err := credentials.NewClientTLSFromFile(filepath.Join(dir, "server.pem"), "")
	require.NoError(t, err)
	end := openStream(t, addr, roots, p.text("secret"))
	p.click("I have saved the key")
	p.click("Revoke")
	p.reads("1 live stream will end.")
	p.click("Revoke the key")
	require.Equal(t, codes.Unauthenticated, status.Code(end()))
	p.click("Log out")
	p.at("Log in")
}
