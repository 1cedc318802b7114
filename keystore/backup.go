package keystore

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/grpc-api-key/grpc-api-key/internal/backupfile"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Backup writes a backup of all keys to w. The backup contains the digests of the secrets, the
// times of last use, the remaining credits, and the check values of the Hasher (see
// Options.Hasher). The backup contains no events and no secrets. Credits that the processes have
// leased at the time do not remain: see Credits.
//
// All keys are as of one moment between the call and the first write to w. The store keeps serving
// during the backup, and w may be slow.
//
// Backup returns an error of w unchanged. The output is then useless: Restore refuses an
// incomplete backup.
func (s *Store) Backup(ctx context.Context, w io.Writer) error {
	if w == nil {
		return invalid("the writer of the backup is nil")
	}
	if err := s.ready(ctx); err != nil {
		return err
	}
	err := s.flushUsage(ctx)
	if errors.Is(err, backend.ErrFull) || errors.Is(err, backend.ErrConflict) {
		s.log.Warn("API key store could not write when keys were last used, "+
			"and backs up what it has", "error", err)
	} else if err != nil {
		return err
	}
	var out *backupfile.Writer
	checked := new(record.Record) // the memory of each record, so that the collector has less work
	snapshot := s.backend.Snapshot(ctx, []byte{graveSpace}, []byte{usageSpace + 1})
	for e, err := range readAhead(snapshot) {
		if err != nil {
			return s.scanError(ctx, "backup", err)
		}
		switch e.Key[0] {
		case graveSpace:
			var grave *keyRecord
			if grave, err = parseGrave(e); err == nil && grave.record == nil {
				continue
			}
		case checkSpace:
			_, err = parseCheck(e)
		case keySpace:
			_, err = parseKeyRecordTo(checked, e)
		case creditSpace:
			_, err = parseBalance(e)
		case usageSpace:
		default:
			continue
		}
		if err != nil {
			return fmt.Errorf("keystore: backup: %w", err)
		}
		if out == nil {
			form, err := s.formOf(ctx, e.Key[0])
			if err != nil {
				return err
			}
			out = backupfile.NewWriter(w, form)
		}
		if err := out.Write(e); err != nil {
			return err
		}
	}
	if out == nil {
		out = backupfile.NewWriter(w, backupfile.FormKeys)
	}
	return out.Close()
}

// formOf returns the form of a backup whose first entry is of a key space. Graves are before check
// values, and check values are before balances and keys. A balance may come later in the backup.
// Only Purge deletes balances, so the store still has the balance.
func (s *Store) formOf(ctx context.Context, space byte) (backupfile.Form, error) {
	from, to := spaceOf(creditSpace)
	for _, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return 0, s.scanError(ctx, "backup", err)
		}
		return backupfile.FormCredits, nil
	}
	switch space {
	case graveSpace:
		return backupfile.FormGraves, nil
	case checkSpace:
		return backupfile.FormChecks, nil
	default:
		return backupfile.FormKeys, nil
	}
}
