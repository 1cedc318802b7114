package console

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// creditFields are the fields for the credits of a key, as the operator has written them.
type creditFields struct {
	Credits string // "": the use of the key is not limited
	Refill  string // the credits after a refill
	When    string // one of refillTimes
	Day     string // of the month, for refillMonth
	Every   string // for refillEvery
}

// The values of When.
const (
	refillNever = "never"
	refillDay   = "day"
	refillMonth = "month"
	refillEvery = "every"
)

// refillTimes are the choices for the refill.
var refillTimes = []pair{{refillNever, "never"}, {refillDay, "each day at 00:00 UTC"},
	{refillMonth, "each month at 00:00 UTC, on this day:"}, {refillEvery, "each time after:"}}

// maxCredits is the largest number of credits of a key.
const maxCredits = int64(1) << 53

func (v *visit) readCreditFields() creditFields {
	field := func(name string) string { return strings.TrimSpace(v.r.PostFormValue(name)) }
	return creditFields{Credits: field("credits"), Refill: field("refill"),
		When: field("refill_when"), Day: field("refill_day"), Every: field("refill_every")}
}

// creditFieldsOf returns the fields with the present credits of a key, or nil.
func creditFieldsOf(c *keystore.Credits) creditFields {
	f := creditFields{When: refillNever}
	if c == nil {
		return f
	}
	f.Credits = strconv.FormatInt(c.Remaining, 10)
	r := c.Refill
	if r == (keystore.Refill{}) {
		return f
	}
	f.Refill = strconv.FormatInt(r.Amount, 10)
	switch {
	case r.Daily:
		f.When = refillDay
	case r.MonthDay != 0:
		f.When, f.Day = refillMonth, strconv.Itoa(r.MonthDay)
	default:
		f.When, f.Every = refillEvery, r.Every.String()
	}
	return f
}

// wholeNumber parses a number that people may write with commas.
func wholeNumber(text string) (int64, error) {
	return strconv.ParseInt(strings.ReplaceAll(text, ",", ""), 10, 64)
}

// credits returns the credits that the fields describe, or nil if the use of the key is not
// limited. If a field cannot be used, credits notes an error for the field.
func (f *creditFields) credits(failed map[string]string) *keystore.Credits {
	refill := f.refill(failed)
	if f.Credits == "" {
		if f.Refill != "" || refill != (keystore.Refill{}) {
			failed["credits"] = "Write how many credits are left until the first refill."
		}
		return nil
	}
	n, err := wholeNumber(f.Credits)
	if err != nil || n < 0 || n > maxCredits {
		failed["credits"] = "Write a whole number from 0, or leave the field empty."
	}
	return &keystore.Credits{Remaining: n, Refill: refill}
}

func (f *creditFields) refill(failed map[string]string) (r keystore.Refill) {
	var err error
	switch f.When {
	case refillNever, "": // a form without these fields has no refill
		if f.Refill != "" {
			failed["refill_when"] = "Choose when the key gets these credits."
		}
		return r
	case refillDay:
		r.Daily = true
	case refillMonth:
		if r.MonthDay, err = strconv.Atoi(f.Day); err != nil || r.MonthDay < 1 || r.MonthDay > 31 {
			failed["refill_when"] = "Write the day of the month, from 1 to 31."
		}
	case refillEvery:
		if r.Every, err = parseDuration(f.Every); err != nil || r.Every < time.Second ||
			r.Every > 3650*day {
			failed["refill_when"] = "Write the time between two refills, such as 36h or 7d: from 1s " +
				"to 3650d."
		}
	default:
		failed["refill_when"] = "Choose when the key gets new credits."
	}
	if r.Amount, err = wholeNumber(f.Refill); err != nil || r.Amount < 1 || r.Amount > maxCredits {
		failed["refill"] = "Write how many credits the key has after a refill: a whole number from 1."
	}
	return r
}

// A creditForm has the two forms for the credits of a key: one that sets the credits, and one that
// adds credits.
type creditForm struct {
	creditFields
	Add     string
	Key     *keystore.Key
	Present *keystore.Credits // nil: the use of the key is not limited
	Lost    bool              // the balance of the key is damaged
	Errors  map[string]string
}

// readCredits returns the credits of a key. If the balance is damaged, lost is true: the key is
// refused until the credits are set.
func (v *visit) readCredits(id string) (c *keystore.Credits, lost bool, err error) {
	c, err = v.store.Credits(v.ctx(), id)
	if errors.Is(err, keystore.ErrCorrupt) {
		return nil, true, nil
	}
	return c, false, err
}

func (v *visit) showCredits() {
	v.renderCredits(http.StatusOK, nil)
}

// renderCredits shows the form, or an empty form if f is nil.
func (v *visit) renderCredits(status int, f *creditForm) {
	key, ok := v.changeableKey()
	if !ok {
		return
	}
	present, lost, err := v.readCredits(v.id)
	if err != nil {
		v.fail(keyError(err))
		return
	}
	if f == nil {
		f = &creditForm{creditFields: creditFieldsOf(present)}
	}
	f.Key, f.Present, f.Lost = key, present, lost
	v.render(status, "credits", "Credits of "+key.Name, f)
}

// changeCredits sets the credits of a key, or adds credits. The form has the revision of the key,
// so a form that is sent twice adds the credits once.
func (v *visit) changeCredits() {
	f := &creditForm{creditFields: v.readCreditFields(), Errors: make(map[string]string),
		Add: strings.TrimSpace(v.r.PostFormValue("add"))}
	revision, _ := strconv.ParseUint(v.r.PostFormValue("revision"), 10, 64)
	o, field, done := v.operator(revision), "credits", "Set the credits."
	var err error
	if v.r.PostFormValue("do") == "add" {
		f.creditFields = creditFieldsOf(nil)
		var n int64
		if n, err = wholeNumber(f.Add); err != nil || n == 0 || n < -maxCredits || n > maxCredits {
			f.Errors["add"] = "Write a whole number, such as 500, or -500 to take credits away."
		} else {
			field, done = "add", fmt.Sprintf("Added %s.", plural(n, "credit"))
			err = o.AddCredits(v.changeCtx(), v.id, n)
		}
	} else if credits := f.credits(f.Errors); len(f.Errors) == 0 {
		err = o.SetCredits(v.changeCtx(), v.id, credits)
	}
	if len(f.Errors) == 0 && errors.Is(err, keystore.ErrInvalid) {
		f.Errors[field] = sentence(errorText(err))
	}
	switch {
	case len(f.Errors) > 0:
		v.renderCredits(http.StatusUnprocessableEntity, f)
	case err != nil:
		v.fail(keyError(err))
	default:
		v.done("keys/"+v.id, done)
	}
}
