package compat_test

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/davecgh/go-spew/spew"
	"github.com/google/go-cmp/cmp"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// Neither spew nor go-cmp prints the secret of a key, with any of their options.
func TestNoSecretInDumpsAndDiffs(t *testing.T) {
	store := keystoretest.New(t, nil)
	one := keystoretest.MustCreate(t, store, keystore.Spec{})
	two := keystoretest.MustCreate(t, store, keystore.Spec{})
	type holder struct {
		issued *keystore.Issued
		secret keystore.Secret
	}
	var out strings.Builder
	for _, methods := range []bool{true, false} {
		c := spew.ConfigState{
			Indent: " ", DisableMethods: methods, DisablePointerMethods: methods,
			ContinueOnMethod: true,
		}
		c.Fdump(&out, one, *one, one.Secret, &one.Secret, holder{one, one.Secret})
		c.Fprintf(&out, "%v %+v %#v %#+v", one, one, one.Secret, holder{one, one.Secret})
	}
	everything := cmp.Exporter(func(reflect.Type) bool { return true })
	for _, diff := range []func() string{
		// panics because of unexported fields
		func() string { return cmp.Diff(one.Secret, two.Secret) },
		func() string { return cmp.Diff(one, two) },
		func() string { return cmp.Diff(one, two, everything) },
		func() string {
			return cmp.Diff(holder{one, one.Secret}, holder{two, two.Secret}, everything)
		},
	} {
		func() {
			defer func() { fmt.Fprint(&out, recover()) }()
			out.WriteString(diff())
		}()
	}
	require.Contains(t, out.String(), one.Key.ID)
	for _, issued := range []*keystore.Issued{one, two} {
		token := issued.Secret.Reveal()
		for _, part := range []string{token[len(token)-8:], token[len(token)-40:][:8]} {
			require.False(t, strings.Contains(out.String(), part), "a secret was printed")
		}
	}
}
