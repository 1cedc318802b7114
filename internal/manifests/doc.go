// Package manifests tests the files of the guides against the types of Kubernetes and Envoy, and
// the dashboard of keystore/promkeys against the types of Grafana. The tests also run the commands
// in the files of the guides. The package is a separate module, so that these types never reach the
// module graph of a user.
package manifests
