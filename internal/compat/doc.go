// Package compat tests the interceptors together with other interceptors that servers commonly use.
// The package is a separate module, so that the other interceptors never become dependencies of a
// user.
package compat
