package keystore

import "log/slog"

var _ slog.LogValuer = Key{}

// LogValue makes package slog log a key as a group: id, name, owner, hint, and the status at the
// time of the call. LogValue leaves out the metadata, which may be confidential. Invisible
// characters of the name and the owner are escaped, for example as \n and \u202e.
func (k Key) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("id", k.ID),
		slog.String("name", escaped(k.Name, maxRecordSize)),
		slog.String("owner", escaped(k.Owner, maxRecordSize)),
		slog.String("hint", k.Hint),
		slog.String("status", k.Status().String()),
	)
}
