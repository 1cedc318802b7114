package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
)

// startPostgres starts a primary and a standby of PostgreSQL on this machine. Each commit waits for
// the standby. In production, the two servers run on separate machines. startPostgres returns the
// flags with which a server finds the primary, whichever of the two it is.
func (d *demo) startPostgres(ctx context.Context) (flags []string, err error) {
	var primary, standby *pglab.Server
	err = d.inLab(func(t pglab.TB) {
		primary = pglab.Start(t, pglab.Config{})
		standby = primary.Standby(t, "standby")
		primary.Replicate(t, "standby")
	})
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	say("primary  %s", primary.Addr())
	say("standby  %s  the primary waits for the standby with each commit", standby.Addr())
	return []string{"-engine=postgres", "-postgres=" + pglab.URL(
		primary.Addr()+","+standby.Addr(), "target_session_attrs", "read-write")}, nil
}

// inLab runs f, which starts servers that end with the demo.
func (d *demo) inLab(f func(pglab.TB)) error {
	l := &lab{demo: d}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(l)
	}()
	<-done
	return l.failed
}

// A lab lets the package pglab work outside a test.
type lab struct {
	demo   *demo
	failed error
}

func (l *lab) Helper()          {}
func (l *lab) Cleanup(f func()) { l.demo.cleanups = append(l.demo.cleanups, f) }
func (l *lab) Error(args ...any) {
	l.failed = errors.Join(l.failed, errors.New(fmt.Sprint(args...)))
}
func (l *lab) Skip(args ...any) { l.Fatal(args...) }

func (l *lab) Fatal(args ...any) {
	l.Error(args...)
	runtime.Goexit()
}

func (l *lab) Fatalf(format string, args ...any) { l.Fatal(fmt.Sprintf(format, args...)) }
