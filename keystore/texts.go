package keystore

import "sync"

// A texts keeps one copy of a text that many cached keys have in common, such as an owner or a
// scope. The number of texts is limited, so that the map takes less memory than the sharing
// saves. After the limit is reached, each key keeps its own copy of a new text.
type texts struct {
	mu  sync.Mutex // guards all below
	all map[string]string
}

const maxTexts = 4096

// share replaces the owner and the scopes of a key by shared copies. The key must not be
// published yet.
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
