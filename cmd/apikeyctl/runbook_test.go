//go:build unix

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A scene makes what a section of the runbook begins with, and returns what happens before each of
// the section's blocks after the first.
type scene func(w *world) (between []func())

var scenes = map[string]scene{
	"Runbook": func(w *world) []func() { w.open(nil); w.serve(); return nil },
	"A key has leaked": func(w *world) []func() {
		w.open(nil)
		w.serve()
		_, token := w.create(keystore.Spec{
			Name: "billing", Owner: "acme", Scopes: []string{"orders:read"}})
		w.write("leaked.txt", token+"\n")
		for range 3 {
			w.stream(token)
		}
		return nil
	},
	"A customer leaves": func(w *world) []func() {
		w.open(nil)
		w.serve()
		twoKeys(w)
		w.create(keystore.Spec{Name: "other", Owner: "beta"})
		return nil
	},
	"A pepper is rotated":   rotatePepper,
	"An audit is asked for": askForAudit,
	"The disk is full":      fillDisk,
	"The store has failed":  damageStore,
	"A replica is lost":     loseReplica,
}

func twoKeys(w *world) (ids []string) {
	for _, name := range []string{"billing", "web"} {
		key, _ := w.create(keystore.Spec{Name: name, Owner: "acme"})
		ids = append(ids, key.ID)
	}
	return ids
}

func rotatePepper(w *world) []func() {
	hasher := func(id string, b byte) hashing.Hasher {
		h, err := hashing.HMACSHA256(id, bytes.Repeat([]byte{b}, 32))
		require.NoError(w.t, err)
		return h
	}
	before, after := hasher("2026", 1), hasher("2027", 2)
	w.open(&keystore.Options{Hasher: before})
	twoKeys(w)
	require.NoError(w.t, w.store.Close())
	both, err := hashing.Keyring(after, before)
	require.NoError(w.t, err)
	w.open(&keystore.Options{Hasher: both})
	w.serve()
	require.Eventually(w.t, func() bool { return w.store.Stats().Outdated == 2 }, time.Minute,
		5*time.Millisecond)
	return nil
}

func askForAudit(w *world) []func() {
	w.open(nil)
	w.serve()
	w.create(keystore.Spec{Name: "operator", Owner: "acme", Scopes: []string{"keys:admin"}})
	ids := twoKeys(w)
	require.Zero(w.t, w.ctl("revoke", ids[0], "--reason", "contract ended").code)
	return nil
}

// fillDisk puts the store on a small file system, which another program fills.
func fillDisk(w *world) []func() {
	if runtime.GOOS != "linux" || os.Getuid() != 0 {
		w.t.Skip("NOT RUN: only root on Linux can mount a small file system")
	}
	data := filepath.Join(w.dir, "data")
	require.NoError(w.t, os.Mkdir(data, 0o700))
	out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=12m", "apikeyctl", data).
		CombinedOutput()
	if err != nil {
		w.t.Skipf("NOT RUN: cannot mount a small file system: %v: %s", err, out)
	}
	w.t.Cleanup(func() { _ = exec.Command("umount", data).Run() })
	w.keys = "data/keys"
	w.open(nil)
	w.serve()
	w.create(keystore.Spec{Name: "billing", Owner: "acme"})
	fill, err := os.Create(filepath.Join(data, "old.log"))
	require.NoError(w.t, err)
	defer fill.Close()
	for block := make([]byte, 64<<10); err == nil; {
		_, err = fill.Write(block)
	}
	return nil
}

// damageStore leaves a store that lacks a file, and a backup.
func damageStore(w *world) []func() {
	w.open(nil)
	twoKeys(w)
	backup, err := os.Create(filepath.Join(w.dir, "keys.backup"))
	require.NoError(w.t, err)
	require.NoError(w.t, w.store.Backup(w.t.Context(), backup))
	require.NoError(w.t, backup.Close())
	require.NoError(w.t, w.store.Close())
	require.NoError(w.t, os.Remove(filepath.Join(w.dir, "keys", "LAST")))
	return nil
}

// loseReplica opens a store of two processes, and cuts the second off.
func loseReplica(w *world) []func() {
	const freshness = 2 * time.Second
	shared := backendtest.NewShared()
	opts := &keystore.Options{Freshness: freshness, Timeout: time.Minute}
	open := func(link *badlink.Link) *keystore.Store {
		s, err := keystore.New(link, opts)
		require.NoError(w.t, err)
		w.t.Cleanup(func() {
			link.Set(badlink.Faults{})
			s.Close()
			link.Wait()
		})
		return s
	}
	lost := badlink.Open(shared)
	w.store = open(badlink.Open(shared))
	open(lost)
	w.serve()
	w.create(keystore.Spec{Name: "billing", Owner: "acme"})
	return []func(){
		func() { lost.Set(badlink.Faults{Drop: true, Silent: true}) },
		func() {
			require.Eventually(w.t, func() bool { return w.store.Stats().Processes == 1 },
				time.Minute, 5*time.Millisecond)
		},
	}
}

var sections = regexp.MustCompile(`(?m)^##? (.*)$`)

// Each section of the runbook is what its commands print, after what the section says has happened.
func TestRunbook(t *testing.T) {
	page, err := os.ReadFile("../../examples/guides/runbook.md")
	require.NoError(t, err)
	marks := sections.FindAllStringSubmatchIndex(string(page), -1)
	require.Len(t, marks, len(scenes), "each section has a scene")
	for i, mark := range marks {
		end := len(page)
		if i+1 < len(marks) {
			end = marks[i+1][0]
		}
		title, text := string(page[mark[2]:mark[3]]), string(page[mark[1]:end])
		t.Run(strings.ReplaceAll(title, " ", "_"), func(t *testing.T) {
			require.Contains(t, scenes, title)
			w := newWorld(t)
			between := scenes[title](w)
			blocks := transcripts(text)
			require.True(t, len(between) == 0 || len(blocks) == len(between)+1)
			require.NotEmpty(t, blocks)
			tr := newTranscript(w)
			for i, block := range blocks {
				if i > 0 && len(between) > 0 {
					between[i-1]()
				}
				require.Equal(t, same(block), same(tr.run(block)))
			}
		})
	}
}
