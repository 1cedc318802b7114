package keystore

import "sync"

// A texts keeps one copy of what many keys have in common, such as an owner or a scope, for all that are cached. It holds
// so many that they take less than they save, and whatever comes later is kept with its key.
type texts struct {
	mu  sync.Mutex // guards all below
	all map[string]string
}

const maxTexts = 4096

// share makes the texts of an entry that nobody else has yet those that other entries have too.
func (t *texts) share(k *Key) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.all == nil {
		t.all = make(map[string]string)
	}
	k.Owner = t.oneLocked(k.Owner)
	scopes := k.granted().scopes
	for i, scope := range scopes {
		scopes[i] = t.oneLocked(scope)
	}
}

func (t *texts) oneLocked(s string) string {
	if one, ok := t.all[s]; ok {
		return one
	}
	if len(t.all) < maxTexts {
		t.all[s] = s
	}
	return s
}
