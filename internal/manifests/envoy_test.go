package manifests

import (
	"os"
	"testing"
	"time"

	bootstrappb "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	routerpb "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	managerpb "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tlspb "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	upstreampb "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/protojson"
	"sigs.k8s.io/yaml"
)

// The file has no field that Envoy does not know, and its values are within Envoy's own rules.
// Envoy itself does not run here.
func TestEnvoy(t *testing.T) {
	text, err := os.ReadFile(guides + "envoy/envoy.yaml")
	require.NoError(t, err)
	json, err := yaml.YAMLToJSONStrict(text)
	require.NoError(t, err)
	var bootstrap bootstrappb.Bootstrap
	require.NoError(t, protojson.Unmarshal(json, &bootstrap))
	require.NoError(t, bootstrap.ValidateAll())

	// The rules of a message inside an Any are those of the message.
	chain := bootstrap.StaticResources.Listeners[0].FilterChains[0]
	var tls tlspb.DownstreamTlsContext
	require.NoError(t, chain.TransportSocket.GetTypedConfig().UnmarshalTo(&tls))
	require.NoError(t, tls.ValidateAll())
	var manager managerpb.HttpConnectionManager
	require.NoError(t, chain.Filters[0].GetTypedConfig().UnmarshalTo(&manager))
	require.NoError(t, manager.ValidateAll())
	var router routerpb.Router
	require.NoError(t, manager.HttpFilters[0].GetTypedConfig().UnmarshalTo(&router))
	cluster := bootstrap.StaticResources.Clusters[0]
	var upstream upstreampb.HttpProtocolOptions
	const protocol = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	require.NoError(t, cluster.TypedExtensionProtocolOptions[protocol].UnmarshalTo(&upstream))
	require.NoError(t, upstream.ValidateAll())
	require.NotNil(t, upstream.GetExplicitHttpConfig().GetHttp2ProtocolOptions(),
		"gRPC needs HTTP/2")

	// What the page says.
	require.True(t, manager.UseRemoteAddress.Value)
	require.Equal(t, time.Duration(0), manager.StreamIdleTimeout.AsDuration())
	require.NotNil(t, manager.StreamIdleTimeout, "nil is five minutes")
	route := manager.GetRouteConfig().VirtualHosts[0].Routes[0].GetRoute()
	require.Equal(t, cluster.Name, route.GetCluster())
	require.NotNil(t, route.Timeout, "nil is 15 seconds")
	require.Equal(t, time.Duration(0), route.Timeout.AsDuration())
}
