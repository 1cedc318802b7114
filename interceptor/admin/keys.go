package admin

import (
	"context"
	"crypto/sha256"
	"errors"
	"net/netip"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A keyService is the KeyService of a Server.
type keyService struct {
	adminpb.UnimplementedKeyServiceServer
	*Server
}

func (s *keyService) CreateKey(
	ctx context.Context, r *adminpb.CreateKeyRequest,
) (*adminpb.CreateKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_CreateKey_FullMethodName, r,
		func(c *call) (*adminpb.CreateKeyResponse, error) {
			if r.ValidateOnly {
				key, err := c.store.Preview(c.ctx, "", c.operator().Within(describe(r.GetKey())))
				if err != nil {
					return nil, err
				}
				m := keyProto(key)
				m.Credits = r.GetKey().GetCredits()
				return &adminpb.CreateKeyResponse{Key: m}, nil
			}
			return once(c, r.RequestId, r, c.create)
		})
}

func (c *call) create(r *adminpb.CreateKeyRequest) (*adminpb.CreateKeyResponse, error) {
	issued, err := c.operator().Create(c.ctx, describe(r.GetKey()))
	if err != nil {
		return nil, err
	}
	m := keyProto(issued.Key)
	m.Credits = r.GetKey().GetCredits()
	return &adminpb.CreateKeyResponse{Key: m, Secret: issued.Secret.Reveal()}, nil
}

// describe returns the change that fills in the Spec of a new key.
func describe(k *adminpb.Key) func(*keystore.Spec) error {
	change := edit(k, []string{"*"})
	return func(spec *keystore.Spec) (err error) {
		if err := change(spec); err != nil {
			return err
		}
		spec.Credits, err = creditsOf("key.credits", k.GetCredits())
		return err
	}
}

// operator returns what changes keys for the caller.
func (c *call) operator() manage.Operator {
	return manage.Operator{Store: c.store, Caller: c.caller, Revision: c.revision}
}

// edit returns the change of a Spec that a caller wants: the fields of k that the mask names.
func edit(k *adminpb.Key, mask []string) func(*keystore.Spec) error {
	if k == nil {
		k = new(adminpb.Key)
	}
	return func(spec *keystore.Spec) error {
		fields, err := masked(k, mask)
		if err != nil {
			return err
		}
		for _, field := range fields {
			if err := field.copy(spec, k); err != nil {
				return err
			}
		}
		return nil
	}
}

func (s *keyService) GetKey(
	ctx context.Context, r *adminpb.GetKeyRequest,
) (*adminpb.GetKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_GetKey_FullMethodName, r,
		func(c *call) (*adminpb.GetKeyResponse, error) {
			id, err := idOf("name", r.Name)
			if err != nil {
				return nil, err
			}
			key, err := c.present(id)
			return &adminpb.GetKeyResponse{Key: key}, err
		})
}

func (s *keyService) UpdateKey(
	ctx context.Context, r *adminpb.UpdateKeyRequest,
) (*adminpb.UpdateKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_UpdateKey_FullMethodName, r,
		func(c *call) (*adminpb.UpdateKeyResponse, error) {
			id, err := c.target("key.name", r.GetKey().GetName(), r.GetKey().GetEtag())
			if err != nil {
				return nil, err
			}
			change := edit(r.GetKey(), r.GetUpdateMask().GetPaths())
			if r.ValidateOnly {
				key, err := c.store.Preview(c.ctx, id, c.operator().Within(change))
				if err != nil {
					return nil, err
				}
				m, err := c.withCredits(key)
				return &adminpb.UpdateKeyResponse{Key: m}, err
			}
			key, err := c.operator().Update(c.ctx, id, change)
			if err != nil {
				return nil, err
			}
			m, err := c.withUse(key)
			return &adminpb.UpdateKeyResponse{Key: m}, err
		})
}

// target returns the ID in the name of the key that a call changes. If the etag is not empty, the
// call changes the key only at the revision in the etag.
func (c *call) target(field, name, etag string) (id string, err error) {
	id, err = idOf(field, name)
	if err != nil {
		return "", err
	}
	c.revision, err = revisionOf(etag)
	if c.revision != 0 {
		c.ctx = keystore.IfRevision(c.ctx, c.revision)
	}
	return id, err
}

// withUse returns the message for a key that a change has returned, with what only Get fills in.
func (c *call) withUse(key *keystore.Key) (*adminpb.Key, error) {
	m, err := c.withCredits(key)
	if err != nil {
		return nil, err
	}
	now, err := c.store.Get(c.ctx, key.ID)
	if err != nil && !errors.Is(err, keystore.ErrNotFound) { // purged since
		return nil, err
	}
	if err == nil {
		m.LastUseTime, m.LiveStreams = timeProto(now.LastUsedAt), count32(now.Live)
	}
	return m, nil
}

func (s *keyService) RotateKey(
	ctx context.Context, r *adminpb.RotateKeyRequest,
) (*adminpb.RotateKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_RotateKey_FullMethodName, r,
		func(c *call) (*adminpb.RotateKeyResponse, error) {
			return once(c, r.RequestId, r, c.rotate)
		})
}

func (c *call) rotate(r *adminpb.RotateKeyRequest) (*adminpb.RotateKeyResponse, error) {
	id, err := c.target("name", r.Name, r.Etag)
	if err != nil {
		return nil, err
	}
	if r.Grace != nil && r.Grace.CheckValid() != nil {
		return nil, invalid("grace is not a duration")
	}
	issued, elsewhere, err := c.operator().Rotate(c.ctx, id, r.GetGrace().AsDuration())
	if err != nil {
		return nil, err
	}
	// From here on, an error would lose the secret.
	m, err := c.withUse(issued.Key)
	if err != nil {
		m = keyProto(issued.Key)
	}
	return &adminpb.RotateKeyResponse{
		Key: m, Secret: issued.Secret.Reveal(), NotEverywhere: elsewhere}, nil
}

func (s *keyService) EnableKey(
	ctx context.Context, r *adminpb.EnableKeyRequest,
) (*adminpb.EnableKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_EnableKey_FullMethodName, r,
		func(c *call) (*adminpb.EnableKeyResponse, error) {
			id, err := c.target("name", r.Name, r.Etag)
			if err != nil {
				return nil, err
			}
			if err := c.operator().Enable(c.ctx, id); err != nil {
				return nil, err
			}
			key, err := c.present(id)
			return &adminpb.EnableKeyResponse{Key: key}, err
		})
}

func (s *keyService) DisableKey(
	ctx context.Context, r *adminpb.DisableKeyRequest,
) (*adminpb.DisableKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_DisableKey_FullMethodName, r,
		func(c *call) (*adminpb.DisableKeyResponse, error) {
			key, ended, err := c.stop(r.Name, r.Reason, r.Etag, manage.Operator.Disable)
			if err != nil {
				return nil, err
			}
			return &adminpb.DisableKeyResponse{Key: key, EndedStreams: ended}, nil
		})
}

func (s *keyService) RevokeKey(
	ctx context.Context, r *adminpb.RevokeKeyRequest,
) (*adminpb.RevokeKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_RevokeKey_FullMethodName, r,
		func(c *call) (*adminpb.RevokeKeyResponse, error) {
			key, ended, err := c.stop(r.Name, r.Reason, r.Etag, manage.Operator.Revoke)
			if err != nil {
				return nil, err
			}
			return &adminpb.RevokeKeyResponse{Key: key, EndedStreams: ended}, nil
		})
}

// A stopping is a method of an Operator that ends the sessions of a key.
type stopping func(
	o manage.Operator, ctx context.Context, id, reason string,
) (key *keystore.Key, ended int, err error)

// stop disables or revokes a key.
func (c *call) stop(
	name, reason, etag string, change stopping,
) (key *adminpb.Key, ended int32, err error) {
	id, err := c.target("name", name, etag)
	if err != nil {
		return nil, 0, err
	}
	stopped, n, err := change(c.operator(), c.ctx, id, reason)
	if err != nil {
		return nil, 0, err
	}
	m, err := c.withCredits(stopped)
	if err != nil {
		m = keyProto(stopped) // an error would say that the key may not be stopped
	}
	return m, count32(n), nil
}

func (s *keyService) LookupKey(
	ctx context.Context, r *adminpb.LookupKeyRequest,
) (*adminpb.LookupKeyResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_LookupKey_FullMethodName, r,
		func(c *call) (*adminpb.LookupKeyResponse, error) {
			var addr netip.Addr // not the address of this caller
			if r.ClientAddress != "" {
				var err error
				if addr, err = netip.ParseAddr(r.ClientAddress); err != nil {
					return nil, invalid("client_address is not an IP address: " +
						"write 192.0.2.1 or 2001:db8::1")
				}
			}
			i, err := c.store.Inspect(keystore.WithClientAddr(c.ctx, addr), r.Token)
			if err != nil {
				return nil, err
			}
			response := &adminpb.LookupKeyResponse{Refusal: keystore.Reason(i.Refusal)}
			if i.KeyID != "" {
				response.ClaimedName = namePrefix + i.KeyID
			}
			if i.Key != nil {
				response.Key, err = c.withCredits(i.Key)
			}
			return response, err
		})
}

// once makes a call that gives out a secret. If the request has an id, a repeat of the request gets
// the same answer. The call then runs to its end even if the client has gone, because a client who
// has lost the connection repeats the request.
func once[Q proto.Message, A any](
	c *call, id string, request Q, do func(Q) (A, error),
) (A, error) {
	if id == "" {
		return do(request)
	}
	var none A
	if len(id) != 36 || uuid.Validate(id) != nil {
		return none, invalid("request_id is not a UUID: write, for example, " +
			"f81d4fae-7dec-41d0-a765-00a0c91e6bf6")
	}
	wire, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return none, invalid("the request cannot be encoded")
	}
	waiting := c.ctx
	c.ctx = context.WithoutCancel(c.ctx)
	value, err := c.answers.Do(waiting, manage.Request{
		Actor: c.caller.Actor(), Method: c.method, ID: id,
	}, sha256.Sum256(wire), func() (any, error) { return do(request) })
	if err != nil {
		return none, err
	}
	return value.(A), nil
}
