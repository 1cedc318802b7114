// Package sharedlab tests package etcdstore against real etcd servers. Each member of etcd runs in a
// separate process, so a test can stop, kill, pause and restore a member. A Network puts TCP
// proxies between a store and the members, and cuts the connections in one direction or both. The
// package is a separate module, so that etcd's server never reaches the module graph of a user.
//
// TestChaos injects faults while stores revoke keys, and checks that no store admits a key once
// Revoke has returned. For a long run:
//
//	GOWORK=off go test -race -run 'Chaos$' -v -timeout 0 -duration 1h
//
// A program that starts members calls RunMember at the beginning of main, or of TestMain.
package sharedlab
