package keystore

// A variant is a set of errors in how a Store works with other processes. The correct Store is the
// zero variant. Tests use the other variants to show that the tests would detect such an error.
type variant uint8

const (
	noSecondLook variant = 1 << iota // Bind does not ask the gate after the registration
	noGuard                          // a change does not Check the guard entry
)

func (v variant) has(wrong variant) bool { return v&wrong != 0 }
