package admin

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const (
	defaultPage = 50
	maxPage     = 1000
	// maxPageBytes ends a page early. gRPC clients refuse messages of more than 4 MiB.
	maxPageBytes = 2 << 20
)

// A page collects the items of a response to a list.
type page struct {
	left   int // how many more items fit
	bytes  int
	next   string // the page token of the next page; empty: this is the last page
	damage []string
}

// newPage returns an empty page of the size that a request wants.
func newPage(size int32) (*page, error) {
	switch {
	case size < 0:
		return nil, invalid("page_size is negative: 0 means %d", defaultPage)
	case size == 0:
		size = defaultPage
	}
	return &page{left: int(min(size, maxPage))}, nil
}

// add reports whether an item fits into the page.
func (p *page) add(item proto.Message) bool {
	size := proto.Size(item)
	if p.left == 0 || p.bytes > 0 && p.bytes+size > maxPageBytes {
		return false
	}
	p.left--
	p.bytes += size
	return true
}

// note notes an error of a list, and reports whether the list can continue.
func (p *page) note(err error) bool {
	if !errors.Is(err, keystore.ErrCorrupt) {
		return false
	}
	text := damageText(err)
	if p.bytes += len(text); len(p.damage) < maxDamage {
		p.damage = append(p.damage, text)
	}
	return true
}

// damageText returns the sentence about an item that cannot be read.
func damageText(err error) string { return strings.TrimPrefix(err.Error(), "keystore: ") }

// maxDamage is how many sentences about damage a page has. CheckIntegrity reads everything.
const maxDamage = 100

// A page token is the cursor of the last item of the page, after a hash of the request. So a token
// of another request is noticed. The request is without its page size and page token.

// boundLength is the length of the hash in a page token.
const boundLength = 12

func pageToken(request proto.Message, cursor string) (string, error) {
	bound, err := boundOf(request)
	return base64.RawURLEncoding.EncodeToString(append(bound, cursor...)), err
}

// pageCursor returns the cursor in a page token, or an empty cursor if the token is empty.
func pageCursor(request proto.Message, token string) (string, error) {
	if token == "" {
		return "", nil
	}
	bound, err := boundOf(request)
	if err != nil {
		return "", err
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	cursor, ok := strings.CutPrefix(string(text), string(bound))
	if err != nil || !ok || cursor == "" {
		return "", errPageToken
	}
	return cursor, nil
}

func boundOf(request proto.Message) ([]byte, error) {
	wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return nil, invalid("the request cannot be encoded")
	}
	sum := sha256.Sum256(append([]byte(request.ProtoReflect().Descriptor().FullName()), wire...))
	return sum[:boundLength], nil
}
