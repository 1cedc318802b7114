package admin

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/internal/errinfo"
	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Server implements the KeyService and the StoreService for one store. New makes a Server. A
// Server is safe for concurrent use, and may be registered with several gRPC servers.
type Server struct {
	store     *keystore.Store
	log       *slog.Logger
	answers   *manage.Answers
	inventory *inventory.Inventory
	started   time.Time
}

// An Option is a setting for New. The zero Option has no effect.
type Option struct{ apply func(*Server) }

// Logger reports each call that is refused, and each peer that PeerCredentials refuses under
// ServeUnix, with the principal and the reason. A call that the client has ended has the level
// Debug. The changes of keys are in the events of the store, and in the log of
// keystore.Options.Logger. No secret is logged. Without Logger, or with nil, the Server logs
// nothing.
func Logger(l *slog.Logger) Option {
	return Option{func(s *Server) {
		if l != nil {
			s.log = l
		}
	}}
}

// New returns a Server that manages the keys of a store. The error says which argument cannot be
// used.
func New(store *keystore.Store, opts ...Option) (*Server, error) {
	if store == nil {
		return nil, errors.New("admin: New: the store is nil")
	}
	s := &Server{
		store:     store,
		log:       slog.New(slog.DiscardHandler),
		answers:   manage.NewAnswers(),
		inventory: inventory.New(store, time.Minute),
		started:   time.Now(),
	}
	for _, o := range opts {
		if o.apply != nil {
			o.apply(s)
		}
	}
	return s, nil
}

// Register registers the KeyService and the StoreService. The gRPC server needs an
// interceptor.Authenticator with the Rules, or PeerCredentials: without both, the services refuse
// every call.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	s.RegisterKeys(r)
	adminpb.RegisterStoreServiceServer(r, &storeService{Server: s})
}

// RegisterKeys registers the KeyService alone: see Register. The rules are KeyRules.
func (s *Server) RegisterKeys(r grpc.ServiceRegistrar) {
	adminpb.RegisterKeyServiceServer(r, &keyService{Server: s})
}

// Close drops the answers that the Server keeps for calls with a request_id, and with them the
// secrets of new keys. A later call with a request_id gets Unavailable. Close does not close the
// store. Call Close after the gRPC servers have stopped.
func (s *Server) Close() { s.answers.Close() }

// A method says what a method needs, and whether the method may change something.
type method struct {
	scope  string
	writes bool
}

var methods = map[string]method{
	adminpb.KeyService_CreateKey_FullMethodName:       {manage.Write, true},
	adminpb.KeyService_GetKey_FullMethodName:          {manage.Read, false},
	adminpb.KeyService_ListKeys_FullMethodName:        {manage.Read, false},
	adminpb.KeyService_UpdateKey_FullMethodName:       {manage.Write, true},
	adminpb.KeyService_RotateKey_FullMethodName:       {manage.Write, true},
	adminpb.KeyService_DisableKey_FullMethodName:      {manage.Write, true},
	adminpb.KeyService_EnableKey_FullMethodName:       {manage.Write, true},
	adminpb.KeyService_RevokeKey_FullMethodName:       {manage.Write, true},
	adminpb.KeyService_SetCredits_FullMethodName:      {manage.Write, true},
	adminpb.KeyService_AddCredits_FullMethodName:      {manage.Write, true},
	adminpb.KeyService_LookupKey_FullMethodName:       {manage.Read, false},
	adminpb.KeyService_BatchRevokeKeys_FullMethodName: {manage.Admin, true},
	adminpb.KeyService_ListEvents_FullMethodName:      {manage.Read, false},
	adminpb.KeyService_WatchEvents_FullMethodName:     {manage.Read, false},

	adminpb.StoreService_GetStats_FullMethodName:       {manage.Read, false},
	adminpb.StoreService_PurgeKeys_FullMethodName:      {manage.Admin, true},
	adminpb.StoreService_Backup_FullMethodName:         {manage.Admin, false},
	adminpb.StoreService_Restore_FullMethodName:        {manage.Admin, true},
	adminpb.StoreService_CheckIntegrity_FullMethodName: {manage.Admin, false},
}

// Rules returns the rules of both services, for interceptor.New: each method needs its scope, or
// keys:admin. The Server checks the scopes too. But only with the rules is a caller refused before
// gRPC calls the Server, and reported by interceptor.LogRefusals, and only with the rules does
// interceptor.RequireRules accept the methods.
func Rules() []interceptor.Option {
	return append(KeyRules(), rules("StoreService")...)
}

// KeyRules returns the rules of the KeyService alone, for a server with RegisterKeys.
func KeyRules() []interceptor.Option { return rules("KeyService") }

func rules(service protoreflect.Name) []interceptor.Option {
	var all []interceptor.Option
	forEachMethod(func(m protoreflect.MethodDescriptor, full string) {
		if m.Parent().Name() == service {
			all = append(all, interceptor.RequireAny(full, scopesFor(full)...))
		}
	})
	return all
}

// scopesFor returns the scopes of which a key needs one to call a method.
func scopesFor(full string) []string {
	return slices.Compact([]string{methods[full].scope, manage.Admin})
}

// SecretMethods returns the full names of the methods whose requests or responses contain a secret,
// or the digests of secrets. An interceptor that logs messages must leave out these methods:
// String, the verb %v and every encoder show the secret, because Go ignores the option
// debug_redact.
func SecretMethods() []string {
	var secret []string
	forEachMethod(func(m protoreflect.MethodDescriptor, full string) {
		if hasSecret(m.Input()) || hasSecret(m.Output()) {
			secret = append(secret, full)
		}
	})
	return secret
}

// hasSecret reports whether a field of the message has the option debug_redact. Only fields of
// requests and responses have the option.
func hasSecret(m protoreflect.MessageDescriptor) bool {
	for i := range m.Fields().Len() {
		options, _ := m.Fields().Get(i).Options().(*descriptorpb.FieldOptions)
		if options.GetDebugRedact() {
			return true
		}
	}
	return false
}

// forEachMethod calls f for each method of both services, with the full name.
func forEachMethod(f func(m protoreflect.MethodDescriptor, full string)) {
	services := adminpb.File_grpcapikey_admin_v1_admin_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			f(m, "/"+string(m.Parent().FullName())+"/"+string(m.Name()))
		}
	}
}

// A call is a call of a method by a caller who may call the method.
type call struct {
	*Server
	ctx    context.Context // changes under ctx have the caller as the actor
	caller manage.Caller
	method string

	revision uint64 // in the etag of the request; 0: no etag
}

// answer makes a call of a method. Every method runs inside answer, so that none runs without a
// caller, and none returns an error that is not a status.
func answer[A any](
	s *Server, ctx context.Context, method string, request proto.Message,
	do func(*call) (A, error),
) (A, error) {
	c, err := s.begin(ctx, method, request)
	var a A
	if err == nil {
		a, err = do(c)
	}
	if err == nil {
		return a, nil
	}
	st := statusOf(err, methods[method].writes && s.store.Err() == nil)
	level := slog.LevelInfo
	switch st.Code() {
	case codes.Unavailable, codes.DataLoss:
		level = slog.LevelWarn
	case codes.Canceled:
		level = slog.LevelDebug // the client has gone, as at the end of every watch
	}
	s.logLine(ctx, level, "admin call refused", "method", method, "principal", c.caller.Actor(),
		"code", st.Code().String(), "error", err)
	var none A
	return none, st.Err()
}

// logLine logs a line. A handshake runs on a goroutine of gRPC, where no interceptor recovers
// panics, so a panic of the logger's handler would end the process.
func (s *Server) logLine(ctx context.Context, level slog.Level, message string, args ...any) {
	defer func() { _ = recover() }()
	s.log.Log(ctx, level, message, args...)
}

// begin returns the call. With an error, the call still names the caller.
func (s *Server) begin(
	ctx context.Context, method string, request proto.Message,
) (*call, error) {
	caller, ok := callerOf(ctx)
	c := &call{
		Server: s,
		ctx:    keystore.WithActor(ctx, caller.Actor()),
		caller: caller,
		method: method,
	}
	switch {
	case !ok:
		return c, errNoPrincipal
	case !caller.Has(methods[method].scope):
		return c, &refusal{status: errinfo.MissingScope(scopesFor(method))}
	case request == nil:
		return c, nil
	default:
		return c, checkKnown(request.ProtoReflect())
	}
}

// checkKnown returns an error if a message has a field that this program does not know. The field
// may be a restriction of a key, or of a selection, that must not be ignored.
func checkKnown(m protoreflect.Message) (err error) {
	if len(m.GetUnknown()) > 0 {
		return invalid("%s has a field that this server does not know: "+
			"the server is older than the client", m.Descriptor().Name())
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.Message() != nil && !f.IsMap() && !f.IsList() {
			err = checkKnown(v.Message())
		}
		return err == nil
	})
	return err
}
