// Package hostiletest runs a server among clients that mean harm, on real sockets: while they are at it, a key is
// revoked, and clients with good keys must notice nothing.
package hostiletest
