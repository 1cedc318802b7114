// Package crashtest kills stores, cuts the power of stores, damages files, injects errors and fills
// disks, and then checks the stores. The package contains only tests.
//
// Each test runs a victim in another process: the victim is the test binary, started again. The
// victim reports what the store has acknowledged, and the test keeps these reports for the whole
// run, over the death of many victims. A change that was acknowledged in one cycle must be present
// in each later cycle: no key is lost, no revoked key is valid again, no change is undone, and no
// event lacks its change. A change that was in progress at the death of the victim may have
// happened or not.
//
//	disaster                    what is guaranteed                  go test ./internal/crashtest
//	                                                                  -timeout 0 -run
//	kill -9                     all acknowledged changes are        Kill -cycles 1000
//	                            present
//	power loss: ext4 on a       the same; the control run, which    PowerLoss -powercuts 200
//	  loop device, shut down    does not sync, loses changes
//	damage to any file: bits,   Open refuses and changes nothing,   Corruption -corruptions 10000
//	  pages, ranges, cut off,   or all data is present; Recover
//	  deleted, an old version   opens the rest and reports losses
//	EIO and ENOSPC from each    a failed change is not              Injected -injections 500
//	  system call in turn, by   acknowledged; afterwards the          -exhaustive
//	  means of strace           store acknowledges nothing, admits
//	                            no caller and ends live contexts;
//	                            after Open all data is present, or
//	                            Open refuses and Recover restores
//	                            all data
//	a full disk: tmpfs, ext4    the store refuses Create first, and FullDisk -hogs -count 20
//	                            Revoke still works; the process
//	                            survives; Create works again once
//	                            the disk has space
//
// Without flags, each test runs a few cycles, for everyday use. Power loss and full disks need root
// and a loop device, and the injected errors need strace. Otherwise, these tests are skipped with a
// message. The flag -seed repeats the random choices of a run, as far as processes can be repeated:
// -seed repeats the damage, but not the exact files that the damage is done to.
//
// The package cannot test three disasters: a disk that acknowledges a write and does not keep the
// write; a write that is torn within a sector; a process that takes the last byte of the disk while
// Badger writes a table. The last of these ends the victim and loses no data.
package crashtest
