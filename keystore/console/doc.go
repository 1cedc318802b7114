// Package console is a web console for the keys of a store, as an [http.Handler] inside the user's
// own program. Operators look at keys and at traffic, create, rotate, disable and revoke keys, and
// follow the events. For most uses, mount the console on a server with TLS:
//
//	c, err := console.New(store)
//	defer c.Close()
//	mux.Handle("/keys/", http.StripPrefix("/keys", c))
//
// All links are relative, so the console works under every prefix. The pages work without
// JavaScript, and load nothing from another host.
//
// # Who may do what
//
// An operator logs in with an API key of the store. The key needs scopes:
//
//	keys:read    look at everything; required to log in
//	keys:write   create, edit, rotate, disable, enable and revoke keys
//	keys:admin   everything, without a ceiling, and download backups
//
// An operator without keys:admin cannot make more of a key than the operator's own key is: the
// ceiling is the same as in package interceptor/admin. The events of the store name the operator as
// the actor console:key:01k9…. An application with its own login gives [WithUser] instead, and the
// actor is then console: and the text that WithUser returns.
//
// # The login
//
// The console accepts a key only over TLS, or from the same machine over a loopback address. For a
// proxy that terminates TLS, give [BehindTLS]. The console opens a session with Bind, and forgets
// the text of the key. The cookie __Host-apikeys holds 256 random bits and nothing else. A login
// ends after 8 hours, or after 30 minutes without a request. When the key is revoked, disabled,
// narrowed or expires, the login ends immediately, and with the login every stream of events that
// an open page reads.
//
// A login belongs to the address from which the operator has logged in: the IPv4 address, or the
// IPv6 network of 64 bits. All loopback addresses are the same address. A request with the cookie
// of a login from another address ends the login, and is logged as a warning. So a stolen cookie is
// of no use elsewhere, and the operator notices the theft. An operator whose address changes logs
// in again.
//
// An address that has sent 10 wrong keys waits 6 seconds for each further attempt. The limit counts
// addresses and never keys, so that no stranger locks out an operator from another address.
//
// # Requests from other sites
//
// The console refuses every POST from another origin, by [http.CrossOriginProtection]. The console
// also refuses a POST that has the cookie but neither a Sec-Fetch-Site nor an Origin header. All
// pages forbid frames and inline scripts, and no browser keeps a copy of a page.
//
// # Secrets
//
// A new secret is only in the response to the POST that has made the secret. The form has a request
// id: if the operator reloads the page within 10 minutes, the console returns the same answer and
// creates nothing.
package console
