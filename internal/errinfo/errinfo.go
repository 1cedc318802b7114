// Package errinfo makes the statuses that the services of this module send. Each status has one
// ErrorInfo, as Google's guidelines require (AIP-193).
package errinfo

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Domain is the domain of every ErrorInfo.
const Domain = "github.com/grpc-api-key/grpc-api-key"

// New returns a status with an ErrorInfo, and perhaps more details. The code must not be OK.
func New(
	code codes.Code, reason, text string, metadata map[string]string, more ...protoadapt.MessageV1,
) *status.Status {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: Domain, Metadata: metadata}
	st, err := status.New(code, text).WithDetails(append([]protoadapt.MessageV1{info}, more...)...)
	if err != nil {
		panic(err) // WithDetails accepts every message that is linked into the program
	}
	return st
}

// Soon returns a RetryInfo of half a second to one and a half seconds. All clients of a server may
// be refused at the same moment, and must not all come back at the same moment.
func Soon() *errdetails.RetryInfo {
	delay := time.Second/2 + rand.N(time.Second)
	return &errdetails.RetryInfo{RetryDelay: durationpb.New(delay)}
}

// MissingScope returns the status for a key that lacks the scopes that a method needs.
func MissingScope(scopes []string) *status.Status {
	return New(codes.PermissionDenied, "INSUFFICIENT_SCOPE",
		fmt.Sprintf("the API key lacks a scope that this method needs: %s",
			strings.Join(scopes, ", ")),
		map[string]string{"scopes": strings.Join(scopes, " ")})
}
