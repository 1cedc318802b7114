package keystore

// A variant is a set of errors, most of them in how a Store works with other processes. The correct
// Store is the zero variant. Tests use the other variants to show that the tests would detect such
// an error.
type variant uint16

const (
	noSecondLook     variant = 1 << iota // Bind does not ask the gate after the registration
	noGuard                              // a change does not Check the guard entry
	noLastStamp                          // a stamp is not after the last stamp of its key
	noGrave                              // no change writes or checks a grave
	noRestoreBarrier                     // Restore does not wait for the other processes
	noImportStamp                        // a batch of Import has no stamp while it reads
	noCreditNote                         // no account notes the changes of other processes
	blindCredits                         // a write of a balance whose answer is lost is made again
	noCreditHold                         // leases remain valid over a gap in the feed
	blindGiveBack                        // leases are given back to any grant
	blindBalance                         // a write of a balance overwrites the changes of others
	noRefillEnd                          // a lease outlives the refill
)

func (v variant) has(wrong variant) bool { return v&wrong != 0 }

// isWrong reports whether the store has an error.
func (s *Store) isWrong(v variant) bool {
	return s.wrong.has(v) || s.processes != nil && s.processes.wrong.has(v)
}
