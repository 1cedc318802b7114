// Package badgerfile reads Badger's files: the logs, the tables and the manifest, and knows their
// names. The package reads each file as Badger v4.9 does, but reports damage where Badger is silent
// or ends the process. Whatever a file holds, a reader ends without a panic.
//
// Package badgerfile writes nothing, and decides nothing: another package decides what damage
// means. The package knows keys and values, and does not know what a store writes into them: of
// package layout it uses only the type Write. The package may not know the file LAST, the survey
// and the engine.
package badgerfile
