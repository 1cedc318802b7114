package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"

	"google.golang.org/grpc/credentials"
)

// PeerCredentials returns transport credentials for a gRPC server on a unix socket, see ListenUnix.
// The operating system tells which user has connected. PeerCredentials refuses every connection of
// another user than the user of this process, root, and the users of AllowUIDs and AllowGIDs. The
// refused client sees that the connection is closed.
//
// The user of an accepted connection is the principal of the calls, unix:alice(1000), and has no
// ceiling. The connection counts as private, so interceptor.RequireTLS accepts the connection.
// Clients use the local or the insecure credentials of gRPC.
//
// PeerCredentials refuses every connection that is no unix socket. On a system other than Linux,
// macOS and FreeBSD, PeerCredentials refuses every connection.
func PeerCredentials(opts ...SocketOption) credentials.TransportCredentials {
	return &peerCredentials{newSocketConfig(opts)}
}

type peerCredentials struct{ config socketConfig }

// A peerUser is the AuthInfo of a connection on a unix socket.
type peerUser struct {
	credentials.CommonAuthInfo
	uid  int
	gids []int
	name string // empty: the user has no name
}

// AuthType implements credentials.AuthInfo.
func (peerUser) AuthType() string { return "unix" }

// ServerHandshake implements credentials.TransportCredentials.
func (c *peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	u, err := peerOf(conn)
	if err == nil && !c.allows(u) {
		err = fmt.Errorf("admin: the user %d may not use the socket: see AllowUIDs and AllowGIDs",
			u.uid)
	}
	if err != nil {
		if c.config.refused != nil {
			c.config.refused(err)
		}
		return nil, nil, err
	}
	if known, err := user.LookupId(strconv.Itoa(u.uid)); err == nil {
		u.name = known.Username
	}
	u.SecurityLevel = credentials.PrivacyAndIntegrity
	return conn, u, nil
}

func (c *peerCredentials) allows(u peerUser) bool {
	return u.uid == 0 || u.uid == os.Geteuid() || slices.Contains(c.config.uids, u.uid) ||
		slices.ContainsFunc(u.gids, func(gid int) bool { return slices.Contains(c.config.gids, gid) })
}

// peerOf returns the user at the other end of a connection, without the name.
func peerOf(conn net.Conn) (u peerUser, err error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return u, fmt.Errorf("admin: PeerCredentials on a connection of type %T: use ListenUnix",
			conn)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return u, err
	}
	failed := raw.Control(func(fd uintptr) { u, err = peerOfSocket(int(fd)) })
	if err := errors.Join(failed, err); err != nil {
		return peerUser{}, fmt.Errorf("admin: the user of the connection is not known: %w", err)
	}
	return u, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (*peerCredentials) ClientHandshake(
	context.Context, string, net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("admin: PeerCredentials are for servers: " +
		"use the package google.golang.org/grpc/credentials/local in a client")
}

// Info implements credentials.TransportCredentials.
func (*peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

// Clone implements credentials.TransportCredentials.
func (c *peerCredentials) Clone() credentials.TransportCredentials {
	clone := *c
	return &clone
}

// OverrideServerName implements credentials.TransportCredentials.
func (*peerCredentials) OverrideServerName(string) error { return nil }
