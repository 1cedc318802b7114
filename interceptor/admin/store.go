package admin

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/internal/errinfo"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A storeService is the StoreService of a Server.
type storeService struct {
	adminpb.UnimplementedStoreServiceServer
	*Server
}

func (s *storeService) GetStats(
	ctx context.Context, r *adminpb.GetStatsRequest,
) (*adminpb.GetStatsResponse, error) {
	return answer(s.Server, ctx, adminpb.StoreService_GetStats_FullMethodName, r,
		func(c *call) (*adminpb.GetStatsResponse, error) {
			counts, err := c.inventory.Counts(c.ctx)
			if err != nil {
				return nil, err
			}
			st := c.store.Stats()
			response := &adminpb.GetStatsResponse{
				Hits:        int64(st.Hits),
				Misses:      int64(st.Misses),
				Admitted:    int64(st.Admitted),
				Refused:     int64(st.Refused),
				Refusals:    countProtos(st.Refusals),
				Changes:     countProtos(st.Changes),
				Ended:       countProtos(st.Ended),
				Processes:   count32(st.Processes),
				Fresh:       st.Fresh,
				CachedKeys:  int64(st.Cached),
				LiveStreams: int64(st.Live),
				Keys:        counts.ByStatus,
				CountedTime: timestamppb.New(counts.At),
				StartTime:   timestamppb.New(c.started),
				Leases:      int64(st.Leases),
				Exhausted:   int64(st.Exhausted),
			}
			if st.Outdated >= 0 {
				outdated := int64(st.Outdated)
				response.OutdatedDigests = &outdated
			}
			return response, nil
		})
}

// countProtos returns counts by a word.
func countProtos[Word ~string](counts map[Word]uint64) map[string]int64 {
	protos := make(map[string]int64, len(counts))
	for word, n := range counts {
		protos[string(word)] = int64(n)
	}
	return protos
}

func (s *storeService) PurgeKeys(
	ctx context.Context, r *adminpb.PurgeKeysRequest,
) (*adminpb.PurgeKeysResponse, error) {
	return answer(s.Server, ctx, adminpb.StoreService_PurgeKeys_FullMethodName, r,
		func(c *call) (*adminpb.PurgeKeysResponse, error) {
			before, err := timeOf("before", r.Before)
			if err != nil {
				return nil, err
			}
			if before.IsZero() || before.After(time.Now()) {
				return nil, invalid("before is unset or in the future: it has to be in the past")
			}
			purge := c.store.Purge
			if r.ValidateOnly {
				purge = c.countDead
			}
			n, err := purge(c.ctx, before)
			if err != nil {
				return nil, err
			}
			return &adminpb.PurgeKeysResponse{Purged: int64(n)}, nil
		})
}

// countDead returns the number of keys that Purge would remove.
func (c *call) countDead(ctx context.Context, before time.Time) (n int, err error) {
	for key, err := range c.store.List(ctx, keystore.Query{}) {
		if err != nil {
			return n, err
		}
		if !key.RevokedAt.IsZero() && key.RevokedAt.Before(before) ||
			!key.ExpiresAt.IsZero() && key.ExpiresAt.Before(before) {
			n++
		}
	}
	return n, nil
}

func (s *storeService) CheckIntegrity(
	ctx context.Context, r *adminpb.CheckIntegrityRequest,
) (*adminpb.CheckIntegrityResponse, error) {
	return answer(s.Server, ctx, adminpb.StoreService_CheckIntegrity_FullMethodName, r,
		func(c *call) (*adminpb.CheckIntegrityResponse, error) {
			if err := c.store.CheckIntegrity(c.ctx); err != nil {
				return nil, err
			}
			return new(adminpb.CheckIntegrityResponse), nil
		})
}

// partSize is the size of the parts of a backup, in bytes.
const partSize = 64 << 10

func (s *storeService) Backup(
	r *adminpb.BackupRequest, stream grpc.ServerStreamingServer[adminpb.BackupResponse],
) error {
	_, err := answer(s.Server, stream.Context(), adminpb.StoreService_Backup_FullMethodName, r,
		func(c *call) (struct{}, error) {
			w := &partWriter{send: func(part []byte) error {
				if stream.Send(&adminpb.BackupResponse{Data: part}) != nil {
					return context.Canceled // the client, or the stream, has gone
				}
				return nil
			}}
			err := c.store.Backup(c.ctx, w)
			if err == nil {
				err = w.flush()
			}
			return struct{}{}, err
		})
	return err
}

// A partWriter sends what is written to it in parts of partSize.
type partWriter struct {
	send func(part []byte) error
	part []byte
}

func (w *partWriter) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		n := min(len(rest), partSize-len(w.part))
		w.part, rest = append(w.part, rest[:n]...), rest[n:]
		if len(w.part) == partSize {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return len(p), nil
}

// flush sends the last part. gRPC may keep the part, so the next part is another slice.
func (w *partWriter) flush() error {
	if len(w.part) == 0 {
		return nil
	}
	part := w.part
	w.part = make([]byte, 0, partSize)
	return w.send(part)
}

func (s *storeService) Restore(
	stream grpc.ClientStreamingServer[adminpb.RestoreRequest, adminpb.RestoreResponse],
) error {
	_, err := answer(s.Server, stream.Context(), adminpb.StoreService_Restore_FullMethodName, nil,
		func(c *call) (struct{}, error) {
			if err := c.restore(stream); err != nil {
				return struct{}{}, err
			}
			return struct{}{}, stream.SendAndClose(new(adminpb.RestoreResponse))
		})
	return err
}

// restore keeps the backup in a file without a name: the store reads the backup twice, and a backup
// may be larger than the memory. The backup holds digests, so no other user may read the file.
func (c *call) restore(
	stream grpc.ClientStreamingServer[adminpb.RestoreRequest, adminpb.RestoreResponse],
) error {
	file, err := os.CreateTemp("", "apikeys-restore-") // has mode 0600
	if err != nil {
		return errNoTemp(err)
	}
	defer os.Remove(file.Name()) // for systems that cannot remove an open file
	defer file.Close()
	_ = os.Remove(file.Name())
	for {
		part, err := stream.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			return context.Canceled // the client has gone
		}
		if _, err := file.Write(part.Data); err != nil {
			return errNoTemp(err)
		}
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return errNoTemp(err)
	}
	err = c.store.Restore(c.ctx, file)
	if errors.Is(err, keystore.ErrCorrupt) {
		return refuse(codes.DataLoss, "BACKUP_CORRUPT",
			withoutOperation(damageText(err)), nil)
	}
	return err
}

// errNoTemp is the error if the server cannot keep a backup.
func errNoTemp(cause error) error {
	return &refusal{
		status: errinfo.New(codes.Unavailable, "STORE_FULL",
			"the server cannot keep the backup in its directory for temporary files, and nothing "+
				"was changed: make space there, or set TMPDIR", nil),
		cause: cause,
	}
}
