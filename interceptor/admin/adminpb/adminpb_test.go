package adminpb_test

import (
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
)

// The generated code, and the file that a change of the API is compared with, are from the same
// proto: the command that updates both refuses a change that breaks the API.
func TestGeneratedCodeIsTheAPI(t *testing.T) {
	text, err := os.ReadFile("../proto/admin.binpb")
	require.NoError(t, err)
	api := new(descriptorpb.FileDescriptorSet)
	require.NoError(t, proto.Unmarshal(text, api))
	code := protodesc.ToFileDescriptorProto(adminpb.File_grpcapikey_admin_v1_admin_proto)
	i := slices.IndexFunc(api.File, func(f *descriptorpb.FileDescriptorProto) bool {
		return f.GetName() == code.GetName() // the other files are its imports
	})
	require.GreaterOrEqual(t, i, 0)
	file := api.File[i]
	file.ProtoReflect().SetUnknown(nil) // an extension of buf
	if !proto.Equal(file, code) {
		require.Equal(t, prototext.Format(file), prototext.Format(code),
			"run go generate ./interceptor/admin/adminpb")
	}
}
