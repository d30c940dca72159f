// Command bench measures the figures of the README on this machine, with all
// parts real: the control plane, the cloud, a node with its mapper and a
// pymodbus slave. It prints each figure beside its bound and asserts nothing
// but that the measurement itself worked.
//
//	go tool task bench
//	bin/bench --bin bin --only link
package main
