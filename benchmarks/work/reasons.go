package work

// Reasons say why a goal is not reached, by its ID, for as long as it is not: what the profile shows, and why it stays as it
// is. The report puts them beside the figure.
var Reasons = map[string]string{
	"scale-hot": "so much for this machine: SHA-256 alone, which shares nothing, scales no better in the same run (see below), and " +
		"another run had 1.97 ×. A hit writes to no memory that another core reads.",
	"unary-noauth": "it is within the noise: the middle half of the rounds lies on both sides of the goal, and another run had " +
		"0.984 ×. A call has four allocations more, two of them the copy of its metadata without the key.",
	"stream": "it is within the noise: the middle half of the rounds lies on both sides of the goal, and another run had 0.994 ×. A " +
		"message costs two loads and no allocation.",
	"creates": "the 64 writers use up both cores: some 70 µs of processor time for each create, of which Badger and the kernel have " +
		"more than half, and no wait for the disk is left. One writer waits for two syncs at once, of 0.2 ms each on this disk; a " +
		"slower disk makes the ratio larger.",
	"revoke": "what is left is 0.6 µs for each stream: its lock, the judging of the change, and the mark that ends it; before, it " +
		"was 750 ms in all. The contexts themselves are cancelled afterwards, unless somebody waits for them.",
	"open-1m": "the checksums of the tables are computed where the files are mapped, and mapping their pages costs as much again; " +
		"copying them instead cost more, and so did mapping them all at once. Against 2 × (an empty store + checksumming) it is 0.65 ×.",
}
