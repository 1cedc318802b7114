// Package keycreds sends an API key with every call of a gRPC client. It is the other side of package
// [github.com/grpc-api-key/grpc-api-key/interceptor], and depends on gRPC alone.
//
//	conn, err := grpc.NewClient("api.example.com:443",
//		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
//		grpc.WithPerRPCCredentials(keycreds.New(os.Getenv("API_KEY"))))
//
// The key goes into the metadata of each unary call, and of each stream when it opens, under the name authorization
// and after the scheme Bearer. [WithHeader] changes that; but gRPC's binary log omits authorization, and no other
// name.
//
// # TLS
//
// The key is sent only over a connection that has privacy and integrity, which is what TLS gives. With
// [google.golang.org/grpc/credentials/insecure], grpc.NewClient refuses the dial option, and a call that has the call
// option fails before anything of it is sent. Transport credentials of somebody else's must say that they have both, in
// the CommonAuthInfo of their AuthInfo. [AllowInsecure] lifts that, for tests and for links that are trusted otherwise.
//
// A unix socket needs no TLS: [google.golang.org/grpc/credentials/local] vouches for it.
//
//	conn, err := grpc.NewClient("unix:///run/api.sock",
//		grpc.WithTransportCredentials(local.NewCredentials()),
//		grpc.WithPerRPCCredentials(keycreds.New(key)))
//
// It does not vouch for TCP, not even to 127.0.0.1: there, use TLS or AllowInsecure.
//
// # One key for a call
//
// A connection's credentials (grpc.WithPerRPCCredentials) and a call's (grpc.PerRPCCredentials) add up: the server
// gets two keys, and package interceptor refuses that, even if they are equal. Use one of the two. To call under
// several keys, give the connection none, and each call its own. Of several credentials on one connection that use
// the same header, gRPC sends one.
//
// # Rotation
//
// [FromSource] asks for the key on every call, so that a new key needs no new connection. A stream
// that is open goes on under the key that it was opened with. [FromFile] reads a file again when it
// changes, such as a mounted secret. Replace the file by a rename, which readers see whole.
//
// # Errors
//
// New, FromSource and FromFile return no error; a call fails with it instead, before anything of
// the call is sent. None holds the key, but that of a source is passed on as it is.
//
//	what is wrong                                            the call's code
//	the key: empty, over 512 bytes, white space inside,
//	or other characters than printable ASCII                 Unauthenticated
//	not the key, or something around it: quotes, NAME=key,
//	${NAME}, a comma or semicolon at the end, a hint         Unauthenticated
//	a connection without privacy and integrity               Unauthenticated
//	the source returned an error, or panicked; the file
//	cannot be read                                           Unavailable
//	the call was cancelled, or late, before the source
//	returned its error                                       Canceled, DeadlineExceeded
//	a bad header or scheme, a nil source                     Internal
//
// Unauthenticated asks for another key, as it does when the server refuses one (whose refusals carry an ErrorInfo;
// these errors do not). A source in trouble says nothing about the key, and may recover: hence Unavailable, the code
// that clients retry, whatever code the source's own error has. errors.Is and errors.As find that error in what the
// call returns. Nearly the same codes are in gRPC's own credentials/jwt (gRFC A97). FailedPrecondition and
// InvalidArgument are not used, because gRPC keeps credentials from returning them (gRFC A54).
package keycreds
