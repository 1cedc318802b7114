// Package etcd is the engine of servers that share their keys in etcd.
package etcd

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

// An Engine says how to reach etcd, and where the keys are. An Engine is a server.Engine.
type Engine struct {
	endpoints, prefix string
	tls               transport.TLSInfo
}

// Name returns the name for the flag -engine.
func (e *Engine) Name() string { return "etcd" }

// AddFlags adds the flags of the engine.
func (e *Engine) AddFlags(flags *flag.FlagSet) {
	flags.StringVar(&e.endpoints, "etcd", "",
		"URLs of all members of etcd, with commas between them")
	flags.StringVar(&e.prefix, "prefix", "/apikeys/orders/", "prefix of the keys in etcd")
	flags.StringVar(&e.tls.TrustedCAFile, "etcd-ca", "", "PEM file of the CA of etcd's servers")
	flags.StringVar(&e.tls.CertFile, "etcd-cert", "", "PEM file of the client certificate")
	flags.StringVar(&e.tls.KeyFile, "etcd-cert-key", "", "private key of -etcd-cert")
}

// Open connects to etcd. A client certificate that is renewed is read again.
func (e *Engine) Open(ctx context.Context) (backend.Backend, func() error, error) {
	if e.endpoints == "" {
		return nil, nil, errors.New("-etcd must name the members of etcd: see -help")
	}
	var config *tls.Config
	if e.tls.TrustedCAFile != "" {
		var err error
		if config, err = e.tls.ClientConfig(); err != nil {
			return nil, nil, fmt.Errorf("-etcd-ca, -etcd-cert and -etcd-cert-key: %w", err)
		}
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:            strings.Split(e.endpoints, ","),
		TLS:                  config,
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
		PermitWithoutStream:  true,
	})
	if err != nil {
		return nil, nil, err
	}
	b, err := etcdstore.Open(ctx, client, e.prefix, nil)
	if err != nil {
		return nil, nil, errors.Join(err, client.Close())
	}
	return b, client.Close, nil
}
