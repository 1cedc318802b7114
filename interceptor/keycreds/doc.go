// Package keycreds sends an API key with every call of a gRPC client. The server uses package
// [github.com/grpc-api-key/grpc-api-key/interceptor]. Package keycreds depends on gRPC alone.
//
//	conn, err := grpc.NewClient("api.example.com:443",
//		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
//		grpc.WithPerRPCCredentials(keycreds.New(os.Getenv("API_KEY"))))
//
// Each unary call, and each new stream, carries the key in its metadata, in the header
// authorization after the scheme Bearer. [WithHeader] changes the header and the scheme. But the
// binary log of gRPC leaves out only the header authorization.
//
// # TLS
//
// The credentials send the key only over a connection with privacy and integrity, such as TLS. With
// [google.golang.org/grpc/credentials/insecure], grpc.NewClient returns an error for the dial
// option, and a call with the call option fails before anything is sent. Custom transport
// credentials must report privacy and integrity in the CommonAuthInfo of their AuthInfo.
// [AllowInsecure] removes this condition, for tests and for links that are secured otherwise.
//
// A unix socket needs no TLS, if the connection uses
// [google.golang.org/grpc/credentials/local]:
//
//	conn, err := grpc.NewClient("unix:///run/api.sock",
//		grpc.WithTransportCredentials(local.NewCredentials()),
//		grpc.WithPerRPCCredentials(keycreds.New(key)))
//
// Package local does not treat TCP as secure, not even to 127.0.0.1. For TCP, use TLS or
// AllowInsecure.
//
// # One key per call
//
// gRPC sends the credentials of a connection (grpc.WithPerRPCCredentials) and those of a call
// (grpc.PerRPCCredentials). With both, the server gets two keys, and package interceptor refuses
// the call, even if the keys are equal. Use one of the two. To make calls with several keys, give
// the connection no key, and give each call a key. If one connection has several credentials for
// the same header, gRPC sends one of them.
//
// # Rotation
//
// [FromSource] calls a function for the key of every call, so a new key needs no new connection. An
// open stream keeps the key that opened the stream. [FromFile] reads a file, such as a mounted
// secret, and reads the file again when it has changed. To replace the file, rename a new file over
// it, so that a reader never sees half a file.
//
// # Errors
//
// New, FromSource and FromFile return no error. A mistake makes every call fail before anything is
// sent. No error contains the key, but the error of a source is passed on unchanged.
//
//	mistake                                                 code of the call
//	a key that is empty, longer than 512 bytes, has white
//	space inside, or is not printable ASCII                 Unauthenticated
//	text that is not a key, or has more than the key:
//	quotation marks, NAME=key, ${NAME}, a comma or
//	semicolon at the end, the hint of a key                 Unauthenticated
//	a connection without privacy and integrity              Unauthenticated
//	the source returned an error or panicked, or the file
//	cannot be read                                          Unavailable
//	the call was cancelled, or its deadline passed, before
//	the source returned its error                           Canceled, DeadlineExceeded
//	a bad header or scheme, or a nil source                 Internal
//
// Unauthenticated means that the client needs another key. A server that refuses a key uses the
// same code, but its status has an ErrorInfo, and the errors of this package do not. The failure of
// a source says nothing about the key, and the source may recover. So the code is Unavailable,
// which clients retry, for every code of the error of the source. errors.Is and errors.As find that
// error in the error of the call. The package credentials/jwt of gRPC uses nearly the same codes
// (gRFC A97). The codes FailedPrecondition and InvalidArgument do not occur, because gRPC forbids
// credentials to return them (gRFC A54).
//
// # Why a server refused a call
//
// The ErrorInfo is one of the details of the status: see the example Refused. To read it, import
// google.golang.org/genproto/googleapis/rpc/errdetails. In a program without that package, the
// detail is an error with the text "proto: not found".
package keycreds
