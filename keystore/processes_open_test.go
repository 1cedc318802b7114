package keystore

import (
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A processVariant says what is wrong with a store of several processes.
type processVariant struct {
	protocol cluster.Variant
	store    variant
}

var rightProcesses processVariant

// openProcess is New, for a process with errors and with its own clocks. A nil clock means the
// clocks of the machine.
func openProcess(
	b backend.Backend, opts *Options, wrong processVariant, clock func() cluster.Instant,
) (*Store, error) {
	s, err := newStore(opts)
	if err != nil {
		return nil, err
	}
	if clock != nil {
		s.sequencer.Clock = func() int64 { return clock().Wall }
	}
	s.configureCluster = func(cfg *cluster.Config) {
		cfg.Wrong, cfg.Clock = wrong.protocol, clock
		s.processes.wrong = wrong.store // before the feed reads the variant
	}
	if err := s.start(guardBackend(b, s.panics)); err != nil {
		return nil, err
	}
	return s, nil
}

func isFresh(s *Store) bool { return s.isFresh() }
