package interceptor_test

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
)

const (
	stringOption = descriptorpb.FieldDescriptorProto_TYPE_STRING
	boolOption   = descriptorpb.FieldDescriptorProto_TYPE_BOOL
)

// link registers a service linked.<name> with one method, M. As in generated code, the options of
// the method are in wire form, and the parser of the file did not know them.
func link(t *testing.T, name string, set func(*descriptorpb.MethodOptions)) {
	t.Helper()
	path := "grpc_api_key/test/linked_" + name + ".proto"
	if _, err := protoregistry.GlobalFiles.FindFileByPath(path); err == nil {
		return // by an earlier run of the test
	}
	options := new(descriptorpb.MethodOptions)
	set(options)
	wire, err := proto.Marshal(options)
	require.NoError(t, err)
	options = new(descriptorpb.MethodOptions)
	require.NoError(t, proto.Unmarshal(wire, options))
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: &path, Package: proto.String("linked"),
		Dependency: []string{"grpc/testing/empty.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{Name: &name,
			Method: []*descriptorpb.MethodDescriptorProto{{
				Name: proto.String("M"), InputType: proto.String(".grpc.testing.Empty"),
				OutputType: proto.String(".grpc.testing.Empty"),
				Options:    options,
			}}}},
	}, protoregistry.GlobalFiles)
	require.NoError(t, err)
	require.NoError(t, protoregistry.GlobalFiles.RegisterFile(file))
}

func TestRulesFromRefusesScopesThatNoKeyCanHave(t *testing.T) {
	store := openStore(t)
	one := extension(t, protoregistry.GlobalFiles, "bad_one", 50101, stringOption, false)
	list := extension(t, protoregistry.GlobalFiles, "bad_list", 50102, stringOption, true)
	link(t, "BadOne", func(o *descriptorpb.MethodOptions) {
		proto.SetExtension(o, one, "orders:read\n")
	})
	link(t, "BadList", func(o *descriptorpb.MethodOptions) {
		scopes := list.New().List()
		scopes.Append(protoreflect.ValueOfString("good"))
		scopes.Append(protoreflect.ValueOfString("not good"))
		o.ProtoReflect().Set(list.TypeDescriptor(), protoreflect.ValueOfList(scopes))
	})
	_, err := interceptor.New(store, interceptor.RulesFrom(one))
	require.ErrorContains(t, err,
		`RulesFrom: /linked.BadOne/M: the scope "orders:read\n" holds the character`)
	_, err = interceptor.New(store, interceptor.RulesFrom(list))
	require.ErrorContains(t, err,
		`RulesFrom: /linked.BadList/M: the scope "not good" holds the character`)
}

func TestRulesFromRefusesPublicMethodWithScopes(t *testing.T) {
	public := extension(t, protoregistry.GlobalFiles, "torn_public", 50111, boolOption, false)
	scope := extension(t, protoregistry.GlobalFiles, "torn_scope", 50112, stringOption, false)
	link(t, "Torn", func(o *descriptorpb.MethodOptions) {
		proto.SetExtension(o, public, true)
		proto.SetExtension(o, scope, "a")
	})
	_, err := interceptor.New(openStore(t), interceptor.RulesFrom(public),
		interceptor.RulesFrom(scope))
	require.ErrorContains(t, err, "/linked.Torn/M: the method is public and requires scopes")
}

// A method is public if one of the options makes it public, whatever the other options are, in
// either order.
func TestRulesFromTwoBools(t *testing.T) {
	store := openStore(t)
	yes := extension(t, protoregistry.GlobalFiles, "two_yes", 50121, boolOption, false)
	no := extension(t, protoregistry.GlobalFiles, "two_no", 50122, boolOption, false)
	link(t, "Two", func(o *descriptorpb.MethodOptions) {
		proto.SetExtension(o, yes, true)
		proto.SetExtension(o, no, false)
	})
	for _, opts := range [][]interceptor.Option{
		{interceptor.RulesFrom(yes), interceptor.RulesFrom(no)},
		{interceptor.RulesFrom(no), interceptor.RulesFrom(yes)},
	} {
		auth := newAuth(t, store, opts...)
		require.NoError(t, direct(t.Context(), auth, "/linked.Two/M"))
	}
}

func TestRulesFromRefusesAnExtensionOfAnotherMessage(t *testing.T) {
	fd, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("elsewhere.proto"), Package: proto.String("ruled"),
		Dependency: []string{"google/protobuf/descriptor.proto"},
		Extension: []*descriptorpb.FieldDescriptorProto{{
			Name: proto.String("elsewhere"), Number: proto.Int32(50131), Type: stringOption.Enum(),
			Label:    descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum(),
			Extendee: proto.String(".google.protobuf.ServiceOptions"),
		}},
	}, protoregistry.GlobalFiles)
	require.NoError(t, err)
	_, err = interceptor.New(openStore(t),
		interceptor.RulesFrom(dynamicpb.NewExtensionType(fd.Extensions().Get(0))))
	require.EqualError(t, err,
		"interceptor: RulesFrom: ruled.elsewhere extends google.protobuf.ServiceOptions: "+
			"it must extend google.protobuf.MethodOptions")
}
