package interceptor

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// RulesFrom reads the rules of methods from an option of your own on them in your .proto files:
//
//	extend google.protobuf.MethodOptions {
//	  repeated string scopes = 50001;
//	}
//	rpc Get(GetRequest) returns (GetResponse) { option (scopes) = "orders:read"; }
//
// with interceptor.RulesFrom(orderspb.E_Scopes). A string, or a repeated one, names scopes that a key must have, all of
// them, as Require does; a bool that is true makes the method Public. It goes through every service that is linked into
// the program, so that Check does not ask for them. A method that another option names keeps the rule of that option.
// New refuses a scope that no key can have, as for Require.
func RulesFrom(ext protoreflect.ExtensionType) Option {
	return Option{func(c *config) error {
		if isNil(ext) {
			return errors.New("RulesFrom: the extension is nil")
		}
		d := ext.TypeDescriptor()
		if d.ContainingMessage().FullName() != "google.protobuf.MethodOptions" {
			return fmt.Errorf("RulesFrom: %s extends %s: it must extend google.protobuf.MethodOptions", d.FullName(), d.ContainingMessage().FullName())
		}
		if d.ContainingMessage() != new(descriptorpb.MethodOptions).ProtoReflect().Descriptor() {
			// No method would seem to have it.
			return fmt.Errorf("RulesFrom: %s extends another google.protobuf.MethodOptions than that of package descriptorpb: "+
				"build it on protoregistry.GlobalFiles", d.FullName())
		}
		if !(d.Kind() == protoreflect.StringKind || d.Kind() == protoreflect.BoolKind && !d.IsList()) {
			return fmt.Errorf("RulesFrom: %s is a %v: it must be a string, a repeated string, or a bool", d.FullName(), d.Kind())
		}
		c.extensions = append(c.extensions, ext)
		return nil
	}}
}

// readRules adds the rules of all extensions, behind those that were given by name.
func (c *config) readRules() error {
	named := make(map[string]bool, len(c.rules.methods))
	for m := range c.rules.methods {
		named[m] = true
	}
	var failed error
	protoregistry.GlobalFiles.RangeFiles(func(file protoreflect.FileDescriptor) bool {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				full := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
				r, ok, err := c.ruleOf(m)
				if err == nil && ok && !named[full] {
					r.fromProto = true
					err = c.rules.add(full, r)
				}
				if err != nil {
					failed = fmt.Errorf("RulesFrom: %s: %w", full, err)
					return false
				}
			}
		}
		return true
	})
	return failed
}

func (c *config) ruleOf(m protoreflect.MethodDescriptor) (r rule, ok bool, err error) {
	for _, ext := range c.extensions {
		options, err := optionsOf(m, ext)
		if err != nil {
			return rule{}, false, err
		}
		if !proto.HasExtension(options, ext) {
			continue
		}
		value, d := options.ProtoReflect().Get(ext.TypeDescriptor()), ext.TypeDescriptor()
		switch {
		case d.IsList():
			for i := range value.List().Len() {
				r.scopes = append(r.scopes, value.List().Get(i).String())
			}
		case d.Kind() == protoreflect.BoolKind:
			r.public = r.public || value.Bool()
		default:
			r.scopes = append(r.scopes, value.String())
		}
	}
	for _, s := range r.scopes {
		if err := checkScope(s); err != nil {
			return rule{}, false, err
		}
	}
	if r.public && len(r.scopes) > 0 {
		return rule{}, false, errors.New("it is public and requires scopes: choose one")
	}
	return r, r.public || len(r.scopes) > 0, nil
}

// optionsOf returns the options of a method, read by one who knows ext. Where ext is not registered, it was an unknown
// field to whoever read them before, and a rule that is overlooked lets every key in.
func optionsOf(m protoreflect.MethodDescriptor, ext protoreflect.ExtensionType) (*descriptorpb.MethodOptions, error) {
	wire, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m.Options())
	if err != nil {
		return nil, err
	}
	known := new(protoregistry.Types)
	if err := known.RegisterExtension(ext); err != nil {
		return nil, err
	}
	options := new(descriptorpb.MethodOptions)
	if err := (proto.UnmarshalOptions{AllowPartial: true, Resolver: known}).Unmarshal(wire, options); err != nil {
		return nil, err
	}
	for rest := options.ProtoReflect().GetUnknown(); len(rest) > 0; {
		number, _, n := protowire.ConsumeField(rest)
		if number == ext.TypeDescriptor().Number() {
			return nil, fmt.Errorf("its option %d is not what %s says", number, ext.TypeDescriptor().FullName())
		}
		rest = rest[n:]
	}
	return options, nil
}
