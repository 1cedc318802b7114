// Package manifests tests the files of the guides against the types of Kubernetes and Envoy. The
// tests also run the commands in the files. The package is a separate module, so that the types of
// Kubernetes and Envoy never reach the module graph of a user.
package manifests
