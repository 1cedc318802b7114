// Package compat tests the interceptors among those that people use beside them. It is a module of its own, so that these
// never reach a user's module graph.
package compat
