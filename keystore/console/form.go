package console

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A keyForm is the form for a new key, or for a change of a key. The fields have what the operator
// has written.
type keyForm struct {
	RequestID string // of a new key
	Revision  string // of the key that is edited
	Name, Owner, Scopes, Metadata,
	Expires, ExpiresAt, NotBefore,
	Networks, PerSecond, Burst string
	creditFields // of a new key
	// Errors are the errors by the name of the field. An error of no field has the name "".
	Errors map[string]string
	Key    *keystore.Key // nil: a new key
	Live   int
}

// Restricted reports whether the rarer fields have a value or an error.
func (f *keyForm) Restricted() bool {
	for _, name := range []string{"not_before", "networks", "per_second", "burst", "metadata",
		"credits", "refill", "refill_when"} {
		if f.Errors[name] != "" {
			return true
		}
	}
	return f.NotBefore != "" || f.Networks != "" || f.PerSecond != "" || f.Burst != "" ||
		f.Metadata != "" || f.creditFields != creditFieldsOf(nil) && f.Key == nil
}

// The values of Expires.
const (
	expiresNever = "never"
	expiresAt    = "at"
)

// lifetimes are the other values of Expires.
var lifetimes = map[string]time.Duration{"7d": 7 * day, "30d": 30 * day, "90d": 90 * day,
	"365d": 365 * day}

// readForm returns the form that the operator has sent.
func (v *visit) readForm() *keyForm {
	field := func(name string) string { return strings.TrimSpace(v.r.PostFormValue(name)) }
	return &keyForm{
		RequestID: field("request_id"), Revision: field("revision"),
		Name: field("name"), Owner: field("owner"), Scopes: field("scopes"),
		Metadata: v.r.PostFormValue("metadata"), Expires: field("expires"),
		ExpiresAt: field("expires_at"),
		NotBefore: field("not_before"), Networks: field("networks"),
		PerSecond: field("per_second"), Burst: field("burst"),
		creditFields: v.readCreditFields(),
		Errors:       make(map[string]string),
	}
}

// formOf returns the form with the present Spec of a key.
func formOf(k *keystore.Key) *keyForm {
	f := &keyForm{
		Key: k, Live: k.Live, Revision: strconv.FormatUint(k.Revision, 10), Name: k.Name,
		Owner: k.Owner, Scopes: strings.Join(k.Scopes(), "\n"), Expires: expiresNever,
		NotBefore: formTime(k.NotBefore),
	}
	if !k.ExpiresAt.IsZero() {
		f.Expires, f.ExpiresAt = expiresAt, formTime(k.ExpiresAt)
	}
	for _, p := range pairsOf(k) {
		f.Metadata += p.Name + "=" + escapeLines.Replace(p.Value) + "\n"
	}
	for _, network := range k.AllowedNetworks() {
		f.Networks += network.String() + "\n"
	}
	if l := k.RateLimit; l != (keystore.RateLimit{}) {
		f.PerSecond = strconv.FormatFloat(l.PerSecond, 'g', -1, 64)
		f.Burst = strconv.Itoa(l.Burst)
	}
	return f
}

// A value of the metadata may have several lines. In the form, a value is one line.
var (
	escapeLines   = strings.NewReplacer(`\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`)
	unescapeLines = strings.NewReplacer(`\\`, `\`, `\n`, "\n", `\r`, "\r", `\t`, "\t")
)

func formTime(t time.Time) string {
	switch {
	case t.IsZero():
		return ""
	case t.Second() == 0:
		return t.UTC().Format(timeLayout)
	default:
		return t.UTC().Format(timeLayout + ":05")
	}
}

// errForm means that the fields of a form have errors.
var errForm = errors.New("the form has errors")

// change returns the change of a Spec that the form describes. If a field cannot be read, the
// change notes an error for the field, and returns errForm.
func (f *keyForm) change(now time.Time) func(*keystore.Spec) error {
	return func(s *keystore.Spec) error {
		s.Name, s.Owner = f.Name, f.Owner
		s.Scopes = strings.FieldsFunc(f.Scopes, isSeparator)
		s.Metadata = f.metadata()
		s.ExpiresAt = f.expiry(s.ExpiresAt, now)
		s.NotBefore = f.time("not_before", f.NotBefore, s.NotBefore)
		s.AllowedNetworks = f.networks()
		s.RateLimit = f.rateLimit()
		if len(f.Errors) > 0 {
			return errForm
		}
		return nil
	}
}

// creation is change for a new key, which may have credits.
func (f *keyForm) creation(now time.Time) func(*keystore.Spec) error {
	change := f.change(now)
	return func(s *keystore.Spec) error {
		s.Credits = f.credits(f.Errors)
		return change(s)
	}
}

// isSeparator reports whether a character separates the items of a list in a form.
func isSeparator(r rune) bool { return r == ',' || r == ' ' || r == '\n' || r == '\r' || r == '\t' }

func (f *keyForm) metadata() map[string]string {
	m := make(map[string]string)
	for line := range strings.Lines(f.Metadata) {
		line = strings.TrimRight(line, "\r\n")
		if strings.TrimSpace(line) == "" {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		_, twice := m[name]
		switch {
		case !ok || name == "":
			f.Errors["metadata"] = fmt.Sprintf("The line %.60q has no name and value: "+
				"write name=value.", line)
		case twice:
			f.Errors["metadata"] = fmt.Sprintf("The name %.60q is given twice.", name)
		}
		m[name] = unescapeLines.Replace(value)
	}
	return m
}

func (f *keyForm) expiry(present, now time.Time) time.Time {
	switch lifetime, ok := lifetimes[f.Expires]; {
	case ok:
		return now.Add(lifetime).Truncate(time.Second)
	case f.Expires == expiresNever:
		return time.Time{}
	case f.Expires == expiresAt && f.ExpiresAt == "":
		f.Errors["expires_at"] = "Give the time when the key expires."
	case f.Expires == expiresAt:
		return f.time("expires_at", f.ExpiresAt, present)
	default:
		f.Errors["expires"] = "Choose when the key expires."
	}
	return time.Time{}
}

// time returns the time of a field. If the field shows the present value of the key, time returns
// the value unchanged: the field has no fractions of seconds.
func (f *keyForm) time(field, text string, present time.Time) time.Time {
	if text == formTime(present) {
		return present
	}
	t, err := parseTime(text)
	if err != nil {
		f.Errors[field] = "This is not a time. Write, for example, " +
			time.Now().UTC().Format(timeLayout) + "."
	}
	return t
}

func (f *keyForm) networks() (networks []netip.Prefix) {
	for _, text := range strings.FieldsFunc(f.Networks, isSeparator) {
		network, err := netip.ParsePrefix(text)
		if addr, failed := netip.ParseAddr(text); failed == nil {
			network, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil {
			f.Errors["networks"] = fmt.Sprintf("%.60q is not a network: write 192.0.2.0/24, "+
				"or 192.0.2.1 for one address.", text)
			return nil
		}
		networks = append(networks, network)
	}
	return networks
}

func (f *keyForm) rateLimit() (l keystore.RateLimit) {
	if f.PerSecond == "" && f.Burst == "" {
		return l
	}
	var err error
	if l.PerSecond, err = strconv.ParseFloat(f.PerSecond, 64); err != nil || !(l.PerSecond > 0) {
		f.Errors["per_second"] = "Write a number above 0, or leave both fields of the limit empty."
	}
	if l.Burst, err = strconv.Atoi(f.Burst); err != nil || l.Burst < 1 {
		f.Errors["burst"] = "Write a whole number from 1, or leave both fields of the limit empty."
	}
	return l
}

// note notes an error of the store beside the field that the error is about. If the error is not
// about the form, note returns false.
func (f *keyForm) note(err error) bool {
	var ceiling *manage.CeilingError
	switch {
	case errors.Is(err, errForm):
		return true
	case errors.As(err, &ceiling):
		field := "scopes"
		if len(ceiling.Scopes) == 0 {
			field = "expires"
		}
		f.Errors[field] = sentence(ceilingText(ceiling))
		return true
	case errors.Is(err, keystore.ErrInvalid):
		f.Errors[fieldOf(err)] = sentence(errorText(err))
		return true
	default:
		return false
	}
}

// specField finds the field of a Spec in the text of an error.
var specField = regexp.MustCompile(`Spec\.([A-Za-z]+)`)

// fieldOf returns the name of the field of the form that an error of the store is about, or "".
func fieldOf(err error) string {
	if match := specField.FindStringSubmatch(err.Error()); match != nil {
		return map[string]string{"Name": "name", "Owner": "owner", "Scopes": "scopes",
			"Metadata": "metadata", "ExpiresAt": "expires", "NotBefore": "not_before",
			"AllowedNetworks": "networks", "RateLimit": "per_second", "Credits": "credits"}[match[1]]
	}
	return ""
}

// errorText returns the text of an error of the store in the words of the pages.
func errorText(err error) string {
	text := strings.TrimPrefix(err.Error(), "keystore: ")
	text = strings.TrimPrefix(text, keystore.ErrInvalid.Error()+": ")
	text = listItem.ReplaceAllStringFunc(text, func(item string) string {
		match := listItem.FindStringSubmatch(item)
		n, _ := strconv.Atoi(match[2])
		return fmt.Sprintf("%s %d", map[string]string{"Scopes": "scope",
			"AllowedNetworks": "network"}[match[1]], n+1)
	})
	return specWords.Replace(text)
}

var (
	listItem  = regexp.MustCompile(`Spec\.(Scopes|AllowedNetworks)\[([0-9]+)\]`)
	specWords = strings.NewReplacer(
		"Spec.NotBefore is not before Spec.ExpiresAt", "the key begins after it expires",
		"leave it zero", "leave it empty",
		"Spec.ExpiresAt is zero: Options.MaxLifetime wants", "the key never expires: this store wants",
		"Options.MaxLifetime wants", "this store wants",
		"Spec.Name", "the name", "Spec.Owner", "the owner", "Spec.Scopes has", "the list has",
		"Spec.Metadata[", "the metadata [", "Spec.Metadata", "the metadata",
		"Spec.ExpiresAt", "the expiry", "Spec.NotBefore", "the beginning",
		"Spec.AllowedNetworks has", "the list has", "Spec.RateLimit", "the limit",
	)
)

// ceilingText returns the text of an error about the ceiling.
func ceilingText(e *manage.CeilingError) string {
	if len(e.Scopes) > 0 {
		return "your own key lacks these scopes: " + strings.Join(e.Scopes, ", ")
	}
	return e.Error()
}

// showNew shows the form for a new key.
func (v *visit) showNew() {
	v.renderNew(http.StatusOK, &keyForm{Expires: "90d", Owner: v.r.URL.Query().Get("owner"),
		creditFields: creditFieldsOf(nil)})
}

// renderNew shows the form for a new key. The request id is new, so that the form makes a key even
// if an earlier form has made one.
func (v *visit) renderNew(status int, f *keyForm) {
	f.RequestID = uuid.NewString()
	v.render(status, "edit", "New key", f)
}

// A madeSecret is the content of the page with a new secret.
type madeSecret struct {
	Key           *keystore.Key
	Secret        string
	Rotated       bool
	NotEverywhere bool // another process of the store may not know the secret yet
}

// create makes a key, and shows the secret.
func (v *visit) create() {
	f := v.readForm()
	made, err := v.once("create", f.RequestID, func() (*madeSecret, error) {
		issued, err := v.operator(0).Create(v.changeCtx(), f.creation(time.Now()))
		if err != nil {
			return nil, err
		}
		return &madeSecret{Key: issued.Key, Secret: issued.Secret.Reveal()}, nil
	})
	v.answerOnce(made, err, func(text string) bool {
		if text != "" {
			f.Errors[""] = text
		} else if !f.note(err) {
			return false
		}
		v.renderNew(http.StatusUnprocessableEntity, f)
		return true
	})
}

// once makes a call that gives out a secret. A repeat of the request gets the same answer, for 10
// minutes.
func (v *visit) once(
	method, requestID string, call func() (*madeSecret, error),
) (*madeSecret, error) {
	if len(requestID) != 36 || uuid.Validate(requestID) != nil {
		return nil, manage.ErrRequestReused // not a form of this console
	}
	form := v.r.PostForm.Encode() + " " + v.path
	request := manage.Request{Actor: v.caller.Actor(), Method: method, ID: requestID}
	value, err := v.answers.Do(v.ctx(), request, sha256.Sum256([]byte(form)),
		func() (any, error) { return call() })
	if err != nil {
		return nil, err
	}
	return value.(*madeSecret), nil
}

// answerOnce shows the result of once. If the error is about the form, again shows the form again,
// with the text of an error of the whole form, and returns true.
func (v *visit) answerOnce(made *madeSecret, err error, again func(text string) bool) {
	switch {
	case err == nil:
		title := "New key"
		if made.Rotated {
			title = "New secret"
		}
		v.render(http.StatusOK, "secret", title, made)
	case errors.Is(err, manage.ErrRequestReused):
		again("This form was sent before with other content, and the key was made then. Send the " +
			"form again if you want to do it once more.")
	case errors.Is(err, manage.ErrManyRequests):
		again("Too many requests are in progress. Send the form again.")
	case !again(""):
		v.fail(err)
	}
}

// showEdit shows the form for a change of a key.
func (v *visit) showEdit() {
	if key, ok := v.changeableKey(); ok {
		v.render(http.StatusOK, "edit", "Edit "+key.Name, formOf(key))
	}
}

// changeableKey returns the key of the path, and true. If there is no such key, or if the key is
// revoked, changeableKey shows a page with the reason, and returns false.
func (v *visit) changeableKey() (key *keystore.Key, ok bool) {
	key, err := v.store.Get(v.ctx(), v.id)
	if err == nil && !key.RevokedAt.IsZero() {
		err = keystore.ErrKeyRevoked
	}
	if err != nil {
		v.fail(keyError(err))
	}
	return key, err == nil
}

// edit changes a key.
func (v *visit) edit() {
	f := v.readForm()
	revision, _ := strconv.ParseUint(f.Revision, 10, 64)
	key, err := v.operator(revision).Update(v.changeCtx(), v.id, f.change(time.Now()))
	if err != nil && f.note(err) {
		if f.Key, err = v.store.Get(v.ctx(), v.id); err == nil {
			f.Live = f.Key.Live
			v.render(http.StatusUnprocessableEntity, "edit", "Edit "+f.Key.Name, f)
			return
		}
	}
	if err != nil {
		v.fail(keyError(err))
		return
	}
	v.done("keys/"+v.id, "Changed "+key.Name+".")
}

// done leads the browser to a page that says what was done.
func (v *visit) done(page, text string) {
	v.redirect(page + v.notes.put(v.caller.Actor(), text))
}

// lifetimeNames are the choices for the expiry of a key.
func lifetimeNames() []pair {
	return []pair{{"7d", "in 7 days"}, {"30d", "in 30 days"}, {"90d", "in 90 days"},
		{"365d", "in a year"}, {expiresNever, "never"}, {expiresAt, "at this time:"}}
}

// A rotateForm is the form that gives a key a new secret.
type rotateForm struct {
	Key       *keystore.Key
	RequestID string
	Grace     string // one of graces, or graceOther
	Other     string // the text for graceOther
	Errors    map[string]string
	Previous  bool // the key has a previous secret, which ends now
}

const graceOther = "other"

// graces are the choices for the grace of a rotation.
var graces = []pair{{"0", "none: the present secret ends now"}, {"1h", "1 hour"},
	{"24h", "24 hours"}, {"168h", "7 days"}, {graceOther, "other:"}}

func (v *visit) showRotate() {
	v.renderRotate(http.StatusOK, &rotateForm{Grace: "24h"})
}

func (v *visit) renderRotate(status int, f *rotateForm) {
	var ok bool
	if f.Key, ok = v.changeableKey(); !ok {
		return
	}
	f.Previous = f.Key.PreviousUntil.After(time.Now())
	f.RequestID = uuid.NewString()
	v.render(status, "rotate", "Rotate "+f.Key.Name, f)
}

// rotate gives a key a new secret, and shows the secret.
func (v *visit) rotate() {
	f := &rotateForm{Grace: v.r.PostFormValue("grace"), Errors: make(map[string]string),
		Other: strings.TrimSpace(v.r.PostFormValue("other"))}
	revision, _ := strconv.ParseUint(v.r.PostFormValue("revision"), 10, 64)
	grace, ok := f.duration()
	if !ok {
		v.renderRotate(http.StatusUnprocessableEntity, f)
		return
	}
	made, err := v.once("rotate", v.r.PostFormValue("request_id"), func() (*madeSecret, error) {
		issued, elsewhere, err := v.operator(revision).Rotate(v.changeCtx(), v.id, grace)
		if err != nil {
			return nil, err
		}
		return &madeSecret{Key: issued.Key, Secret: issued.Secret.Reveal(), Rotated: true,
			NotEverywhere: elsewhere}, nil
	})
	v.answerOnce(made, err, func(text string) bool {
		if text == "" && !errors.Is(err, keystore.ErrInvalid) {
			return false
		}
		if text == "" {
			text = sentence(errorText(err))
		}
		f.Errors["grace"] = text
		v.renderRotate(http.StatusUnprocessableEntity, f)
		return true
	})
}

// duration returns the grace. If the form has no grace, duration notes an error.
func (f *rotateForm) duration() (_ time.Duration, ok bool) {
	text := f.Grace
	if !slices.ContainsFunc(graces, func(p pair) bool { return p.Name == text }) {
		f.Errors["grace"] = "Choose how long the present secret stays valid."
		return 0, false
	}
	if text == graceOther {
		text = f.Other
	}
	d, err := parseDuration(text)
	if err != nil {
		f.Errors["grace"] = "This is not a time. Write, for example, 90m, 36h or 3d."
	}
	return d, err == nil
}

// parseDuration parses a duration, such as 90m, 36h or 3d.
func parseDuration(text string) (time.Duration, error) {
	if n, ok := strings.CutSuffix(text, "d"); ok {
		days, err := strconv.ParseFloat(n, 64)
		if err != nil || !(days >= 0 && days <= 36500) {
			return 0, errForm
		}
		return time.Duration(days * float64(day)), nil
	}
	d, err := time.ParseDuration(text)
	if err == nil && d < 0 {
		err = errForm
	}
	return d, err
}
