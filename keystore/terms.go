package keystore

import (
	"encoding/binary"
	"sync"
)

// A sharedTerms holds the terms that cached keys share. The number of terms is limited, so that the
// map takes less memory than the sharing saves. After the limit is reached, each key has its own
// terms.
type sharedTerms struct {
	mu  sync.Mutex // guards all below
	all map[string]*terms
}

const maxSharedTerms = 4096

// share returns terms that are equal to t. The terms t are plain, and have neither metadata nor a
// previous secret. So terms with the same scopes, revision and number of rotations are equal.
func (st *sharedTerms) share(t *terms) *terms {
	var memory [128]byte
	name := binary.BigEndian.AppendUint64(memory[:0], t.revision)
	name = binary.BigEndian.AppendUint32(name, t.rotations)
	for _, scope := range t.scopes {
		name = append(binary.AppendUvarint(name, uint64(len(scope))), scope...)
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if shared, ok := st.all[string(name)]; ok {
		return shared
	}
	if st.all == nil {
		st.all = make(map[string]*terms)
	}
	if len(st.all) < maxSharedTerms {
		st.all[string(name)] = t
	}
	return t
}
