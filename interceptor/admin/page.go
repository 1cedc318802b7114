package admin

import (
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
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
	if text := damageText(err); len(p.damage) < maxDamage {
		p.damage = append(p.damage, text)
		p.bytes += len(text)
	}
	return true
}

// damageText returns the sentence about an item that cannot be read.
func damageText(err error) string { return strings.TrimPrefix(err.Error(), "keystore: ") }

// maxDamage is how many sentences about damage a page has. These sentences take less than 100 KB,
// so a page has space for items. CheckIntegrity reads everything.
const maxDamage = 100

// A page token is a hash of the request and the cursor, and then the cursor of the last item of the
// page. So a token of another request is noticed, and a damaged token. The request is without its
// page size and page token.

const tokenHash = 12 // bytes

func pageToken(request proto.Message, cursor string) (string, error) {
	wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return "", invalid("the request cannot be encoded")
	}
	name := request.ProtoReflect().Descriptor().FullName()
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %s %s", name, cursor, wire))
	return base64.RawURLEncoding.EncodeToString(append(sum[:tokenHash], cursor...)), nil
}

// pageCursor returns the cursor in a page token, or an empty cursor if the token is empty.
func pageCursor(request proto.Message, token string) (string, error) {
	if token == "" {
		return "", nil
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(text) <= tokenHash {
		return "", errPageToken
	}
	cursor := string(text[tokenHash:])
	if want, err := pageToken(request, cursor); err != nil || token != want {
		return "", errPageToken
	}
	return cursor, nil
}
