package httpkeys

// SetBeforeCut makes each cut call f before cut does anything.
func (a *Authenticator) SetBeforeCut(f func()) { a.hooks.beforeCut = f }

// ForgetReturned makes a the wrong variant that sets deadlines after the handler has returned.
func (a *Authenticator) ForgetReturned() { a.hooks.forgetReturned = true }
