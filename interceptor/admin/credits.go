package admin

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func (s *keyService) SetCredits(
	ctx context.Context, r *adminpb.SetCreditsRequest,
) (*adminpb.SetCreditsResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_SetCredits_FullMethodName, r,
		func(c *call) (*adminpb.SetCreditsResponse, error) {
			id, err := c.target("name", r.Name, r.Etag)
			if err != nil {
				return nil, err
			}
			credits, err := creditsOf("credits", r.GetCredits())
			if err != nil {
				return nil, err
			}
			if credits == nil && !r.GetUnlimited() {
				return nil, invalid("the request has neither credits, nor unlimited set to true: " +
					"set one of the two")
			}
			if err := c.operator().SetCredits(c.ctx, id, credits); err != nil {
				return nil, creditsError(err)
			}
			key, err := c.present(id)
			return &adminpb.SetCreditsResponse{Key: key}, err
		})
}

func (s *keyService) AddCredits(
	ctx context.Context, r *adminpb.AddCreditsRequest,
) (*adminpb.AddCreditsResponse, error) {
	return answer(s.Server, ctx, adminpb.KeyService_AddCredits_FullMethodName, r,
		func(c *call) (*adminpb.AddCreditsResponse, error) {
			id, err := c.target("name", r.Name, r.Etag)
			if err != nil {
				return nil, err
			}
			if r.RequestId == "" {
				err = c.operator().AddCredits(c.ctx, id, r.Add)
			} else {
				err = c.addOnce(id, r)
			}
			if err != nil {
				return nil, creditsError(err)
			}
			key, err := c.present(id)
			return &adminpb.AddCreditsResponse{Key: key}, err
		})
}

// An addition is what the Server knows of an earlier call of AddCredits with the same request_id.
type addition struct {
	revision uint64 // of the key, before the credits were added; 0: there was no attempt yet
	doubt    bool   // the store did not answer, so the credits may have been added
}

// addOnce adds the credits of a request with a request_id, and adds nothing if an earlier call with
// the request_id has added the credits. If the outcome of the earlier call is not known, addOnce
// adds the credits only to the revision that the earlier call has seen, so one of the two calls has
// no effect: the store writes the key with a new revision when it adds credits.
func (c *call) addOnce(id string, r *adminpb.AddCreditsRequest) error {
	attempts := *c
	attempts.method += " attempts"
	a, err := once(&attempts, r.RequestId, r, func(*adminpb.AddCreditsRequest) (*addition, error) {
		return new(addition), nil
	})
	if err != nil {
		return err
	}
	// Only one call at a time is in the function, so no other call uses a.
	_, err = once(c, r.RequestId, r, func(*adminpb.AddCreditsRequest) (struct{}, error) {
		return struct{}{}, a.add(c, id, r.Add)
	})
	return err
}

// add makes an attempt to add n credits.
func (a *addition) add(c *call, id string, n int64) error {
	for {
		o := c.operator()
		if !a.doubt {
			key, err := c.store.Get(c.ctx, id)
			if err != nil {
				return err
			}
			a.revision = key.Revision
		}
		if o.Revision == 0 {
			o.Revision = a.revision
		}
		err := o.AddCredits(c.ctx, id, n)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, keystore.ErrConflict) && a.doubt:
			return errAddedOrNot
		case errors.Is(err, keystore.ErrConflict) && c.revision == 0:
			continue // another change was first
		}
		switch statusOf(err, true).Code() {
		case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
			a.doubt = true
		}
		return err
	}
}

var (
	errAddedOrNot = refuse(codes.Aborted, "ETAG_MISMATCH", "the store did not answer an earlier "+
		"call with this request_id, which may have added the credits, and the key has changed "+
		"since: get the key, and decide again", nil)
	errCreditsNotEverywhere = refuse(codes.Unavailable, "NOT_EVERYWHERE", "the credits are changed, "+
		"but another process of the store may not know the change yet: a second call may change "+
		"the credits again", nil)
)

// creditsError returns the error of a call that was to change credits. In contrast to other
// changes, the same change a second time is another change: credits are added twice, or those that
// were spent in between come back.
func creditsError(err error) error {
	if errors.Is(err, keystore.ErrNotEverywhere) {
		return errCreditsNotEverywhere
	}
	return err
}

// present returns the message for a key as the key is now.
func (c *call) present(id string) (*adminpb.Key, error) {
	key, err := c.store.Get(c.ctx, id)
	if err != nil {
		return nil, err
	}
	return c.withCredits(key)
}

// withCredits returns the message for a key, with the credits of the key.
func (c *call) withCredits(key *keystore.Key) (*adminpb.Key, error) {
	m := keyProto(key)
	if !key.Metered() || key.ID == "" {
		return m, nil
	}
	credits, err := c.store.Credits(c.ctx, key.ID)
	switch {
	case errors.Is(err, keystore.ErrCorrupt):
		credits = new(keystore.Credits) // the key admits no caller, until SetCredits
	case errors.Is(err, keystore.ErrNotFound):
		return m, nil // purged since
	case err != nil:
		return nil, err
	}
	m.Credits = creditsProto(credits)
	return m, nil
}

// creditsProto returns the message for credits, and nil for nil.
func creditsProto(c *keystore.Credits) *adminpb.Credits {
	if c == nil {
		return nil
	}
	m := &adminpb.Credits{Remaining: c.Remaining}
	r := c.Refill
	if r == (keystore.Refill{}) {
		return m
	}
	m.Refill = &adminpb.Refill{Amount: r.Amount}
	switch {
	case r.Every != 0:
		m.Refill.When = &adminpb.Refill_Every{Every: durationpb.New(r.Every)}
	case r.Daily:
		m.Refill.When = &adminpb.Refill_Daily{Daily: true}
	default:
		m.Refill.When = &adminpb.Refill_MonthDay{MonthDay: int32(r.MonthDay)}
	}
	return m
}

// creditsOf returns the credits of a message, and nil for nil. The store checks the numbers. field
// is the name of the field.
func creditsOf(field string, m *adminpb.Credits) (*keystore.Credits, error) {
	if m == nil {
		return nil, nil
	}
	c := &keystore.Credits{Remaining: m.Remaining}
	if m.Refill == nil {
		return c, nil
	}
	every := m.Refill.GetEvery()
	if every != nil && every.CheckValid() != nil {
		return nil, invalid("%s.refill.every is not a duration", field)
	}
	c.Refill = keystore.Refill{Amount: m.Refill.Amount, Every: every.AsDuration(),
		Daily: m.Refill.GetDaily(), MonthDay: int(m.Refill.GetMonthDay())}
	if c.Refill == (keystore.Refill{}) {
		return nil, invalid("%s.refill is empty: leave refill unset for credits without a refill",
			field)
	}
	return c, nil
}
