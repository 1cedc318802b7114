package peers

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"fmt"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// startJWT returns the start function of a peer with golang-jwt and one algorithm, inside the
// interceptor of go-grpc-middleware. The peer has no storage, so a JWT cannot be revoked before the
// JWT expires.
func startJWT(name string) func(context.Context, string) (*Peer, error) {
	return func(context.Context, string) (*Peer, error) {
		method, sign, verify, err := jwtKey(name)
		if err != nil {
			return nil, err
		}
		_, other, _, err := jwtKey(name)
		if err != nil {
			return nil, err
		}
		const issuer, audience = "https://id.example.com", "orders.example.com"
		parser := jwt.NewParser(
			jwt.WithValidMethods([]string{method.Alg()}),
			jwt.WithIssuer(issuer), jwt.WithAudience(audience), jwt.WithExpirationRequired(),
		)
		keyFor := func(*jwt.Token) (any, error) { return verify, nil }
		p := guard(func(_ context.Context, credential string) (*principal, error) {
			var claims jwt.RegisteredClaims
			if _, err := parser.ParseWithClaims(credential, &claims, keyFor); err != nil {
				return nil, errRefused
			}
			return &principal{claims.Subject}, nil
		})
		p.How = "golang-jwt checks issuer, audience and expiry; " +
			"there is no look-up, so a credential cannot be revoked"
		signed := func(caller int, key any) (string, error) {
			now := time.Now()
			return jwt.NewWithClaims(method, jwt.RegisteredClaims{
				Subject:   fmt.Sprintf("caller-%04d", caller),
				Issuer:    issuer,
				Audience:  jwt.ClaimStrings{audience},
				IssuedAt:  jwt.NewNumericDate(now),
				ExpiresAt: jwt.NewNumericDate(now.Add(24 * time.Hour)),
			}).SignedString(key)
		}
		for i := range Clients {
			text, err := signed(i, sign)
			if err != nil {
				return nil, err
			}
			p.Good = append(p.Good, text)
		}
		p.Bad, err = signed(0, other)
		return p, err
	}
}

func jwtKey(name string) (method jwt.SigningMethod, sign, verify any, err error) {
	switch name {
	case HS256:
		secret := make([]byte, 32)
		_, err = rand.Read(secret)
		return jwt.SigningMethodHS256, secret, secret, err
	case RS256:
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			return nil, nil, nil, err
		}
		return jwt.SigningMethodRS256, key, &key.PublicKey, nil
	case ES256:
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, nil, nil, err
		}
		return jwt.SigningMethodES256, key, &key.PublicKey, nil
	case EdDSA:
		public, private, err := ed25519.GenerateKey(rand.Reader)
		return jwt.SigningMethodEdDSA, private, public, err
	}
	return nil, nil, nil, fmt.Errorf("unknown algorithm %s", name)
}
