package work

// Reasons explains each goal that is not reached, by the ID of the goal: what the profile shows,
// and why nothing is changed. An entry is removed once its goal is reached. The report prints the
// reason with the figure.
var Reasons = map[string]string{
	"scale-hot": "this is the limit of the machine: SHA-256 alone, which shares no data, scales " +
		"no better in the same run (see below), and another run reached 1.97 ×. A hit writes to " +
		"no memory that another core reads.",
	"unary-noauth": "the difference is within the noise: the middle half of the rounds lies on " +
		"both sides of the goal, and another run reached 0.984 ×. A call makes four more " +
		"allocations; two of these are the copy of the metadata without the key.",
	"stream": "the difference is within the noise: the middle half of the rounds lies on both " +
		"sides of the goal, and another run reached 0.994 ×. A message costs two loads and no " +
		"allocation.",
	"creates": "the 64 writers use up both cores: each create takes some 70 µs of processor " +
		"time. Badger and the kernel take more than half of this time, and no writer waits for " +
		"the disk. One writer waits for two concurrent syncs, of 0.2 ms each on this disk. A " +
		"slower disk makes the ratio larger.",
	"revoke": "the remaining cost is 0.6 µs for each stream: to lock the stream, to apply the " +
		"change, and to mark the stream as ended. An earlier version took 750 ms in total. The " +
		"store cancels the contexts afterwards, or immediately if a caller waits for the context.",
	"open-1m": "the store computes the checksums of the tables in the mapped files, and mapping " +
		"the pages costs as much again. To copy the pages cost more, and so did mapping all " +
		"pages at the same time.",
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
}
