package console

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A verb is a change that needs no more than a reason.
type verb struct {
	Name, Label string // revoke, Revoke
	Past        string // Revoked
	Danger      bool
	WantsReason bool // the change has a reason
	Ends        bool // the change ends the sessions of the key
	do          func(o manage.Operator, ctx context.Context, id, reason string) (ended int, err error)
}

var verbs = []*verb{
	{Name: "disable", Label: "Disable", Past: "Disabled", WantsReason: true, Ends: true,
		do: func(o manage.Operator, ctx context.Context, id, reason string) (int, error) {
			_, n, err := o.Disable(ctx, id, reason)
			return n, err
		}},
	{Name: "enable", Label: "Enable", Past: "Enabled",
		do: func(o manage.Operator, ctx context.Context, id, _ string) (int, error) {
			return 0, o.Enable(ctx, id)
		}},
	{Name: "revoke", Label: "Revoke", Past: "Revoked", Danger: true, WantsReason: true, Ends: true,
		do: func(o manage.Operator, ctx context.Context, id, reason string) (int, error) {
			_, n, err := o.Revoke(ctx, id, reason)
			return n, err
		}},
}

// verbOf returns the verb with a name, or nil.
func verbOf(name string) *verb {
	for _, b := range verbs {
		if b.Name == name {
			return b
		}
	}
	return nil
}

// A confirmation is the content of the page that asks before a verb.
type confirmation struct {
	*verb
	Keys   []keyRow
	Live   int  // the sessions of the keys
	Bulk   bool // several keys were selected
	Own    bool // one of the keys is that of the operator
	Reason string
	Error  string // of the reason
}

func (v *visit) showDisable() { v.showConfirmation("disable") }
func (v *visit) showEnable()  { v.showConfirmation("enable") }
func (v *visit) showRevoke()  { v.showConfirmation("revoke") }
func (v *visit) disable()     { v.apply("disable") }
func (v *visit) enable()      { v.apply("enable") }
func (v *visit) revoke()      { v.apply("revoke") }

// showConfirmation asks before a verb is applied to the key of the path.
func (v *visit) showConfirmation(name string) {
	v.renderConfirmation(http.StatusOK, &confirmation{verb: verbOf(name)})
}

func (v *visit) renderConfirmation(status int, c *confirmation) {
	key, ok := v.changeableKey()
	if !ok {
		return
	}
	c.Keys, c.Live, c.Own = []keyRow{rowOf(key)}, key.Live, v.isOwn(key)
	v.render(status, "confirm", c.Label+" "+key.Name, c)
}

// apply applies a verb to the key of the path.
func (v *visit) apply(name string) {
	b := verbOf(name)
	reason := strings.TrimSpace(v.r.PostFormValue("reason"))
	ended, err := b.do(v.operator(0), v.changeCtx(), v.id, reason)
	if errors.Is(err, keystore.ErrInvalid) && strings.Contains(err.Error(), "reason") {
		v.renderConfirmation(http.StatusUnprocessableEntity,
			&confirmation{verb: b, Reason: reason, Error: sentence(errorText(err))})
		return
	}
	if err != nil {
		v.fail(keyError(err))
		return
	}
	text := b.Past + " the key."
	if b.Ends {
		text = b.Past + " the key: " + plural(ended, "live stream") + " ended."
	}
	v.done("keys/"+v.id, text)
}

// maxSelected is how many keys an operator can select.
const maxSelected = 2 * pageSize

// selected returns the IDs that the operator has selected.
func selected(values url.Values) []string {
	var ids []string
	for _, id := range values["id"] {
		if isID(id) && !slices.Contains(ids, id) && len(ids) < maxSelected {
			ids = append(ids, id)
		}
	}
	return ids
}

// showBulk asks before a verb is applied to the selected keys.
func (v *visit) showBulk() {
	query := v.r.URL.Query()
	v.renderBulk(http.StatusOK, &confirmation{verb: verbOf(query.Get("do"))}, selected(query))
}

func (v *visit) renderBulk(status int, c *confirmation, ids []string) {
	if c.verb == nil || len(ids) == 0 {
		v.failWith(http.StatusBadRequest, "No key is selected",
			"Go back to the list of keys, select keys, and choose what to do with them.")
		return
	}
	c.Bulk = true
	for _, id := range ids {
		key, err := v.store.Get(v.ctx(), id)
		if errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrInvalid) {
			continue // purged since
		}
		if err != nil {
			v.fail(err)
			return
		}
		c.Keys = append(c.Keys, rowOf(key))
		c.Live += key.Live
		c.Own = c.Own || v.isOwn(key)
	}
	v.render(status, "confirm", c.Label+" "+plural(len(c.Keys), "key"), c)
}

// A bulkResult is the content of the page after a verb was applied to several keys, and not all
// changes were made.
type bulkResult struct {
	*verb
	Done   int
	Ended  int
	Failed []failedKey
}

// A failedKey is a key that was not changed, and why.
type failedKey struct {
	ID, Name, Text string
}

// bulk applies a verb to the selected keys. The operator's own key comes last: its end would end
// the login, and the operator would not see what happened to the rest. If another operator ends the
// login, bulk changes no further key.
func (v *visit) bulk() {
	b := verbOf(v.r.PostFormValue("do"))
	reason := strings.TrimSpace(v.r.PostFormValue("reason"))
	ids := selected(v.r.PostForm)
	if b == nil || len(ids) == 0 {
		v.renderBulk(http.StatusBadRequest, &confirmation{}, nil)
		return
	}
	if v.login != nil {
		if i := slices.Index(ids, v.login.key.ID); i >= 0 {
			ids = append(slices.Delete(ids, i, i+1), v.login.key.ID)
		}
	}
	result := &bulkResult{verb: b}
	for _, id := range ids {
		if v.hasEnded() {
			v.leadToLogin()
			return
		}
		ended, err := b.do(v.operator(0), v.changeCtx(), id, reason)
		if errors.Is(err, keystore.ErrInvalid) && strings.Contains(err.Error(), "reason") {
			v.renderBulk(http.StatusUnprocessableEntity,
				&confirmation{verb: b, Reason: reason, Error: sentence(errorText(err))}, ids)
			return
		}
		if err != nil {
			failed := failedKey{ID: id, Text: v.reasonText(err)}
			if key, err := v.store.Get(v.ctx(), id); err == nil {
				failed.Name = key.Name
			}
			result.Failed = append(result.Failed, failed)
			continue
		}
		result.Done++
		result.Ended += ended
	}
	if len(result.Failed) > 0 {
		v.render(http.StatusConflict, "bulk", "Not all keys were changed", result)
		return
	}
	text := b.Past + " " + plural(result.Done, "key")
	if b.Ends {
		text += ": " + plural(result.Ended, "live stream") + " ended"
	}
	v.done("keys", text+".")
}

// reasonText returns why a key was not changed.
func (v *visit) reasonText(err error) string {
	var ceiling *manage.CeilingError
	switch {
	case errors.As(err, &ceiling):
		return sentence(ceilingText(ceiling))
	case errors.Is(err, keystore.ErrKeyRevoked):
		return "The key is revoked."
	case errors.Is(err, keystore.ErrNotFound):
		return "The key was purged."
	case errors.Is(err, keystore.ErrNotEverywhere):
		return "The change is made, but another process may not know the change yet."
	default:
		v.warn("console could not change a key", "error", err)
		return "The store does not answer. The change may have been made or not."
	}
}
