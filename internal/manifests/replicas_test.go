package manifests

import (
	"context"
	"crypto/x509"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

func TestReplicas(t *testing.T) {
	docs := documents(t, "kubernetes/orders-replicas.yaml")
	require.Len(t, docs, 4)
	deployment := decode[appsv1.Deployment](t, docs[0])
	budget := decode[policyv1.PodDisruptionBudget](t, docs[1])
	etcdBudget := decode[policyv1.PodDisruptionBudget](t, docs[2])
	service := decode[corev1.Service](t, docs[3])
	job := decode[batchv1.Job](t, documents(t, "kubernetes/orders-replicas-issue.yaml")[0])

	pod := deployment.Spec.Template
	require.Equal(t, appsv1.RollingUpdateDeploymentStrategyType, deployment.Spec.Strategy.Type)
	require.Greater(t, *deployment.Spec.Replicas, int32(1))
	for _, selector := range []map[string]string{
		deployment.Spec.Selector.MatchLabels, service.Spec.Selector, budget.Spec.Selector.MatchLabels,
		pod.Spec.TopologySpreadConstraints[0].LabelSelector.MatchLabels,
	} {
		require.Equal(t, pod.Labels, selector)
	}
	require.Equal(t, 1, budget.Spec.MaxUnavailable.IntValue())
	require.Equal(t, 1, etcdBudget.Spec.MaxUnavailable.IntValue())
	require.Equal(t, corev1.ClusterIPNone, service.Spec.ClusterIP)
	container, issuer := pod.Spec.Containers[0], job.Spec.Template.Spec.Containers[0]
	for _, spec := range []corev1.PodSpec{pod.Spec, job.Spec.Template.Spec} {
		for _, mount := range spec.Containers[0].VolumeMounts {
			require.True(t, slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool {
				return v.Name == mount.Name && v.Secret != nil
			}), mount.Name)
		}
	}
	arg := flags(t, container.Args)
	for name, value := range flags(t, issuer.Args) {
		if name != "-issue" {
			require.Equal(t, arg[name], value, name)
		}
	}
	for _, probe := range []*corev1.Probe{container.StartupProbe, container.ReadinessProbe} {
		require.Equal(t, arg["-health"], fmt.Sprintf(":%d", probe.GRPC.Port))
		require.Equal(t, "ready", *probe.GRPC.Service)
	}
	require.Equal(t, arg["-health"], fmt.Sprintf(":%d", container.LivenessProbe.GRPC.Port))
	require.Nil(t, container.LivenessProbe.GRPC.Service, "lost contact is no reason to restart")
	require.False(t, container.Resources.Requests.Cpu().IsZero())
	require.True(t, container.Resources.Limits.Cpu().IsZero(), "a limit stops the heartbeats")
	drain, err := time.ParseDuration(arg["-drain"])
	require.NoError(t, err)
	require.Greater(t, float64(*pod.Spec.TerminationGracePeriodSeconds), drain.Seconds()+5,
		"the drain, and the last streams")

	// The containers run on a real etcd.
	n := newNode(t, "../../examples/replicas", "./orders")
	e := startEtcd(t, n)
	onEtcd := func(args []string) []string {
		args = slices.Clone(args)
		args[slices.Index(args, "-etcd="+arg["-etcd"])] = "-etcd=" + e.url.String()
		return args
	}
	issue := n.container(t, onEtcd(issuer.Args))
	key, err := issue.Output()
	require.NoError(t, err, "%s", issue.Stderr)

	serve := n.container(t, onEtcd(container.Args))
	require.NoError(t, serve.Start())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	probed, err := grpc.NewClient(n.health,
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer probed.Close()
	probe := func(service string) healthpb.HealthCheckResponse_ServingStatus {
		r, err := healthpb.NewHealthClient(probed).Check(ctx,
			&healthpb.HealthCheckRequest{Service: service}, grpc.WaitForReady(true))
		require.NoError(t, err)
		return r.Status
	}
	conn, err := grpc.NewClient(n.listen, grpc.WithTransportCredentials(n.roots),
		grpc.WithPerRPCCredentials(keycreds.New(strings.TrimSpace(string(key)))))
	require.NoError(t, err)
	defer conn.Close()
	call := func() error {
		_, err := testpb.NewTestServiceClient(conn).UnaryCall(ctx, new(testpb.SimpleRequest),
			grpc.WaitForReady(true))
		return err
	}
	eventually := func(condition func() bool) {
		require.Eventually(t, condition, time.Minute, 50*time.Millisecond)
	}
	const serving = healthpb.HealthCheckResponse_SERVING
	eventually(func() bool { return probe("ready") == serving })
	require.NoError(t, call())

	// Without etcd, the pod is not ready, refuses calls, and is not restarted. Once etcd is back,
	// the pod is ready again.
	e.stop()
	eventually(func() bool { return probe("ready") != serving })
	require.Equal(t, codes.Unavailable, status.Code(call()))
	require.Equal(t, serving, probe(""))
	e.start(t)
	eventually(func() bool { return probe("ready") == serving })
	require.NoError(t, call())

	require.NoError(t, serve.Process.Signal(syscall.SIGTERM))
	require.NoError(t, serve.Wait(), "%s", serve.Stderr)
}

// An etcd is one member of etcd that requires client certificates.
type etcd struct {
	url    url.URL
	config *embed.Config
	server *embed.Etcd
}

// startEtcd starts a member, and gives the node the secret of the client.
func startEtcd(t *testing.T, n *node) *etcd {
	t.Helper()
	addrs := freeAddresses(t, 2)
	dir, e := t.TempDir(), &etcd{url: url.URL{Scheme: "https", Host: addrs[0]}}
	// The certificate is that of the server, of the client, and of the CA.
	tls, err := transport.SelfCert(zap.NewNop(), dir, []string{e.url.Host}, 1,
		x509.ExtKeyUsageClientAuth)
	require.NoError(t, err)
	cert, err := os.ReadFile(tls.CertFile)
	require.NoError(t, err)
	key, err := os.ReadFile(tls.KeyFile)
	require.NoError(t, err)
	n.secret(t, "/etc/orders/etcd/ca.crt", cert)
	n.secret(t, "/etc/orders/etcd/tls.crt", cert)
	n.secret(t, "/etc/orders/etcd/tls.key", key)

	peer := url.URL{Scheme: "http", Host: addrs[1]}
	c := embed.NewConfig()
	c.Dir = dir + "/data"
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{e.url}, []url.URL{e.url}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = tls.CertFile, tls.KeyFile
	c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.ClientCertAuth = tls.CertFile, true
	c.LogLevel, c.LogOutputs = "fatal", []string{"stderr"} // a stop logs errors
	e.config = c
	e.start(t)
	t.Cleanup(e.stop)
	return e
}

func (e *etcd) start(t *testing.T) {
	t.Helper()
	var err error
	e.server, err = embed.StartEtcd(e.config)
	require.NoError(t, err)
	select {
	case <-e.server.Server.ReadyNotify():
	case <-time.After(time.Minute):
		require.Fail(t, "etcd is not ready")
	}
}

// stop stops the member, which keeps its data.
func (e *etcd) stop() {
	if e.server != nil {
		e.server.Close()
		e.server = nil
	}
}
