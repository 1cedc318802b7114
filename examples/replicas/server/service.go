package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"

	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A service is a placeholder for your service.
type service struct {
	testpb.UnimplementedTestServiceServer
	name string // of the server
}

// UnaryCall returns the name of the caller's key, and the name of the server.
func (s service) UnaryCall(
	ctx context.Context, _ *testpb.SimpleRequest,
) (*testpb.SimpleResponse, error) {
	key, ok := interceptor.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "no key in the context")
	}
	return &testpb.SimpleResponse{Username: key.Name, ServerId: s.name}, nil
}

// FullDuplexCall answers each message with the payload of the message.
func (s service) FullDuplexCall(stream testpb.TestService_FullDuplexCallServer) error {
	for {
		in, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		err = stream.Send(&testpb.StreamingOutputCallResponse{Payload: in.Payload})
		if err != nil {
			return err
		}
	}
}

// readCommands creates and revokes keys until the standard input ends. The first word of each
// answer says what was done. The key itself appears in the answer to "create", and nowhere else.
func readCommands(ctx context.Context, store *keystore.Store) {
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		command, argument, _ := strings.Cut(in.Text(), " ")
		switch command {
		case "create":
			issued, err := store.Create(ctx, keystore.Spec{Name: argument})
			if err != nil {
				fmt.Println("failed", err)
				continue
			}
			fmt.Println("created", issued.Key.ID, issued.Secret.Reveal())
		case "revoke":
			if err := store.Revoke(ctx, argument, "leaked"); err != nil {
				fmt.Println("failed", err)
				continue
			}
			fmt.Println("revoked", argument)
		default:
			fmt.Println("failed: the commands are create NAME and revoke ID")
		}
	}
}
