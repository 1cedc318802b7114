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

// RulesFrom reads the rules of methods from your .proto files. Define an option for methods, and
// set the option on each method:
//
//	extend google.protobuf.MethodOptions {
//	  repeated string scopes = 50001;
//	}
//	rpc Get(GetRequest) returns (GetResponse) { option (scopes) = "orders:read"; }
//
// Then give New the option interceptor.RulesFrom(orderspb.E_Scopes). An option of type string or
// repeated string names the scopes that a key must have, all of them, as Require does. An option of
// type bool with the value true makes the method Public.
//
// RulesFrom reads the options of every service that is linked into the program. So Check does not
// complain if the server lacks one of these services. A method that is named in another option,
// such as Require, keeps the rule of that option. New returns an error for a scope that no key can
// have, as for Require.
func RulesFrom(ext protoreflect.ExtensionType) Option {
	return Option{func(c *config) error {
		if isNil(ext) {
			return errors.New("RulesFrom: the extension is nil")
		}
		d := ext.TypeDescriptor()
		if d.ContainingMessage().FullName() != "google.protobuf.MethodOptions" {
			return fmt.Errorf(
				"RulesFrom: %s extends %s: it must extend google.protobuf.MethodOptions",
				d.FullName(), d.ContainingMessage().FullName())
		}
		if d.ContainingMessage() != new(descriptorpb.MethodOptions).ProtoReflect().Descriptor() {
			// With such an extension, every method would appear to lack the option.
			return fmt.Errorf("RulesFrom: %s extends a google.protobuf.MethodOptions "+
				"that is not the one of package descriptorpb: "+
				"build the extension on protoregistry.GlobalFiles", d.FullName())
		}
		isString := d.Kind() == protoreflect.StringKind
		isBool := d.Kind() == protoreflect.BoolKind && !d.IsList()
		if !isString && !isBool {
			return fmt.Errorf("RulesFrom: %s has the type %v: "+
				"it must be a string, a repeated string, or a bool", d.FullName(), d.Kind())
		}
		c.extensions = append(c.extensions, ext)
		return nil
	}}
}

// readRules adds the rules of all RulesFrom extensions. A method that already has a rule by name
// keeps that rule.
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

// ruleOf returns the rule for a method that the RulesFrom extensions give. If ok is false, the
// extensions give no rule.
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
		return rule{}, false, errors.New("the method is public and requires scopes: choose one")
	}
	return r, r.public || len(r.scopes) > 0, nil
}

// optionsOf returns the options of a method, parsed again with knowledge of ext. If ext is not
// registered, the first parse left ext among the unknown fields. To overlook a rule there would
// accept every key.
func optionsOf(
	m protoreflect.MethodDescriptor, ext protoreflect.ExtensionType,
) (*descriptorpb.MethodOptions, error) {
	wire, err := proto.MarshalOptions{AllowPartial: true}.Marshal(m.Options())
	if err != nil {
		return nil, err
	}
	known := new(protoregistry.Types)
	if err := known.RegisterExtension(ext); err != nil {
		return nil, err
	}
	options := new(descriptorpb.MethodOptions)
	unmarshal := proto.UnmarshalOptions{AllowPartial: true, Resolver: known}
	if err := unmarshal.Unmarshal(wire, options); err != nil {
		return nil, err
	}
	for rest := options.ProtoReflect().GetUnknown(); len(rest) > 0; {
		number, _, n := protowire.ConsumeField(rest)
		if number == ext.TypeDescriptor().Number() {
			return nil, fmt.Errorf("the value of option %d does not have the type of %s",
				number, ext.TypeDescriptor().FullName())
		}
		rest = rest[n:]
	}
	return options, nil
}
