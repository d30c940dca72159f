//go:build unix

package modbus

import (
	"errors"
	"net"
	"syscall"
)

// drain reads, without waiting, what has arrived unasked and tells whether the
// peer has closed the connection.
func drain(conn net.Conn) (closed bool, err error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return false, nil
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false, err
	}
	var buf [maxADU]byte
	var readErr error
	err = rc.Control(func(fd uintptr) {
		for {
			n, err := syscall.Read(int(fd), buf[:]) // the descriptor does not block
			switch {
			case errors.Is(err, syscall.EINTR):
				continue
			case errors.Is(err, syscall.EAGAIN):
				return
			case err != nil:
				readErr = err
				return
			case n == 0:
				closed = true
				return
			}
		}
	})
	return closed, errors.Join(err, readErr)
}
