// Package hostiletest attacks a server with hostile clients on real sockets. During each attack,
// the test revokes a key, and clients with valid keys must not notice the attack.
package hostiletest
