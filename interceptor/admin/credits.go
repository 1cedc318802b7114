package admin

import (
	"context"
	"errors"

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
				return nil, err
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
			return once(c, r.RequestId, r, c.addCredits)
		})
}

func (c *call) addCredits(r *adminpb.AddCreditsRequest) (*adminpb.AddCreditsResponse, error) {
	id, err := c.target("name", r.Name, r.Etag)
	if err != nil {
		return nil, err
	}
	if err := c.operator().AddCredits(c.ctx, id, r.Add); err != nil {
		return nil, err
	}
	key, err := c.present(id)
	return &adminpb.AddCreditsResponse{Key: key}, err
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
