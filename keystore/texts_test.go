package keystore

import (
	"fmt"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

func TestTextsAreShared(t *testing.T) {
	var shared texts
	key := func() *Key {
		scopes := []string{strings.Clone("read"), strings.Clone("write")}
		k := &Key{Owner: strings.Clone("team"), grants: &grants{scopes: scopes}}
		shared.share(k)
		return k
	}
	a, b := key(), key()
	require.Equal(t, a, b)
	require.Same(t, unsafe.StringData(a.Owner), unsafe.StringData(b.Owner))
	require.Same(t, unsafe.StringData(a.grants.scopes[1]), unsafe.StringData(b.grants.scopes[1]))

	for n := range 2 * maxTexts {
		shared.share(&Key{Owner: fmt.Sprint(n)})
	}
	require.Len(t, shared.all, maxTexts, "strangers cannot make it grow")
	late := &Key{Owner: "late"}
	shared.share(late)
	require.Equal(t, "late", late.Owner)
}
