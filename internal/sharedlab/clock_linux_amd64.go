package sharedlab

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// moveClock makes the wall clock of this process run ahead of the clock of the machine by a number
// of seconds, which may change at any time. CLOCK_MONOTONIC stays as it is.
//
// The runtime of Go reads all clocks through a function that the kernel maps into each process, the
// vDSO. moveClock replaces this function by machine code that makes the system call, and then adds
// the seconds to CLOCK_REALTIME. The code goes into the place of another function of the vDSO,
// which Go does not use, and one store of 8 bytes then makes the first function jump there. So a
// thread that is inside the first function is not disturbed.
func moveClock(seconds *atomic.Int64) error {
	vdso, err := findVDSO()
	if err != nil {
		return err
	}
	from, err := symbol(vdso, "__vdso_clock_gettime", 8)
	if err != nil {
		return err
	}
	code := []byte{
		0xb8, 0xe4, 0x00, 0x00, 0x00, // mov eax, 228 (clock_gettime)
		0x0f, 0x05, //                   syscall
		0x85, 0xff, //                   test edi, edi (CLOCK_REALTIME is 0)
		0x75, 0x10, //                   jne to ret
		0x48, 0xb9, 0, 0, 0, 0, 0, 0, 0, 0, // mov rcx, the address of seconds
		0x48, 0x8b, 0x09, //             mov rcx, [rcx]
		0x48, 0x01, 0x0e, //             add [rsi], rcx
		0xc3, //                         ret
	}
	binary.LittleEndian.PutUint64(code[13:], uint64(uintptr(unsafe.Pointer(seconds))))
	to, err := symbol(vdso, "__vdso_gettimeofday", len(code))
	if err != nil {
		return err
	}
	if err := unix.Mprotect(vdso, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC); err != nil {
		return fmt.Errorf("make the vDSO writable: %w", err)
	}
	copy(vdso[to:], code)
	jump := [8]byte{0xe9}
	copy(jump[5:], vdso[from+5:])
	binary.LittleEndian.PutUint32(jump[1:], uint32(to-(from+5)))
	entry := (*uint64)(unsafe.Pointer(&vdso[from]))
	atomic.StoreUint64(entry, binary.LittleEndian.Uint64(jump[:]))
	return unix.Mprotect(vdso, unix.PROT_READ|unix.PROT_EXEC)
}

// findVDSO returns the memory of the vDSO.
func findVDSO() ([]byte, error) {
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		if !strings.HasSuffix(line, "[vdso]\n") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%x-%x ", &from, &to); err != nil {
			return nil, err
		}
		// The memory is the kernel's, and never moves.
		start := *(*unsafe.Pointer)(unsafe.Pointer(&from))
		return unsafe.Slice((*byte)(start), to-from), nil
	}
	return nil, errors.New("the process has no vDSO")
}

// symbol returns the offset of a function of the vDSO with at least some bytes.
func symbol(vdso []byte, name string, size int) (offset int, err error) {
	f, err := elf.NewFile(bytes.NewReader(vdso))
	if err != nil {
		return 0, err
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return 0, err
	}
	for _, s := range symbols {
		if s.Name == name && int(s.Size) >= size && s.Value%8 == 0 {
			return int(s.Value), nil
		}
	}
	return 0, fmt.Errorf("the vDSO has no suitable function %s", name)
}
