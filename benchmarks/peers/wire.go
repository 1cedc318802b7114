package peers

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

// payload is the number of bytes in the request and in the response of every unary call.
const payload = 64

// A Service is the service that every peer guards: the service of the interoperability tests of
// grpc-go, with handlers that do almost nothing. If Duplex is not nil, Duplex handles
// FullDuplexCall.
type Service struct {
	testpb.UnimplementedTestServiceServer
	Duplex func(Duplex) error
}

// A Duplex is the server side of a FullDuplexCall.
type Duplex = grpc.BidiStreamingServer[
	testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse,
]

// UnaryCall returns the payload of the request.
func (*Service) UnaryCall(
	_ context.Context, in *testpb.SimpleRequest,
) (*testpb.SimpleResponse, error) {
	return &testpb.SimpleResponse{Payload: in.Payload}, nil
}

// FullDuplexCall calls Duplex.
func (s *Service) FullDuplexCall(stream Duplex) error {
	if s.Duplex == nil {
		return s.UnimplementedTestServiceServer.FullDuplexCall(stream)
	}
	return s.Duplex(stream)
}

// Serve serves the service on a loopback socket, until the caller calls stop.
func Serve(s *Service, opts ...grpc.ServerOption) (addr string, stop func() error, err error) {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := grpc.NewServer(append(opts, grpc.WaitForHandlers(true))...)
	testpb.RegisterTestServiceServer(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(lis) }()
	return lis.Addr().String(), func() error {
		server.Stop()
		return <-done
	}, nil
}

// Dial returns a connection that sends the credential with each call. If credential is empty, the
// connection sends no credential.
func Dial(addr, credential string) (*grpc.ClientConn, error) {
	opts := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if credential != "" {
		opts = append(opts, grpc.WithPerRPCCredentials(Bearer(credential)))
	}
	return grpc.NewClient(addr, opts...)
}

// A Bearer is a credential that the client sends unchanged. The callers of all peers use Bearer, so
// that no peer has an advantage from a better client.
type Bearer string

var _ credentials.PerRPCCredentials = Bearer("")

// GetRequestMetadata returns the authorization header.
func (b Bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity returns false, because the credential stays on the loopback interface.
func (b Bearer) RequireTransportSecurity() bool { return false }

// A Rig is a server with connected callers.
type Rig struct {
	conns []*grpc.ClientConn
	stop  func() error
}

// NewRig starts a server with the options, and connects one caller for each of the credentials.
func NewRig(s *Service, credentials []string, opts ...grpc.ServerOption) (*Rig, error) {
	addr, stop, err := Serve(s, opts...)
	if err != nil {
		return nil, err
	}
	return connect(addr, stop, credentials)
}

// Connect returns a rig whose server runs in another process.
func Connect(addr string, credentials []string) (*Rig, error) {
	return connect(addr, func() error { return nil }, credentials)
}

func connect(addr string, stop func() error, credentials []string) (*Rig, error) {
	r := &Rig{stop: stop}
	for _, c := range credentials {
		conn, err := Dial(addr, c)
		if err != nil {
			return nil, errors.Join(err, r.Close())
		}
		r.conns = append(r.conns, conn)
	}
	return r, nil
}

// Client returns the client of caller i, modulo the number of callers.
func (r *Rig) Client(i int) testpb.TestServiceClient {
	return testpb.NewTestServiceClient(r.conns[i%len(r.conns)])
}

// Call returns a function that makes a unary call as caller i.
func (r *Rig) Call(ctx context.Context, i int) func() error {
	call := r.CallWith(ctx, i)
	return func() error { return call() }
}

// CallWith is like Call, but the returned function accepts call options.
func (r *Rig) CallWith(ctx context.Context, i int) func(...grpc.CallOption) error {
	client := r.Client(i)
	request := &testpb.SimpleRequest{Payload: &testpb.Payload{Body: make([]byte, payload)}}
	return func(opts ...grpc.CallOption) error {
		_, err := client.UnaryCall(ctx, request, opts...)
		return err
	}
}

// Close closes the connections and stops the server.
func (r *Rig) Close() error {
	var errs []error
	for _, c := range r.conns {
		errs = append(errs, c.Close())
	}
	return errors.Join(append(errs, r.stop())...)
}
