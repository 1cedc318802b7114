package server

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// engines are the storages that servers can share. An engine connects to the storage. The function
// that an engine returns ends the connection, after the backend is closed.
var engines = map[string]func(context.Context, *config) (backend.Backend, func() error, error){
	"etcd": func(ctx context.Context, c *config) (backend.Backend, func() error, error) {
		return c.etcd.open(ctx)
	},
}

// An etcdConfig says how to reach etcd, and where the keys are.
type etcdConfig struct {
	endpoints, prefix string
	tls               transport.TLSInfo
}

func (c *etcdConfig) addTo(flags *flag.FlagSet) {
	flags.StringVar(&c.endpoints, "etcd", "",
		"URLs of all members of etcd, with commas between them")
	flags.StringVar(&c.prefix, "prefix", "/apikeys/orders/", "prefix of the keys in etcd")
	flags.StringVar(&c.tls.TrustedCAFile, "etcd-ca", "", "PEM file of the CA of etcd's servers")
	flags.StringVar(&c.tls.CertFile, "etcd-cert", "", "PEM file of the client certificate")
	flags.StringVar(&c.tls.KeyFile, "etcd-cert-key", "", "private key of -etcd-cert")
}

// open connects to etcd. A client certificate that is renewed is read again.
func (c *etcdConfig) open(ctx context.Context) (backend.Backend, func() error, error) {
	if c.endpoints == "" {
		return nil, nil, errors.New("-etcd must name the members of etcd: see -help")
	}
	var config *tls.Config
	if c.tls.TrustedCAFile != "" {
		var err error
		if config, err = c.tls.ClientConfig(); err != nil {
			return nil, nil, fmt.Errorf("-etcd-ca, -etcd-cert and -etcd-cert-key: %w", err)
		}
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(c.endpoints, ","),
		TLS:                  config,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		PermitWithoutStream:  true,
	})
	if err != nil {
		return nil, nil, err
	}
	b, err := etcdstore.Open(ctx, client, c.prefix, nil)
	if err != nil {
		return nil, nil, errors.Join(err, client.Close())
	}
	return b, client.Close, nil
}
