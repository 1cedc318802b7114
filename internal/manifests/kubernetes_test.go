package manifests

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

const guides = "../../examples/guides/"

// decode decodes one document of a manifest, and fails at a field that the type does not have.
func decode[T any](t *testing.T, document string) T {
	t.Helper()
	var v T
	require.NoError(t, yaml.UnmarshalStrict([]byte(document), &v))
	return v
}

func documents(t *testing.T, file string) []string {
	t.Helper()
	text, err := os.ReadFile(guides + file)
	require.NoError(t, err)
	return strings.Split(string(text), "\n---\n")
}

// flags returns the arguments of a container by name.
func flags(t *testing.T, args []string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		require.True(t, ok, arg)
		all[name] = value
	}
	return all
}

func TestKubernetes(t *testing.T) {
	docs := documents(t, "kubernetes/orders.yaml")
	require.Len(t, docs, 4)
	deployment := decode[appsv1.Deployment](t, docs[0])
	claims := []corev1.PersistentVolumeClaim{
		decode[corev1.PersistentVolumeClaim](t, docs[1]),
		decode[corev1.PersistentVolumeClaim](t, docs[2])}
	service := decode[corev1.Service](t, docs[3])
	job := decode[batchv1.Job](t, documents(t, "kubernetes/orders-issue.yaml")[0])

	pod := deployment.Spec.Template
	require.Equal(t, appsv1.RecreateDeploymentStrategyType, deployment.Spec.Strategy.Type)
	require.EqualValues(t, 1, *deployment.Spec.Replicas)
	require.Equal(t, pod.Labels, deployment.Spec.Selector.MatchLabels)
	require.Equal(t, pod.Labels, service.Spec.Selector)
	for _, spec := range []corev1.PodSpec{pod.Spec, job.Spec.Template.Spec} {
		volumes := map[string]corev1.Volume{}
		for _, v := range spec.Volumes {
			volumes[v.Name] = v
			if v.PersistentVolumeClaim != nil {
				require.True(t,
					slices.ContainsFunc(claims, func(c corev1.PersistentVolumeClaim) bool {
						return c.Name == v.PersistentVolumeClaim.ClaimName
					}))
			}
		}
		for _, mount := range spec.Containers[0].VolumeMounts {
			require.Contains(t, volumes, mount.Name)
		}
	}
	container := pod.Spec.Containers[0]
	arg := flags(t, container.Args)
	require.Equal(t, container.VolumeMounts[0].MountPath, filepath.Dir(arg["-keys"]),
		"a directory inside the volume")
	for _, probe := range []*corev1.Probe{
		container.StartupProbe, container.ReadinessProbe, container.LivenessProbe,
	} {
		require.Equal(t, arg["-health"], fmt.Sprintf(":%d", probe.GRPC.Port))
	}
	drain, err := time.ParseDuration(arg["-drain"])
	require.NoError(t, err)
	require.Greater(t, float64(*pod.Spec.TerminationGracePeriodSeconds), drain.Seconds()+5,
		"the drain, and the last streams")
	require.Equal(t, flags(t, job.Spec.Template.Spec.Containers[0].Args)["-keys"], arg["-keys"])

	// The containers run with their arguments, as the user and in directories such as the kubelet
	// makes them.
	n := newNode(t, "../..", "./examples/guides/service")
	for _, keys := range []string{"/var/lib/orders", "/var/lib/orders/keys"} {
		args := slices.Clone(job.Spec.Template.Spec.Containers[0].Args)
		args[slices.Index(args, "-keys="+arg["-keys"])] = "-keys=" + keys
		issue := n.container(t, args)
		out, err := issue.Output()
		if keys == "/var/lib/orders" {
			require.Error(t, err)
			require.Contains(t, fmt.Sprint(issue.Stderr), "others than its owner may enter")
			require.Contains(t, fmt.Sprint(issue.Stderr),
				"name a directory inside it, which will be made")
			continue
		}
		require.NoError(t, err, "%s", issue.Stderr)
		n.key = string(out)
	}
	// With another fsGroup, the kubelet gives everything in the volume to the group.
	require.NoError(t,
		filepath.WalkDir(n.path("/var/lib/orders/keys"),
			func(path string, d os.DirEntry, err error) error {
				require.NoError(t, err)
				if d.IsDir() {
					return os.Chmod(path, 0o770|os.ModeSetgid)
				}
				return os.Chmod(path, 0o660)
			}))

	// A restore writes to the volumes alone.
	restored := n.container(t, []string{"-keys=/var/lib/orders/restored",
		"-restore=/var/lib/orders-backups/keys", "-pepper=" + arg["-pepper"]})
	n.backUp(t, "/var/lib/orders-backups/keys")
	require.NoError(t, restored.Run(), "%s", restored.Stderr)

	serve := n.container(t, container.Args)
	require.NoError(t, serve.Start())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	probed, err := grpc.NewClient(n.health,
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer probed.Close()
	status, err := healthpb.NewHealthClient(probed).Check(ctx, &healthpb.HealthCheckRequest{},
		grpc.WaitForReady(true))
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_SERVING, status.Status)
	conn, err := grpc.NewClient(n.listen, grpc.WithTransportCredentials(n.roots),
		grpc.WithPerRPCCredentials(keycreds.New(n.key)))
	require.NoError(t, err)
	defer conn.Close()
	reply, err := testpb.NewTestServiceClient(conn).UnaryCall(ctx, &testpb.SimpleRequest{},
		grpc.WaitForReady(true))
	require.NoError(t, err)
	require.Equal(t, "admin", reply.Username)

	require.NoError(t, serve.Process.Signal(syscall.SIGTERM))
	require.NoError(t, serve.Wait(), "%s", serve.Stderr)
}

const pepper = "0123456789abcdef0123456789abcdef" // of the test

// A node has what the kubelet makes for the pod.
type node struct {
	root, program, listen, health, key string
	roots                              credentials.TransportCredentials
}

// newNode builds the program of the image from a package of a module.
func newNode(t *testing.T, module, pkg string) *node {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("NOT RUN: the containers run as another user, which only root can start")
	}
	// Not t.TempDir: the other user has to get through.
	root, err := os.MkdirTemp("", "node-*")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(root)) })
	require.NoError(t, os.Chmod(root, 0o755))
	addrs := freeAddresses(t, 2)
	n := &node{root: root, program: filepath.Join(root, "orders"), listen: addrs[0],
		health: addrs[1]}
	build := exec.Command("go", "build", "-o", n.program, pkg)
	build.Dir = module
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)

	for _, volume := range []string{
		"/var/lib/orders", "/var/lib/orders-backups", "/etc/orders/pepper", "/etc/orders/tls",
		"/etc/orders/etcd",
	} {
		require.NoError(t, os.MkdirAll(n.path(volume), 0o755))
		require.NoError(t, os.Chown(n.path(volume), 0, group))
		require.NoError(t, os.Chmod(n.path(volume), 0o775|os.ModeSetgid))
	}
	require.NoError(t, os.Mkdir(n.path("/var/lib/orders/lost+found"), 0o700))
	n.secret(t, "/etc/orders/pepper/pepper",
		[]byte(base64.StdEncoding.EncodeToString([]byte(pepper))))
	cert, certPEM, err := throwaway.Certificate()
	require.NoError(t, err)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	require.NoError(t, err)
	n.secret(t, "/etc/orders/tls/tls.crt", certPEM)
	n.secret(t, "/etc/orders/tls/tls.key",
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(certPEM))
	n.roots = credentials.NewTLS(&tls.Config{RootCAs: roots})
	return n
}

// group is the fsGroup of the pods.
const group = 65532

// secret writes a file of a volume that is a secret.
func (n *node) secret(t *testing.T, path string, content []byte) {
	t.Helper()
	require.NoError(t, os.WriteFile(n.path(path), content, 0o440))
	require.NoError(t, os.Chown(n.path(path), 0, group))
}

// freeAddresses returns n different addresses of ports that no process uses now.
func freeAddresses(t *testing.T, n int) (addrs []string) {
	t.Helper()
	ports, err := freeport.Ports(n)
	require.NoError(t, err)
	for _, port := range ports {
		addrs = append(addrs, fmt.Sprint("127.0.0.1:", port))
	}
	return addrs
}

func (n *node) path(path string) string { return filepath.Join(n.root, path) }

// backUp makes a backup of a store with the node's pepper and one key.
func (n *node) backUp(t *testing.T, path string) {
	t.Helper()
	hasher, err := hashing.HMACSHA256("2026", []byte(pepper))
	require.NoError(t, err)
	store := keystoretest.New(t, &keystore.Options{Hasher: hasher})
	keystoretest.MustCreate(t, store, keystore.Spec{Name: "restored"})
	file, err := os.Create(n.path(path))
	require.NoError(t, err)
	require.NoError(t, store.Backup(t.Context(), file))
	require.NoError(t, file.Close())
}

// readOnly starts a program as another user, on a root that is read-only except for the volumes.
const readOnly = `set -e
for volume in var/lib/orders var/lib/orders-backups; do
	mount --bind "$0/$volume" "$0/$volume"
done
for mounted in / /tmp /var/tmp /dev/shm; do
	if mountpoint -q "$mounted"; then mount -o remount,bind,ro "$mounted"; fi
done
if touch /tmp/written 2>/dev/null; then echo "the root is not read-only" >&2; exit 1; fi
exec setpriv --reuid=65532 --regid=65532 --clear-groups --no-new-privs -- "$@"`

// container returns a command with the arguments of a container, its user, and its directories.
func (n *node) container(t *testing.T, args []string) *exec.Cmd {
	t.Helper()
	args = slices.Clone(args)
	for i := range args {
		args[i] = strings.NewReplacer("=/", "="+n.root+"/", "=:50051", "="+n.listen, "=:8086",
			"="+n.health).Replace(args[i])
	}
	cmd := exec.CommandContext(t.Context(), "unshare",
		append([]string{"--mount", "sh", "-c", readOnly, n.root, n.program}, args...)...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	cmd.Stderr = new(bytes.Buffer)
	return cmd
}
