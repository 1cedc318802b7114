package keystore

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Backups that are whole, by their checksum, with one record that this version would not have written.
func TestBackupsThatNobodyWrote(t *testing.T) {
	for name, tt := range map[string]struct {
		record *record.Record
		want   error
	}{
		"of a later version":     {&record.Record{Format: record.Format + 1, Status: record.Status_STATUS_ACTIVE}, ErrInvalid},
		"purged, with a network": {&record.Record{Format: 1, Status: record.Status_STATUS_PURGED, PurgedAt: 1, AllowedNetworks: []string{"x"}}, ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			value, err := proto.Marshal(tt.record)
			require.NoError(t, err)
			frame, err := proto.Marshal(&record.Saved{Key: storageKey(token.ID{1}), Value: value, Revision: 2})
			require.NoError(t, err)
			b := append([]byte(backupMagic), backupForm)
			b = binary.AppendUvarint(b, uint64(len(frame)))
			b = append(append(b, frame...), 0)
			b = binary.BigEndian.AppendUint64(b, 1)
			sum := sha256.Sum256(b)
			s, err := New(backendtest.NewMemory(), nil)
			require.NoError(t, err)
			defer s.Close()
			require.ErrorIs(t, s.Restore(t.Context(), bytes.NewReader(append(b, sum[:]...))), tt.want)
		})
	}
}
