// Package grpcapikey is the root of a library that has its code in other packages:
//
//   - [github.com/grpc-api-key/grpc-api-key/keystore]: the life of a key: create, verify, bind,
//     revoke, list
//   - [github.com/grpc-api-key/grpc-api-key/interceptor]: the server's side of gRPC
//   - [github.com/grpc-api-key/grpc-api-key/interceptor/keycreds]: the client's side
//   - [github.com/grpc-api-key/grpc-api-key/hashing]: what is stored in a token's place
//   - [github.com/grpc-api-key/grpc-api-key/keystore/backend]: for storage other than a directory
package grpcapikey
