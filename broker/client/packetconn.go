package client

import (
	"bufio"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// packetConn makes one write of each packet. paho hands a packet over in
// pieces, between Lock and Unlock; each piece would be a segment on the wire,
// with 52 bytes of headers, or a WebSocket frame of its own. It reads through a
// buffer, because paho reads byte by byte.
//
// It tells the pinger what paho does not: bytes of a packet that is not complete
// yet, because a large one on a slow link takes longer than a keepalive; and
// acknowledgements that were sent.
type packetConn struct {
	net.Conn
	ping *pinger
	r    *bufio.Reader

	mu     sync.Mutex // held by paho for the length of a packet
	buf    []byte
	failed atomic.Pointer[error] // of the last flush
}

func newPacketConn(c net.Conn, ping *pinger) *packetConn {
	p := &packetConn{Conn: c, ping: ping}
	p.r = bufio.NewReaderSize(heard{p}, 2048)
	return p
}

// heard reads from the connection and tells the pinger.
type heard struct{ c *packetConn }

// Read implements io.Reader.
func (h heard) Read(p []byte) (int, error) {
	n, err := h.c.Conn.Read(p)
	if n > 0 {
		h.c.ping.PacketReceived()
	}
	return n, err
}

// Read implements net.Conn.
func (c *packetConn) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil {
		if cause := c.failed.Load(); cause != nil {
			err = *cause // rather than that we closed it
		}
	}
	return n, err
}

// Lock implements sync.Locker: a packet begins.
func (c *packetConn) Lock() { c.mu.Lock() }

// Write implements net.Conn; the caller holds the lock.
func (c *packetConn) Write(p []byte) (int, error) {
	if err := c.failed.Load(); err != nil {
		return 0, *err
	}
	c.buf = append(c.buf, p...)
	return len(p), nil
}

// maxKept bounds the buffer that is kept for the next packet.
const maxKept = 16 << 10

// Unlock implements sync.Locker: the packet is complete and leaves. paho does
// not see this write's error, its reader does, once it has read what has arrived:
// a broker that hangs up says why before.
func (c *packetConn) Unlock() {
	if len(c.buf) > 0 && c.failed.Load() == nil {
		if _, err := c.Conn.Write(c.buf); err != nil {
			c.failed.Store(&err)
			if c.SetReadDeadline(time.Now().Add(goodbye)) != nil {
				_ = c.Close()
			}
		} else {
			c.ping.PacketSent()
		}
	}
	if c.buf = c.buf[:0]; cap(c.buf) > maxKept {
		c.buf = nil
	}
	c.mu.Unlock()
}
