// Package benchmarks measures grpc-api-key beside what its users would otherwise run: on the same work, on the same
// machine, in the same run. It is a module of its own, so that none of its peers reaches a user's module graph.
//
//	cd benchmarks && go run ./report          # all, in about a quarter of an hour: RESULTS.md and the charts
//	cd benchmarks && go run ./report -quick   # that everything works, in a minute or two: the figures say little
//	cd benchmarks && go test -run '^$' -bench . -count 10 ./work | tee new.txt    # for benchstat
//
// Start reading in package work, which has a file for each kind of work and at its head what is measured there and how.
// The peers are in package peers, each in a file. Package measure takes the samples: things that are compared take turns,
// round by round, so that whatever else the machine does happens to all of them alike. Package report is the command.
package benchmarks
