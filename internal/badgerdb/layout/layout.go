// Package layout is the format of what a store writes into Badger: the entries, and the summary of
// the store after each commit. The package turns changes into bytes and bytes into entries.
//
// Package layout knows nothing of Badger's files, of the disk, and of the engine. An entry is a key
// and a value to the package, whatever the meaning of the value.
package layout
