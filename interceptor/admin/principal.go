package admin

import (
	"context"
	"fmt"

	"google.golang.org/grpc/peer"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/manage"
)

// callerOf returns who makes a call: the holder of the key that an Authenticator has left in the
// context, or else the peer of a unix socket. The key comes first, because a key has a ceiling. If
// the call has no principal, ok is false, and the Caller may do nothing.
func callerOf(ctx context.Context) (c manage.Caller, ok bool) {
	if key, ok := interceptor.FromContext(ctx); ok {
		return manage.KeyHolder("key:"+key.ID, key), true
	}
	if p, ok := peer.FromContext(ctx); ok {
		if user, ok := p.AuthInfo.(peerUser); ok {
			return manage.LocalUser(user.principal()), true
		}
	}
	return manage.Caller{}, false
}

// principal returns the user as the actor of events: unix:alice(1000), or unix:1000 if the user has
// no name.
func (u peerUser) principal() string {
	if u.name == "" {
		return fmt.Sprintf("unix:%d", u.uid)
	}
	return fmt.Sprintf("unix:%.128s(%d)", u.name, u.uid)
}
