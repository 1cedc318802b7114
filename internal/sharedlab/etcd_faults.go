package sharedlab

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Name implements Engine.
func (l *Etcd) Name() string { return "etcd" }

// Faults implements Engine.
func (l *Etcd) Faults(t testing.TB) []Fault {
	client := l.Client(t)
	anyOf := func() []*Member { return []*Member{l.Members[rand.IntN(len(l.Members))]} }
	leader := func() []*Member { return []*Member{l.Leader(t, client)} }
	majority := func() []*Member {
		all := append([]*Member{}, l.Members...)
		rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		return all[:len(all)/2+1]
	}
	kill := func(which func() []*Member) func(context.Context) error {
		return func(ctx context.Context) error { return killMembers(ctx, which()) }
	}
	pause := func(which func() []*Member) func(context.Context) error {
		return func(ctx context.Context) error { return pauseMembers(ctx, which()) }
	}
	faults := []Fault{
		{Name: "kill -9 of a member", Inject: kill(anyOf)},
		{Name: "SIGSTOP of a member", Inject: pause(anyOf)},
		{Name: "compaction", Inject: func(ctx context.Context) error {
			return compact(ctx, client)
		}},
		{Name: "full quota", Inject: func(ctx context.Context) error {
			return exhaustQuota(ctx, client)
		}},
		{Name: "restore of a snapshot", Loses: true, Inject: func(ctx context.Context) error {
			var file string
			if err := persist("save a snapshot", func(ctx context.Context) (err error) {
				file, err = l.snapshot(ctx)
				return err
			}); err != nil {
				return err
			}
			<-ctx.Done()
			l.Restore(t, file, []string{"lab", "another"}[rand.IntN(2)])
			return nil
		}},
	}
	if len(l.Members) == 1 {
		return faults
	}
	return append(faults,
		Fault{Name: "kill -9 of the leader", Inject: kill(leader)},
		Fault{Name: "SIGSTOP of the leader", Inject: pause(leader)},
		Fault{Name: "another leader", Inject: func(ctx context.Context) error {
			defer func() { <-ctx.Done() }()
			return l.moveLeader(ctx, t, client)
		}},
		Fault{Name: "loss of the quorum, kill -9", Inject: kill(majority)},
		Fault{Name: "loss of the quorum, SIGSTOP", Inject: pause(majority)},
	)
}

func killMembers(ctx context.Context, members []*Member) error {
	for _, m := range members {
		m.Kill()
	}
	<-ctx.Done()
	for _, m := range members {
		if err := m.start(); err != nil {
			return err
		}
	}
	for _, m := range members {
		if err := m.wait(); err != nil {
			return err
		}
	}
	return nil
}

func pauseMembers(ctx context.Context, members []*Member) (err error) {
	for _, m := range members {
		err = errors.Join(err, m.Pause())
	}
	<-ctx.Done()
	for _, m := range members {
		err = errors.Join(err, m.Resume())
	}
	return err
}

// moveLeader makes another member the leader. etcd may refuse, if an election is under way.
func (l *Etcd) moveLeader(ctx context.Context, t testing.TB, client *clientv3.Client) error {
	leader := l.Leader(t, client)
	only, err := clientv3.New(clientConfig([]string{leader.URL()}))
	if err != nil {
		return err
	}
	defer only.Close()
	for _, m := range l.Members {
		if m == leader {
			continue
		}
		r, err := client.Status(ctx, m.URL())
		if err == nil {
			_, _ = only.MoveLeader(ctx, r.Header.MemberId)
			return nil
		}
	}
	return nil
}

// compact drops the history of etcd up to now.
func compact(ctx context.Context, client *clientv3.Client) error {
	defer func() { <-ctx.Done() }()
	return persist("compact etcd", func(ctx context.Context) error {
		r, err := client.Put(ctx, "/other", "")
		if err == nil {
			_, err = client.Compact(ctx, r.Header.Revision)
		}
		if errors.Is(err, rpctypes.ErrCompacted) { // by an attempt whose answer was lost
			return nil
		}
		return err
	})
}

// persist repeats a step that fails because the machine is busy.
func persist(doing string, step func(context.Context) error) error {
	limited, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	for {
		try, cancel := context.WithTimeout(limited, patience/4)
		err := step(try)
		cancel()
		if err == nil {
			return nil
		}
		if limited.Err() != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// exhaustQuota raises the alarm of a full database, as a server does that has used up its quota,
// and disarms the alarm. While an alarm is raised, etcd refuses all writes.
func exhaustQuota(ctx context.Context, client *clientv3.Client) error {
	err := persist("raise the alarm", func(ctx context.Context) error {
		members, err := client.MemberList(ctx)
		if err != nil {
			return err
		}
		conn := client.ActiveConnection()
		_, err = pb.NewMaintenanceClient(conn).Alarm(ctx, &pb.AlarmRequest{
			Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE,
			MemberID: members.Members[0].ID,
		})
		return err
	})
	if err != nil {
		return err
	}
	<-ctx.Done()
	return persist("disarm the alarm", func(ctx context.Context) error {
		_, err := client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
		return err
	})
}
