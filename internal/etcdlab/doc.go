// Package etcdlab tests package etcdstore against real etcd servers. Each member of etcd runs in a
// separate process, so a test can stop, kill, pause and restore a member. The package is a separate
// module, so that etcd's server never reaches the module graph of a user.
//
// A program that starts members calls RunMember at the beginning of main, or of TestMain.
package etcdlab
