package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The steps of the guide: a store starts without a pepper, gets a pepper, and changes the pepper.
func TestPepperSteps(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	pepper2026 := "2026=" + file("2026", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n")
	pepper2027 := "2027=" + file("2027", "ZmVkY2JhOTg3NjU0MzIxMGZlZGNiYTk4NzY1NDMyMTA=")
	keys := filepath.Join(dir, "keys")
	open := func(peppers ...string) *keystore.Store {
		hasher, err := hasherFrom(peppers)
		require.NoError(t, err)
		store, err := keystore.Open(keys, &keystore.Options{Hasher: hasher})
		require.NoError(t, err)
		return store
	}
	var tokens []string
	for _, peppers := range [][]string{
		nil,
		{pepper2026, "sha256"},
		{pepper2027, pepper2026, "sha256"},
	} {
		store := open(peppers...)
		issued, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
		require.NoError(t, err)
		tokens = append(tokens, issued.Secret.Reveal())
		for _, token := range tokens {
			_, err := store.Verify(t.Context(), token)
			require.NoError(t, err)
		}
		require.NoError(t, store.Close())
	}
	// A mistake: remove the earlier pepper while keys still need this pepper.
	store := open(pepper2027)
	defer store.Close()
	_, err := store.Verify(t.Context(), tokens[2])
	require.NoError(t, err)
}

func TestPepperFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(text string) string {
		path := filepath.Join(dir, "pepper")
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return "2026=" + path
	}
	const pepper = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
	with, err := hasherFrom([]string{write(pepper + "\r\n")})
	require.NoError(t, err)
	without, err := hasherFrom([]string{write(pepper)})
	require.NoError(t, err)
	require.Equal(t, without.Digest("token"), with.Digest("token"), "a line break changes nothing")

	for _, flag := range []string{"2026=" + filepath.Join(dir, "missing"), "/etc/orders/pepper"} {
		_, err := hasherFrom([]string{flag})
		require.Error(t, err)
	}
	for _, text := range []string{"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=!", "c2hvcnQ=", ""} {
		_, err := hasherFrom([]string{write(text)})
		require.Error(t, err)
		require.NotContains(t, err.Error(), "MDEy", "an error shows no part of the pepper")
	}
}
