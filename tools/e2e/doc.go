// Package e2e holds the tests in which all parts are real: a Kubernetes API
// server, the cloud, edge nodes, mappers, a slave that is not ours and Debian's
// mosquitto clients, each a process of its own. There is nothing to import.
package e2e
