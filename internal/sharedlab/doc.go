// Package sharedlab tests the stores that several processes share, against real servers. Each
// server and each store of the chaos runs in a separate process, so a test can stop, kill, pause
// and restore them. A Network puts TCP proxies between a store and the servers. As root on Linux, a
// store may also be in a separate network namespace, in which the kernel drops packets. The package
// is a separate module, so that no server reaches the module graph of a user.
//
// TestChaos injects faults while the stores revoke keys. It checks that no store admits a key once
// Revoke has returned, that no message passes on a stream of the key, and that no store denies a
// good key. TestChaosCatches has the controls: protocols that are wrong, and that the same checks
// must catch. A long run writes a table of what was injected and what was seen:
//
//	GOWORK=off go test -run 'Chaos$' -v -timeout 0 -engine etcd -duration 1h -freshness 3s
//
// The engines are etcd, and PostgreSQL with a standby (-engine postgres). An Engine has what the
// chaos must know about the servers. To run the chaos on another engine, implement Engine, and add
// the engine to openers.
//
// A program that starts servers calls RunChild at the beginning of main, or of TestMain.
package sharedlab
