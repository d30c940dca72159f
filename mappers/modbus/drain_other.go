//go:build !unix

package modbus

import "net"

// drain does nothing where a socket cannot be read without waiting: stale
// replies are told by their transaction identifier.
func drain(net.Conn) (closed bool, err error) { return false, nil }
