// Package manifests tests the files of the guides against the types of Kubernetes and Envoy, and
// runs what the files run. It is a module of its own, so that these types never reach a user's
// module graph.
package manifests
