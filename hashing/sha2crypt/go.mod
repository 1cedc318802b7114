module github.com/grpc-api-key/grpc-api-key/hashing/sha2crypt

go 1.26.0

replace github.com/grpc-api-key/grpc-api-key => ../..

require (
	github.com/go-crypt/x v0.4.17
	github.com/grpc-api-key/grpc-api-key v0.0.0-00010101000000-000000000000
	github.com/stretchr/testify v1.12.1
)

require go.yaml.in/yaml/v3 v3.0.5 // indirect
