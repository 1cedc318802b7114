package cluster

// A Variant is a set of errors in the protocol. The correct protocol is the zero Variant. Tests use
// the other variants to show that the tests would detect such an error.
type Variant uint16

const (
	GateAlwaysOpen Variant = 1 << iota // once open, the gate never closes
	ReturnEarly                        // Barrier waits for no ack
	EvictEarly                         // a member is evicted after D/4
	unconfirmed                        // a heartbeat that was delivered is a proof
	flushEarly                         // the cache is flushed before the member record is written
	byRevision                         // a heartbeat is identified by the revision of the record
	beganLate                          // a heartbeat counts from the end of its write
	keepFloor                          // the header does not carry the floors of gone members
)

func (v Variant) has(wrong Variant) bool { return v&wrong != 0 }
