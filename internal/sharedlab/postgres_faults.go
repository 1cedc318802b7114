package sharedlab

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
)

// Name implements Engine.
func (p *Postgres) Name() string { return "postgres" }

// Faults implements Engine.
func (p *Postgres) Faults(t testing.TB) []Fault {
	primary := func() *pglab.Server { return p.primary }
	standby := func() *pglab.Server { return p.standby }
	pause := func(which func() *pglab.Server) func(context.Context) error {
		return func(ctx context.Context) error { return pauseServer(ctx, which()) }
	}
	restart := func(
		which func() *pglab.Server, stop func(*pglab.Server),
	) func(context.Context) error {
		return func(ctx context.Context) error {
			stop(which())
			<-ctx.Done()
			return which().Start()
		}
	}
	set := func(begin, end string) func(context.Context) error {
		return func(ctx context.Context) error {
			p.primary.Set(t, begin)
			<-ctx.Done()
			p.primary.Set(t, end)
			return nil
		}
	}
	return []Fault{
		{Name: "SIGSTOP of the primary", Inject: pause(primary)},
		{Name: "SIGSTOP of the standby", Inject: pause(standby)},
		{Name: "restart of the primary", Inject: restart(primary, (*pglab.Server).Stop)},
		{Name: "crash of the primary", Inject: restart(primary, (*pglab.Server).Crash)},
		{Name: "crash of the standby", Inject: restart(standby, (*pglab.Server).Crash)},
		{Name: "slow standby", Inject: p.slowStandby},
		{Name: "kill -9 of backends", Inject: func(ctx context.Context) error {
			return p.killBackends(ctx, t)
		}},
		{Name: "terminated backends", Inject: func(ctx context.Context) error {
			repeatSQL(ctx, t, p.primary, "select pg_terminate_backend(pid) "+
				"from pg_stat_activity where backend_type in ('client backend', 'walsender') "+
				"and pid <> pg_backend_pid() and random() < 0.5")
			return nil
		}},
		{Name: "canceled waits for the standby", Inject: func(ctx context.Context) error {
			if err := p.standby.Pause(); err != nil {
				return err
			}
			repeatSQL(ctx, t, p.primary, cancelWaits)
			return p.standby.Resume()
		}},
		{Name: "locked tables", Inject: func(ctx context.Context) error {
			p.primary.Exec(t, forEachSchema("lock table %I.head in access exclusive mode")+
				fmt.Sprintf("select pg_sleep(%f);", remaining(ctx).Seconds()))
			return nil
		}},
		{Name: "removal of the log", Inject: func(ctx context.Context) error {
			p.primary.Exec(t, forEachSchema("delete from %I.log where position < "+
				"(select max(position) from %1$I.log)"))
			<-ctx.Done()
			return nil
		}},
		{Name: "read-only primary", Inject: set("default_transaction_read_only = 'on'",
			"default_transaction_read_only = 'off'")},
		{Name: "no synchronous replication", Inject: set("synchronous_standby_names = ''",
			"synchronous_standby_names = '"+standbyName+"'")},
		{Name: "promotion, the old primary dead", Inject: func(ctx context.Context) error {
			p.primary.Crash()
			<-ctx.Done()
			p.failOver(t)
			return nil
		}},
		{Name: "promotion, the old primary alive", Inject: func(ctx context.Context) error {
			return p.depose(ctx, t, "select 1")
		}},
		{Name: "promotion, the old primary alive, canceled waits",
			Inject: func(ctx context.Context) error { return p.depose(ctx, t, cancelWaits) }},
		{Name: "restore of a backup", Loses: true, Inject: func(ctx context.Context) error {
			p.spare.Backup(t, p.primary)
			<-ctx.Done()
			p.primary.Kill()
			p.standby.Kill()
			if err := p.spare.Start(); err != nil {
				return err
			}
			p.primary, p.spare = p.spare, p.primary
			p.standby.Follow(t, p.primary, standbyName)
			p.primary.Replicate(t, standbyName)
			return nil
		}},
	}
}

// cancelWaits makes commits visible that are on no standby.
const cancelWaits = "select pg_cancel_backend(pid) from pg_stat_activity " +
	"where wait_event = 'SyncRep'"

// forEachSchema returns the SQL that runs a statement for each schema with a store. The statement
// is a format, whose argument is the schema.
func forEachSchema(statement string) string {
	return fmt.Sprintf("do $$ declare s text; begin for s in select schemaname from pg_tables "+
		"where tablename = 'head' loop execute format('%s', s); end loop; end $$;", statement)
}

// repeatSQL repeats a statement until ctx ends.
func repeatSQL(ctx context.Context, t testing.TB, server *pglab.Server, sql string) {
	for ctx.Err() == nil {
		server.Exec(t, sql)
		pauseFor(ctx, rand.N(200*time.Millisecond))
	}
}

// remaining returns the time until the end of a context that has a deadline.
func remaining(ctx context.Context) time.Duration {
	deadline, _ := ctx.Deadline()
	return max(0, time.Until(deadline))
}

func pauseServer(ctx context.Context, server *pglab.Server) error {
	if err := server.Pause(); err != nil {
		return err
	}
	<-ctx.Done()
	return server.Resume()
}

// slowStandby stops the standby again and again.
func (p *Postgres) slowStandby(ctx context.Context) error {
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, rand.N(300*time.Millisecond))
		err := pauseServer(limited, p.standby)
		cancel()
		if err != nil {
			return err
		}
		pauseFor(ctx, rand.N(100*time.Millisecond))
	}
	return nil
}

// killBackends kills a process of the primary. PostgreSQL then ends all connections, and recovers.
func (p *Postgres) killBackends(ctx context.Context, t testing.TB) error {
	pid, err := strconv.Atoi(p.primary.Exec(t, "select pid from pg_stat_activity where "+
		"pid <> pg_backend_pid() and backend_type = 'client backend' "+
		"union all (select pid from pg_stat_activity where backend_type = 'walwriter') limit 1"))
	if err != nil {
		return err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return err
	}
	<-ctx.Done()
	p.primary.Await(t, "select 1", "1")
	return nil
}

// failOver promotes the standby, and makes the spare the new standby. The old primary becomes the
// spare.
func (p *Postgres) failOver(t testing.TB) {
	p.standby.Promote(t)
	p.spare.Follow(t, p.standby, standbyName)
	p.standby.Replicate(t, standbyName)
	p.primary, p.standby, p.spare = p.standby, p.spare, p.primary
}

// depose promotes the standby while the old primary is alive. Then depose repeats a statement on
// the old primary, and ends the old primary.
func (p *Postgres) depose(ctx context.Context, t testing.TB, sql string) error {
	hold := remaining(ctx)
	p.failOver(t)
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), hold)
	defer cancel()
	repeatSQL(limited, t, p.spare, sql)
	p.spare.Kill()
	return nil
}
