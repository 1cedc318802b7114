package keystore

import "context"

// parts returns what a session consists of, for tests that need it apart; nil after an error.
func parts(s *Session, err error) (context.Context, *Key, context.CancelFunc, error) {
	if err != nil {
		return nil, nil, nil, err
	}
	return s.Context(), s.Key(), s.Close, nil
}
