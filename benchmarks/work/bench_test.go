package work

import (
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// One benchmark for each fast operation of the report, for benchstat:
//
//	go test -run '^$' -bench . -count 10 ./work | tee new.txt
//	benchstat old.txt new.txt

func BenchmarkVerify(b *testing.B) {
	e := &Env{Dir: b.TempDir(), Keys: million}
	hot, err := newHotStore(b.Context(), e, hotKeys)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, hot.Close()) })
	checks, skipped, err := peers.Start(b.Context(), b.TempDir())
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, peers.Close(checks)) })
	for _, s := range skipped {
		b.Logf("SKIPPED: %s: %s", s.Name, s.Why)
	}
	run(b, verifyCases(b.Context(), hot, checks))
}

func BenchmarkReads(b *testing.B) {
	r, err := newReadStores(b.Context(), &Env{Dir: b.TempDir(), Keys: million}, 20_000)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, r.Close()) })
	run(b, readCases(b.Context(), r))
}

func BenchmarkOwners(b *testing.B) {
	var end closer
	o, err := openOwners(b.Context(), &Env{Dir: b.TempDir(), Keys: million}, 100_000, &end)
	require.NoError(b, err)
	b.Cleanup(func() {
		var err error
		end.into(&err)
		require.NoError(b, err)
	})
	run(b, o.cases(b.Context(), 100_000))
}

// With -cpu 1,2,8, the benchmark shows how the goroutines slow each other down.
func BenchmarkVerifyParallel(b *testing.B) {
	hot, err := newHotStore(b.Context(), &Env{Dir: b.TempDir(), Keys: million}, hotKeys)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, hot.Close()) })
	var seed atomic.Uint64
	for _, op := range parallelOps(b.Context(), hot) {
		b.Run(op.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				do := op.op(int(seed.Add(1)))
				for pb.Next() {
					if err := do(); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

func run(b *testing.B, cases []measure.Case) {
	for _, c := range cases {
		b.Run(c.Name, func(b *testing.B) {
			b.ReportAllocs()
			if err := c.Do(b.N); err != nil {
				b.Fatal(err)
			}
		})
	}
}
