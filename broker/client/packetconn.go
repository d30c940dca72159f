package client

import (
	"bufio"
	"net"
	"sync"
)

// packetConn makes one write of each packet. paho hands a packet over in
// pieces, between Lock and Unlock; each piece would be a segment on the wire,
// with 52 bytes of headers, or a WebSocket frame of its own. It reads through a
// buffer, because paho reads byte by byte.
type packetConn struct {
	net.Conn
	r *bufio.Reader

	mu  sync.Mutex // held by paho for the length of a packet
	buf []byte
	err error // of the last flush
}

func newPacketConn(c net.Conn) *packetConn {
	return &packetConn{Conn: c, r: bufio.NewReaderSize(c, 2048)}
}

// Read implements net.Conn.
func (c *packetConn) Read(p []byte) (int, error) { return c.r.Read(p) }

// Lock implements sync.Locker: a packet begins.
func (c *packetConn) Lock() { c.mu.Lock() }

// Write implements net.Conn; the caller holds the lock.
func (c *packetConn) Write(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	c.buf = append(c.buf, p...)
	return len(p), nil
}

// maxKept bounds the buffer that is kept for the next packet.
const maxKept = 16 << 10

// Unlock implements sync.Locker: the packet is complete and leaves. paho does
// not see this write's error, so the connection is closed: its reader does.
func (c *packetConn) Unlock() {
	if len(c.buf) > 0 && c.err == nil {
		if _, err := c.Conn.Write(c.buf); err != nil {
			c.err = err
			_ = c.Close()
		}
	}
	if c.buf = c.buf[:0]; cap(c.buf) > maxKept {
		c.buf = nil
	}
	c.mu.Unlock()
}
