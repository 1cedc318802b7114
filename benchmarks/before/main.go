//go:build unix

// Before creates keys with one version of the store, and reports the throughput and the processor
// time. The workload "before" of package work builds this program twice, with the present version
// and with an earlier version, so the program may use only what both versions have.
//
// The argument is an empty directory for the store. The program answers each line "WRITERS
// MILLISECONDS" on the standard input with one line "KEYS SECONDS CPUNANOSECONDS".
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func main() {
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "before:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	store, err := keystore.Open(dir, &keystore.Options{Timeout: -1})
	if err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var writers, milliseconds int
		if _, err := fmt.Sscan(in.Text(), &writers, &milliseconds); err != nil {
			return err
		}
		if err := create(store, writers, time.Duration(milliseconds)*time.Millisecond); err != nil {
			return err
		}
	}
	return store.Close()
}

// create creates keys for about d, and writes the figures to the standard output.
func create(store *keystore.Store, writers int, d time.Duration) error {
	var (
		wg    sync.WaitGroup
		keys  atomic.Int64
		first atomic.Pointer[error]
	)
	before, err := cpu()
	if err != nil {
		return err
	}
	begin := time.Now()
	for range writers {
		wg.Go(func() {
			for time.Since(begin) < d && first.Load() == nil {
				number := keys.Add(1)
				_, err := store.Create(context.Background(), keystore.Spec{
					Name:   "ci of the web shop",
					Owner:  fmt.Sprintf("team-%d", number%1000),
					Scopes: []string{"orders:read", "orders:write"},
				})
				if err != nil {
					first.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	if err := first.Load(); err != nil {
		return *err
	}
	after, err := cpu()
	if err != nil {
		return err
	}
	fmt.Println(keys.Load(), took.Seconds(), after-before)
	return nil
}

// cpu returns the processor time of this process so far, in nanoseconds.
func cpu() (int64, error) {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0, err
	}
	return usage.Utime.Nano() + usage.Stime.Nano(), nil
}
