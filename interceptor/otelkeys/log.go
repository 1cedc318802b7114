package otelkeys

import (
	"context"
	"log/slog"

	"go.opentelemetry.io/otel/trace"
)

// LogHandler returns a handler that adds the attributes trace_id and span_id to each line whose
// context has a span, and passes the line to next. The names are those of OpenTelemetry for logs in
// other formats. Use LogHandler for the logger of interceptor.LogRefusals, and for the logger of
// your handlers: each line then leads to its trace.
//
//	interceptor.LogRefusals(slog.New(otelkeys.LogHandler(slog.NewJSONHandler(os.Stderr, nil))))
//
// The attributes are part of the group if the logger was made with slog.Logger.WithGroup. A handler
// that sends lines to OpenTelemetry adds the IDs already, and needs no LogHandler.
func LogHandler(next slog.Handler) slog.Handler { return logHandler{next} }

type logHandler struct{ slog.Handler }

func (h logHandler) Handle(ctx context.Context, r slog.Record) error {
	if span := trace.SpanContextFromContext(ctx); span.IsValid() {
		r = r.Clone()
		r.AddAttrs(slog.String("trace_id", span.TraceID().String()),
			slog.String("span_id", span.SpanID().String()))
	}
	return h.Handler.Handle(ctx, r)
}

func (h logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return logHandler{h.Handler.WithAttrs(attrs)}
}

func (h logHandler) WithGroup(name string) slog.Handler {
	return logHandler{h.Handler.WithGroup(name)}
}
