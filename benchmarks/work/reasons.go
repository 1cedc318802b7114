package work

// Reasons say why a goal is not reached, by its ID, for as long as it is not: what the profile shows, and why it stays as it
// is. The report puts them beside the figure.
var Reasons = map[string]string{
	"hit": "alone in a process it is 1.29 × (`go test -run '^$' -bench VerifyHit$ ./keystore`, 193 ns of which the hash is 150). " +
		"Beside the peers of this report, whose turns leave the processor's caches and predictors to it as they are, what stands " +
		"above the hash costs twice as much. The profile has the hash at two thirds, and then the load of the entry and the ID.",
	"creates": "the 64 writers use up both cores: some 70 µs of processor time for each create, of which Badger and the kernel have " +
		"more than half, and no wait for the disk is left. One writer waits for two syncs at once, of 0.2 ms each on this disk; a " +
		"slower disk makes the ratio larger.",
	"revoke": "what is left is 0.6 µs for each stream: its lock, the judging of the change, and the mark that ends it; before, it " +
		"was 750 ms in all. The contexts themselves are cancelled afterwards, unless somebody waits for them.",
	"open-1m": "the checksums of the tables are computed where the files are mapped, and mapping their pages costs as much again; " +
		"copying them instead cost more, and so did mapping them all at once. Against 2 × (an empty store + checksumming) it is 0.65 ×.",
}
