package keystore

import (
	"encoding/binary"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/internal/intern"
)

// A sharedTerms holds the terms that cached keys share. The number of terms is limited, so that the
// map takes less memory than the sharing saves. The sharedTerms forgets terms that no key has asked
// for in a long time. Keys that have forgotten terms keep the terms, and the next key brings equal
// terms that are shared from then on.
type sharedTerms struct {
	mu  sync.Mutex // guards all below
	all intern.Recent[*terms]
}

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
	if shared, ok := st.all.Get(string(name)); ok {
		return shared
	}
	st.all.Put(string(name), t)
	return t
}
