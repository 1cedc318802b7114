// Package adminpb has the messages and the clients of the services that manage keys. The code is
// generated from ../proto, which documents the services. Package admin implements the services.
//
// Never print or log a message that can hold a secret: see SecretMethods of package admin.
package adminpb

// The second command refuses a change that breaks the API in admin.binpb. The third command adds
// what is new to admin.binpb.

//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 lint ../proto
//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 breaking ../proto --against ../proto/admin.binpb
//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 build ../proto --exclude-source-info -o ../proto/admin.binpb
//go:generate go run github.com/bufbuild/buf/cmd/buf@v1.75.0 generate ../proto --template ../proto/buf.gen.yaml
