package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/etcd/server/v3/embed"

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// startEtcd starts an etcd of three members on this machine. In production, the members run on
// separate machines. startEtcd returns the flags with which a server finds the members.
func (d *demo) startEtcd(ctx context.Context) (flags []string, err error) {
	ports, err := freeport.Ports(6)
	if err != nil {
		return nil, err
	}
	var clients, peers, cluster []string
	for i := range 3 {
		clients = append(clients, fmt.Sprint("http://127.0.0.1:", ports[2*i]))
		peers = append(peers, fmt.Sprint("http://127.0.0.1:", ports[2*i+1]))
		cluster = append(cluster, fmt.Sprintf("etcd-%d=%s", i, peers[i]))
	}
	var members []*process
	for i := range 3 {
		name := fmt.Sprint("etcd-", i)
		m, err := d.start("member", name, filepath.Join(d.dir, name), clients[i], peers[i],
			strings.Join(cluster, ","))
		if err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	for i, m := range members {
		if _, err := m.answer(ctx, "ready"); err != nil {
			return nil, fmt.Errorf("etcd: %w", err)
		}
		say("etcd-%d  %s  process %d", i, clients[i], m.cmd.Process.Pid)
	}
	return []string{"-engine=etcd", "-etcd=" + strings.Join(clients, ",")}, nil
}

// runMember runs one member of etcd until the standard input ends. The args are the name, the
// directory, the URL for clients, the URL for other members, and all members.
func runMember(args []string) error {
	if len(args) != 5 {
		return errors.New("a member of etcd has five arguments")
	}
	client, err := url.Parse(args[2])
	if err != nil {
		return err
	}
	peer, err := url.Parse(args[3])
	if err != nil {
		return err
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = args[0], args[1], args[4]
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	c.LogLevel, c.LogOutputs = "error", []string{"stderr"}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	defer e.Close()
	go func() {
		<-e.Server.ReadyNotify()
		fmt.Println("ready")
	}()
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case err := <-e.Err():
		return err
	}
}
