// Package benchmarks compares grpc-api-key with its alternatives: the same work, on the same
// machine, in the same run. The package is a separate module, so that the alternatives (the peers)
// never become dependencies of a user.
//
//	cd benchmarks && go run ./report          # RESULTS.md and charts, in about 20 minutes
//	cd benchmarks && go run ./report -quick   # a check that everything works, in 2 minutes; the
//	                                          # figures are not reliable
//	cd benchmarks && go run ./report -shared etcd   # etcd/RESULTS.md: several processes on etcd
//	cd benchmarks && go test -run '^$' -bench . -count 10 ./work | tee new.txt    # for benchstat
//
// Start with package work. Each of its files contains one kind of work, and starts with a comment
// about what is measured and how. Package peers contains the peers, one file for each peer. Package
// measure takes the samples: the contestants take turns in each round, so that a disturbance of the
// machine affects all contestants alike. Package before is a program that is built with two
// versions of the store. Package report is the command.
//
// The peers need the Debian packages redis-server and postgresql. If a server is not installed, the
// report skips the peer and names the missing package.
package benchmarks
