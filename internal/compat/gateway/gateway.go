// Package gateway has the code that protoc-gen-grpc-gateway makes for the health service.
package gateway

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate
