package console

import (
	"context"
	"net/http"
	"time"
)

func (v *visit) showBackup() { v.render(http.StatusOK, "backup", "Backup", nil) }

// backup sends a backup as a file. If the backup fails, backup breaks the connection, so that the
// browser does not take the part for the whole.
func (v *visit) backup() {
	ctx, cancel := context.WithCancel(v.ctx())
	defer cancel()
	defer context.AfterFunc(v.Console.ctx, cancel)()
	if v.login != nil {
		defer context.AfterFunc(v.login.session.Context(), cancel)()
	}
	h := v.w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", `attachment; filename="apikeys-`+
		time.Now().UTC().Format("2006-01-02-150405")+`.backup"`)
	w := &backupWriter{w: v.w, control: http.NewResponseController(v.w), login: v.login}
	v.info("console backup", "actor", v.caller.Actor())
	if err := v.store.Backup(ctx, w); err != nil {
		v.warn("console backup failed", "actor", v.caller.Actor(), "error", err)
		if w.written {
			panic(http.ErrAbortHandler)
		}
		h.Del("Content-Disposition")
		v.fail(err)
	}
}

// A backupWriter gives each part of a backup a separate deadline: a server may have a deadline for
// a whole response.
type backupWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	login   *login
	written bool
}

func (b *backupWriter) Write(p []byte) (int, error) {
	if b.login != nil {
		if err := b.login.session.Cause(); err != nil {
			return 0, err
		}
	}
	_ = b.control.SetWriteDeadline(time.Now().Add(writePatience))
	b.written = true
	return b.w.Write(p)
}
