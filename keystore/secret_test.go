package keystore_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"text/template"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// What a failed assertion prints has no secret in it: not of two keys, not of structs that hold
// them in whatever way.
func TestAFailedAssertionDoesNotPrintASecret(t *testing.T) {
	s := inMemory(t)
	one, two := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
	type holder struct {
		issued *keystore.Issued
		secret keystore.Secret
		more   []any
	}
	holderOf := func(i *keystore.Issued) holder {
		return holder{i, i.Secret, []any{i, i.Secret, &i.Secret, *i}}
	}
	var out printed
	for _, pair := range [][2]any{
		{one, two}, {*one, *two}, {one.Secret, two.Secret}, {&one.Secret, &two.Secret},
		{holderOf(one), holderOf(two)}, {[]keystore.Secret{one.Secret},
			[]keystore.Secret{two.Secret}},
		{map[string]any{"k": one}, map[string]any{"k": two}}, {one, nil},
		{one.Secret, one.Secret.String()},
	} {
		require.False(t, assert.ObjectsAreEqual(pair[0], pair[1]))
		require.False(t, assert.Equal(&out, pair[0], pair[1]))
		require.False(t, assert.EqualValues(&out, pair[0], pair[1]))
		require.False(t, assert.ElementsMatch(&out, []any{pair[0]}, []any{pair[1]}))
		require.False(t, assert.Contains(&out, []any{pair[0]}, pair[1]))
		require.False(t, assert.NotEqual(&out, pair[0], pair[0]))
		require.False(t, assert.Nil(&out, pair[0]))
	}
	require.NotEmpty(t, out.String())
	require.True(t, assert.ObjectsAreEqual(one, one), "a key equals itself")
	require.Equal(t, one.Secret, (*one).Secret)
	hides(t, out.String(), one, two)
}

// A printed is a test that remembers what its assertions print.
type printed struct{ strings.Builder }

func (p *printed) Errorf(format string, args ...any) { fmt.Fprintf(p, format, args...) }

// hides fails the test, without saying more, if a text holds a secret.
func hides(t *testing.T, text string, all ...*keystore.Issued) {
	t.Helper()
	for _, issued := range all {
		token := issued.Secret.Reveal()
		secret := token[strings.LastIndexByte(token, '_')+1:]
		for _, part := range []string{secret[:8], secret[len(secret)-8:],
			fmt.Sprintf("%x", secret[:8]), fmt.Sprintf("%v", []byte(secret[:4]))} {
			require.False(t, strings.Contains(text, strings.Trim(part, "[]")), "it holds a secret")
		}
	}
}

func TestNoEncodingHoldsASecret(t *testing.T) {
	issued := create(t, inMemory(t), keystore.Spec{})
	type holder struct {
		Name   string
		Secret keystore.Secret
	}
	for _, v := range []any{issued, *issued, issued.Secret, &issued.Secret,
		holder{"n", issued.Secret}, []keystore.Secret{issued.Secret}} {
		var out bytes.Buffer
		text, err := json.Marshal(v)
		require.NoError(t, err)
		out.Write(text)
		// a map, such as Metadata, is more than it can do
		if text, err = xml.Marshal(v); err != nil {
			text = []byte(err.Error())
		}
		out.Write(text)
		if err := gob.NewEncoder(&out).Encode(v); err != nil {
			out.WriteString(err.Error())
		}
		for _, page := range []string{"{{.}}", `{{printf "%v %+v %#v %s %q %x" . . . . . .}}`,
			"{{with .Secret}}{{.}}{{end}}", "{{range .}}{{.}}{{end}}", "{{.Secret.hidden}}",
			"{{.hidden}}"} {
			if err := template.Must(template.New("").Parse(page)).Execute(&out, v); err != nil {
				out.WriteString(err.Error())
			}
		}
		hides(t, out.String(), issued)
	}
	text, err := json.Marshal(holder{"n", issued.Secret})
	require.NoError(t, err)
	require.Contains(t, string(text), issued.Key.Hint)
}

// No reflection finds the text of a key: not from what Create returned, nor from the store, a bound
// context or its key, whatever was done with the key. The walk goes wherever a library can go that
// reads unexported fields.
func TestNoReflectionFindsASecret(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the background does nothing meanwhile
		s, err := keystore.New(backendtest.NewMemory(), &keystore.Options{
			Hasher: keyring(t, pepper(t, "b", 2), pepper(t, "a", 1)), Observer: new(told),
		})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1,
			Burst: 10}})
		rotated, err := s.Rotate(t.Context(), issued.Key.ID, time.Hour)
		require.NoError(t, err)
		var out strings.Builder
		for _, i := range []*keystore.Issued{issued, rotated} {
			require.NoError(t, verify(t, s, i.Secret.Reveal()))
			live, key, release, err := parts(s.Bind(context.Background(), i.Secret.Reveal()))
			require.NoError(t, err)
			defer release()
			require.ErrorIs(t, verify(t, s, i.Secret.Reveal()+"x"), keystore.ErrDenied)
			synctest.Wait()
			walk(&out, reflect.ValueOf(live), make(map[unsafe.Pointer]bool))
			walk(&out, reflect.ValueOf(key), make(map[unsafe.Pointer]bool))
			walk(&out, reflect.ValueOf(i), make(map[unsafe.Pointer]bool))
		}
		synctest.Wait()
		walk(&out, reflect.ValueOf(s), make(map[unsafe.Pointer]bool))
		require.Contains(t, out.String(), issued.Key.ID, "it finds what is there")
		require.Contains(t, out.String(), "hmac-sha256:b")
		hides(t, out.String(), issued, rotated)
	})
}

// walk writes down every text and every run of bytes that reflection reaches from a value.
func walk(out *strings.Builder, v reflect.Value, seen map[unsafe.Pointer]bool) {
	switch v.Kind() {
	case reflect.String:
		fmt.Fprintln(out, v.String())
	case reflect.Pointer:
		if p := v.UnsafePointer(); !v.IsNil() && !seen[p] {
			seen[p] = true
			walk(out, v.Elem(), seen)
		}
	case reflect.Interface:
		if !v.IsNil() {
			walk(out, v.Elem(), seen)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			walk(out, v.Field(i), seen)
		}
	case reflect.Slice, reflect.Array:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			b := make([]byte, v.Len())
			for i := range b {
				b[i] = byte(v.Index(i).Uint())
			}
			fmt.Fprintf(out, "%s\n", b)
			return
		}
		for i := range v.Len() {
			walk(out, v.Index(i), seen)
		}
	case reflect.Map:
		for i := v.MapRange(); i.Next(); {
			walk(out, i.Key(), seen)
			walk(out, i.Value(), seen)
		}
	}
}
