// Package importer reads the keys that other systems have exported, for [keystore.Store.Import],
// and has the formats of their tokens, for [keystore.Options].
//
// A program that takes the keys of Laravel Sanctum opens its store with the formats of Sanctum, as
// long as clients have tokens of Sanctum:
//
//	store, err := keystore.Open(dir, &keystore.Options{Legacy: importer.Sanctum().Formats()})
//	...
//	result, err := store.Import(ctx, importer.Sanctum().Read(file, nil), nil)
//
// The command apikeyctl import does the same. Digests of djangorestframework-api-key and of
// flask-api-key need a [hashing.Keyring] too: see [DRF] and [FlaskAPIKey].
//
// # Exports
//
// An export is a CSV file with a line of column names, or has one JSON object on each line, as
// databases write both. Names of columns may have any case, and may have any order. Columns that
// the system does not have are ignored. Times are RFC 3339, the text of a database, or seconds or
// milliseconds since 1970. An empty value, NULL and \N mean that there is no value.
//
// A row with a value that cannot be understood is refused, and not imported without the value: the
// key could permit more than in the other system.
package importer
