// Package crashtest is the laboratory in which stores are killed, cut off from power, damaged, lied to and starved, and
// looked at afterwards. It holds tests only.
//
// Each test runs a victim, which is the test binary itself, started again, and knows from its reports what the store has
// acknowledged. That is the oracle: it outlives every process, and what was acknowledged in one cycle has to hold in each
// later one: no key lost, none back from the dead, no change undone, no event without its change. A change that was under
// way when the victim ended may have happened or not.
//
//	disaster                    what is guaranteed                            go test ./internal/crashtest -timeout 0 -run
//	kill -9                     all that was acknowledged is there            Kill -cycles 1000
//	power loss: ext4 on a       the same; the control, without syncs,         PowerLoss -powercuts 200
//	  loop device, shut down    loses
//	damage to any file: bits,   Open refuses and changes nothing, or all is   Corruption -corruptions 10000
//	  pages, stretches, ends,   there; Recover opens the rest, and says so
//	  deleted, an older one
//	EIO and ENOSPC of each      what fails is not acknowledged; after it      Injected -injections 500 -exhaustive
//	  call of the kernel, in    nothing is, nobody is let in, and live
//	  turn, through strace      contexts end; opened again, all is there,
//	                            or Open refuses, and all is recovered
//	a full disk: tmpfs, ext4    creating is refused first, and revoking       FullDisk -hogs -count 20
//	                            goes on; the process lives; with space
//	                            again, creating works again
//
// Without flags each test runs a few cycles, for everyday use. Power loss and full disks need root and a loop device, the
// injected errors need strace: without, these tests are skipped, and say so. -seed repeats what was drawn, so far as
// processes can be repeated: the damage, not the store that it was done to.
//
// What the laboratory cannot show: a disk that says it has written and has not; writes that are torn within a sector; a
// process which takes the last byte of the disk while Badger is writing a table: that ends the process, and loses nothing.
package crashtest
