package work

// Reasons explains each goal that is not reached, by the ID of the goal, or by the engine, a slash
// and the ID: what the profile shows, and why nothing is changed. An entry is removed once its goal
// is reached, unless noise decides whether the goal is reached. The report prints the reason with
// the figure.
var Reasons = map[string]string{
	"miss": "the difference is within the noise: the middle half of the rounds lies on both " +
		"sides of the goal, and another run reached 1.93 ×. Of a miss, the read is more than half. " +
		"The rest is to decode the record, to hash the token, and to note the use of the key.",
	"unary-noauth": "the difference is within the noise: the middle half of the rounds lies on " +
		"both sides of the goal, and other runs reached 0.984 × and 0.986 ×. The interceptor " +
		"takes 0.4 µs for a call.",
	"unary-postgres": "gRPC is the limit. Calls with no auth are the fastest possible calls, and " +
		"were 2.06 × as many as the calls with a PostgreSQL look-up in the run that took 1.94 ×. " +
		"The callers, the servers and PostgreSQL share two cores.",
	"cpu-unary": "the difference is within the noise: the middle half of the rounds lies on both " +
		"sides of the goal. The interceptor takes 0.38 µs for a call with the same key again and " +
		"again, of which Verify takes 0.18 µs. That is 1.8 % of a call of 20.6 µs. The generated " +
		"code takes a little longer with any interceptor.",
	"allocs-unary": "the interceptor makes one allocation, the context with the key. A handler " +
		"may keep the context, so it cannot be used again. The generated code of a service makes " +
		"the other two for any interceptor: a UnaryServerInfo and a handler.",
	"stream": "the difference is within the noise: the middle half of the rounds lies on both " +
		"sides of the goal, and another run reached 0.994 ×. A message costs two loads and no " +
		"allocation.",
	"creates": "one writer waits only for two concurrent syncs, of 0.1 ms each on this disk. 15 × " +
		"one writer would be 94,000 creates a second, which leaves 11 µs for each. With 64 " +
		"writers, the committer takes 3 µs for each create, and then Badger's writer takes 9 µs. " +
		"In between, the writers make the next keys, 8 µs each, on both cores. A slower disk " +
		"makes the ratio larger. Of the processor time of a create, 40 % is Badger, which writes " +
		"its log and memtable, and makes and compacts tables. 27 % is the writer, which makes " +
		"the ID, the secret, the record and the event. 10 % is the committer, and 10 % is the " +
		"way to the committer and back.",
	"creates-postgres": "4 × PostgreSQL would be 87,000 creates a second, which leaves 11 µs for " +
		"each. The committer and Badger's writer take 12 µs, one after the other: see the first " +
		"goal of creates. PostgreSQL takes 3.4 × as much processor time, but several of its " +
		"processes work at the same time, and it has no event and no index to write.",
	"creates-redis": "a create takes as much processor time as a HSET of Redis with its client, " +
		"24 µs. Redis appends one record to one file. The store writes a record, an event and an " +
		"index entry, and syncs two files, so that Open finds a damaged log. The committer and " +
		"Badger's writer work one after the other, so 1.4 of the 2 cores are busy on average.",
	"creates-cpu-before": "a create writes three entries, the record, the event and the entry of " +
		"the owner index. The version before wrote two. Badger takes 40 % of a create, and its " +
		"work follows the number of entries. Since the run that took 1.12 ×, a create reads " +
		"nothing: the read of the owner index was 13 %. The rest would have to take a third " +
		"less time to reach the goal.",
	"revoke": "the remaining cost is 0.5 µs for each stream: to lock the stream, to apply the " +
		"change, and to mark the stream as ended. An earlier version took 750 ms in total. The " +
		"store cancels the contexts afterwards, or immediately if a caller waits for the context.",
	"cached-key": "416 bytes are the cached key, of which the public Key has 304. 24 bytes are " +
		"the name: beside the hint, there is space for a name of 14 bytes. 10 bytes are the place " +
		"in the ring of the cache. 53 bytes are the use of the present minute, in a map that is " +
		"half empty at this number of keys; a flush after the minute gives these bytes back. " +
		"Without uses, 450 bytes remain. To go lower, the Key would have to lose fields, or the " +
		"cached keys themselves would have to hold the uses that are not written.",
	"list-bare": "the records are ten reads. The last uses of the ten keys take as long as three " +
		"reads, although the directory has none, and the scan of the index as long as three. The " +
		"rest is decoding the records and collecting the garbage. A list reads the records and " +
		"last uses together: one read for each took 26 × in another run.",
	"backup": "the scan is 40 % of a backup. 40 % is decoding each key, so that a damaged key is " +
		"found when the backup is made. The rest is encoding, the SHA-256 of the file, and collecting " +
		"the garbage. A second goroutine scans ahead.",
	"restore": "a restored key takes five entries: the record, an empty grave, the event, and an " +
		"entry in each index. A created key takes three, and Badger's work follows the number " +
		"of entries. Restore also reads the backup twice, to check the whole backup before the " +
		"first change, and looks for each key and its grave in the store.",
	"etcd/shared-revokeall": "three processes and three servers of etcd share two cores. The rest is " +
		"to read and to encode the keys, and to apply the changes in the two other processes, which " +
		"have their own cores in production. Other runs reached 1.18 ×.",
	"postgres/shared-revokeall": "the run revoked 10,000 keys, and not 100,000, on two cores that " +
		"other work kept busy. Three processes, the primary and the standby share the cores, and " +
		"each process reads each change. The keys of an owner took 1.14 × their " +
		"commits in the same run, with rounds from 1.03 × to 3.32 ×.",
	"postgres/shared-miss": "Verify takes some 7 µs more than a prepared SELECT of the same row: " +
		"36 µs and 29 µs in the benchmark of pgstore. The time is for the token, the digest, the " +
		"record, a context that ends with the store, and three more columns. The first miss after " +
		"a heartbeat also reads a row of the log, on each connection, which takes 4 µs. The row " +
		"proves that the server is not behind the changes that the process knows. The server is " +
		"on the loopback interface: a round trip of 100 µs more would make the ratio 1.05.",
}
