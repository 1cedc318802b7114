// Package grpcapikey is the root of a library that has its code in other packages:
//
//   - [github.com/grpc-api-key/grpc-api-key/keystore]: the life of a key: create, verify, bind,
//     revoke, list
//   - [github.com/grpc-api-key/grpc-api-key/interceptor]: the server's side of gRPC
//   - [github.com/grpc-api-key/grpc-api-key/interceptor/keycreds]: the client's side of gRPC
//   - [github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys]: net/http, both sides; module
//     interceptor/connectkeys is for Connect
//   - [github.com/grpc-api-key/grpc-api-key/interceptor/admin]: the server of cmd/apikeyctl
//   - [github.com/grpc-api-key/grpc-api-key/keystore/console]: pages for operators
//   - [github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys]: OpenTelemetry; module
//     keystore/promkeys is for Prometheus
//   - [github.com/grpc-api-key/grpc-api-key/keystore/importer]: keys from other systems
//   - [github.com/grpc-api-key/grpc-api-key/keystore/keystoretest]: a store for tests of services
//   - [github.com/grpc-api-key/grpc-api-key/hashing]: what is stored in a token's place
//   - [github.com/grpc-api-key/grpc-api-key/keystore/backend]: for storage other than a directory;
//     modules keystore/etcdstore and keystore/pgstore are for several processes
package grpcapikey
