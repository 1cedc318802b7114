package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A faulty backend fails or hangs when told to.
type faulty struct {
	backend.Backend
	fail      atomic.Pointer[error] // of each call
	failApply atomic.Pointer[error] // of Apply only
	hang      atomic.Bool
	closed    chan struct{}
}

func newFaulty() *faulty {
	return &faulty{Backend: backendtest.NewMemory(), closed: make(chan struct{})}
}

func (b *faulty) fault(ctx context.Context) error {
	if err := b.fail.Load(); err != nil {
		return *err
	}
	if b.hang.Load() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-b.closed:
			return backend.ErrClosed
		}
	}
	return nil
}

func (b *faulty) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if err := b.fault(ctx); err != nil {
		return backend.Entry{}, err
	}
	return b.Backend.Get(ctx, key)
}

func (b *faulty) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := b.fault(ctx); err != nil {
		return err
	}
	if err := b.failApply.Load(); err != nil {
		return *err
	}
	return b.Backend.Apply(ctx, changes...)
}

func (b *faulty) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if err := b.fault(ctx); err != nil {
		return func(yield func(backend.Entry, error) bool) { yield(backend.Entry{}, err) }
	}
	return b.Backend.Scan(ctx, from, to)
}

func (b *faulty) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if err := b.fault(ctx); err != nil {
		return func(yield func(backend.Entry, error) bool) { yield(backend.Entry{}, err) }
	}
	return b.Backend.Snapshot(ctx, from, to)
}

func (b *faulty) Close() error {
	close(b.closed)
	return b.Backend.Close()
}

func withFaults(t *testing.T, opts *keystore.Options) (*keystore.Store, *faulty) {
	b := newFaulty()
	s, err := keystore.New(b, opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s, b
}

func TestFailingBackendIsUnavailable(t *testing.T) {
	s, b := withFaults(t, &keystore.Options{CacheSize: -1})
	issued := create(t, s, keystore.Spec{})
	err := errors.New("no route to disk")
	b.fail.Store(&err)
	for name, err := range everyCall(t.Context(), s, issued) {
		require.ErrorIs(t, err, keystore.ErrUnavailable, name)
		require.NotErrorIs(t, err, keystore.ErrDenied, name)
		require.ErrorContains(t, err, "no route to disk")
	}
	b.fail.Store(nil)
	_, err = s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err, "it may pass")
}

// Whatever a backend says, it is not an answer about a key, and lets nobody in.
func TestABackendCannotDeny(t *testing.T) {
	s, b := withFaults(t, &keystore.Options{CacheSize: -1})
	issued := create(t, s, keystore.Spec{})
	for _, err := range []error{context.Canceled, context.DeadlineExceeded, backend.ErrConflict,
		backend.ErrLocked, backend.ErrTooLarge, keystore.ErrRevoked, errors.Join(backend.ErrFailed,
			keystore.ErrUnknown)} {
		b.fail.Store(&err)
		_, got := s.Verify(t.Context(), issued.Secret.Reveal())
		require.ErrorIs(t, got, keystore.ErrUnavailable)
		require.NotErrorIs(t, got, keystore.ErrDenied)
	}
}

func TestHangingBackendIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := withFaults(t, &keystore.Options{CacheSize: -1})
		issued := create(t, s, keystore.Spec{})
		bound, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		require.NoError(t, err)
		defer release()
		b.hang.Store(true)

		begin := time.Now()
		_, err = s.Verify(t.Context(), issued.Secret.Reveal())
		require.ErrorIs(t, err, keystore.ErrUnavailable)
		require.Equal(t, 10*time.Second, time.Since(begin))
		_, err = s.Create(t.Context(), keystore.Spec{Name: "n"})
		require.ErrorIs(t, err, keystore.ErrUnavailable)
		require.NoError(t, bound.Err())
		require.ErrorIs(t, s.Revoke(t.Context(), issued.Key.ID, ""), keystore.ErrUnavailable)
		require.ErrorIs(t, context.Cause(bound), keystore.ErrRevoked,
			"a revocation that failed cuts all the same")

		// A caller with less patience hears its own deadline.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for _, err := range []error{
			func() error { _, err := s.Verify(ctx, issued.Secret.Reveal()); return err }(),
			s.Revoke(ctx, issued.Key.ID, ""),
		} {
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.NotErrorIs(t, err, keystore.ErrUnavailable)
			require.NotErrorIs(t, err, keystore.ErrDenied)
		}
	})
}

// stalling holds one Apply back, and makes it all the same when it is let go: the caller has long
// gone.
type stalling struct {
	backend.Backend
	stall chan struct{}
}

func (b *stalling) Apply(ctx context.Context, changes ...backend.Change) error {
	if b.stall != nil {
		<-b.stall
	}
	return b.Backend.Apply(ctx, changes...)
}

// A revocation whose caller gave up, and that then takes effect, is not lost behind a cached
// record.
func TestRevocationThatTakesEffectLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &stalling{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued := create(t, s, keystore.Spec{})
		verify := func() error {
			_, err := s.Verify(t.Context(), issued.Secret.Reveal())
			return err
		}
		require.NoError(t, verify())
		b.stall = make(chan struct{})

		require.ErrorIs(t, s.Revoke(t.Context(), issued.Key.ID, ""), keystore.ErrUnavailable)
		require.NoError(t, verify(), "indeterminate: not revoked yet")
		require.Zero(t, s.Stats().Cached, "and not cached")
		bound, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		require.NoError(t, err)
		defer release()

		close(b.stall)
		synctest.Wait()
		require.ErrorIs(t, verify(), keystore.ErrRevoked)
		require.ErrorIs(t, context.Cause(bound), keystore.ErrRevoked)
	})
}

// After a change whose outcome nobody knows, the key is read from the store each time.
func TestAKeyOfUnknownStateIsNotCached(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	verify := func() error { _, err := s.Verify(t.Context(), issued.Secret.Reveal()); return err }
	require.NoError(t, verify())
	require.Equal(t, 1, s.Stats().Cached)

	lost := errors.New("lost the connection")
	b.failApply.Store(&lost)
	require.ErrorIs(t, s.Revoke(t.Context(), issued.Key.ID, ""), keystore.ErrUnavailable)
	b.failApply.Store(nil)
	require.NoError(t, verify())
	require.Zero(t, s.Stats().Cached)
	require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""), "and may be revoked again")
	require.ErrorIs(t, verify(), keystore.ErrRevoked)
}

// What was certainly not made leaves nobody in doubt.
func TestAChangeThatWasNotMadeEndsNoContext(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	live := bind(t, s, issued.Secret.Reveal())
	for _, err := range []error{backend.ErrFull, backend.ErrTooLarge} {
		b.failApply.Store(&err)
		_, got := s.Update(t.Context(), issued.Key.ID,
			func(spec *keystore.Spec) error { spec.Owner = "x"; return nil })
		b.failApply.Store(nil)
		require.ErrorIs(t, got, keystore.ErrUnavailable)
		require.NoError(t, verify(t, s, issued.Secret.Reveal()))
		require.Equal(t, 1, s.Stats().Cached)
		require.NoError(t, live.Err())
	}
}

// Once the backend has failed for good, cached keys are refused too.
func TestFailedBackendStopsTheStore(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	_, err := s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	var failed error = backend.ErrFailed
	b.fail.Store(&failed)
	require.ErrorIs(t, s.Revoke(t.Context(), issued.Key.ID, ""), keystore.ErrUnavailable)
	b.fail.Store(nil)
	for name, err := range everyCall(t.Context(), s, issued) {
		require.ErrorIs(t, err, keystore.ErrUnavailable, name)
		require.NotErrorIs(t, err, keystore.ErrDenied, name)
	}
}

func TestDamagedRecordIsRefused(t *testing.T) {
	b := backendtest.NewMemory()
	s, err := keystore.New(b, &keystore.Options{CacheSize: -1})
	require.NoError(t, err)
	defer s.Close()
	first, damaged, last := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{}), create(t,
		s, keystore.Spec{})
	var keys [][]byte
	for e, err := range b.Scan(t.Context(), []byte("k"), []byte("l")) {
		require.NoError(t, err)
		keys = append(keys, e.Key)
	}
	require.Len(t, keys, 3)
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: keys[1], Value: []byte("nonsense"),
		Expect: 1}))

	_, err = s.Verify(t.Context(), damaged.Secret.Reveal())
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.NotErrorIs(t, err, keystore.ErrDenied)
	_, err = s.Get(t.Context(), damaged.Key.ID)
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.ErrorIs(t, s.Revoke(t.Context(), damaged.Key.ID, ""), keystore.ErrCorrupt)

	var ids []string
	corrupt := 0
	for key, err := range s.List(t.Context(), keystore.Query{}) {
		if err != nil {
			require.ErrorIs(t, err, keystore.ErrCorrupt)
			require.Nil(t, key)
			corrupt++
			continue
		}
		ids = append(ids, key.ID)
	}
	require.Equal(t, []string{first.Key.ID, last.Key.ID}, ids)
	require.Equal(t, 1, corrupt)
}

func TestOpenOfSpecialDirectories(t *testing.T) {
	needsDirectory(t)
	t.Run("that does not exist", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "a", "b")
		s, err := keystore.Open(dir, nil)
		require.NoError(t, err)
		require.NoError(t, s.Close())
		info, err := os.Stat(dir)
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o077, "only the owner may enter")
	})
	t.Run("that is a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "f")
		require.NoError(t, os.WriteFile(file, nil, 0o600))
		_, err := keystore.Open(file, nil)
		require.ErrorContains(t, err, file)
	})
	t.Run("that is open", func(t *testing.T) {
		dir := t.TempDir()
		s, err := keystore.Open(dir, nil)
		require.NoError(t, err)
		defer s.Close()
		_, err = keystore.Open(dir, nil)
		require.ErrorIs(t, err, keystore.ErrLocked)
	})
}

// Where no store is, MustExist makes Open fail, and nothing is made; where one is, even without a
// key, Open opens it.
func TestMustExist(t *testing.T) {
	needsDirectory(t)
	top := t.TempDir()
	must := &keystore.Options{MustExist: true}
	empty, volume := filepath.Join(top, "mount-point"), filepath.Join(top, "volume")
	require.NoError(t, os.Mkdir(empty, 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(volume, "lost+found"), 0o755))
	state := func() (all []string) {
		err := filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
			info, infoErr := entry.Info()
			all = append(all, fmt.Sprint(path, " ", info.Mode()))
			return errors.Join(err, infoErr)
		})
		require.NoError(t, err)
		return all
	}
	before := state()
	missing := filepath.Join(top, "missing")
	for _, dir := range []string{empty, volume, missing, filepath.Join(missing, "below")} {
		_, err := keystore.Open(dir, must)
		require.ErrorIs(t, err, fs.ErrNotExist)
		require.NotErrorIs(t, err, keystore.ErrCorrupt)
		require.ErrorContains(t, err, dir)
	}
	require.Equal(t, before, state())

	for _, opts := range []*keystore.Options{nil, must, must} {
		s, err := keystore.Open(empty, opts)
		require.NoError(t, err)
		require.NoError(t, s.Close())
	}
}

// A panic of Options.Recover is an error of Open's. The directory is free afterwards, and the next
// Open tells again.
func TestRecoverPanics(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	token := create(t, s, keystore.Spec{}).Secret.Reveal()
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(filepath.Join(dir, "LAST")))
	_, err = keystore.Open(dir, &keystore.Options{Recover: func(error) { panic("no") }})
	require.ErrorContains(t, err, "Options.Recover panicked: no")
	_, err = keystore.Open(dir, nil)
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.NotErrorIs(t, err, keystore.ErrLocked)
	told := 0
	s, err = keystore.Open(dir, &keystore.Options{Recover: func(error) { told++ }})
	require.NoError(t, err)
	defer s.Close()
	require.Equal(t, 1, told)
	require.NoError(t, verify(t, s, token))
}

// A failure in the background, while nobody asks storage for anything, ends what is answered from
// the cache too.
func TestBackgroundFailureStopsTheStore(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	defer s.Close()
	token := create(t, s, keystore.Spec{}).Secret.Reveal()
	require.NoError(t, verify(t, s, token))
	// What Badger cannot make is its first table, once its first log is full.
	require.NoError(t, os.WriteFile(filepath.Join(dir, "000001.sst"), nil, 0o600))
	large := keystore.Spec{Name: "large",
		Metadata: map[string]string{"k": strings.Repeat("v", 12_000)}}
	for n := 0; ; n++ {
		require.Less(t, n, 20_000, "the log is never full")
		if _, err := os.Stat(filepath.Join(dir, "00002.mem")); err == nil {
			break
		}
		if _, err := s.Create(t.Context(), large); err != nil {
			require.ErrorIs(t, err, keystore.ErrUnavailable)
			break
		}
	}
	require.Eventually(t, func() bool {
		return errors.Is(verify(t, s, token), keystore.ErrUnavailable)
	}, 20*time.Second,
		time.Millisecond, "and not only once a minute, when last uses are written")
}
