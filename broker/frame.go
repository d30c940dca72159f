package broker

import (
	"fmt"
	"net"
	"time"
)

// connectDeadline bounds the time from accept to a complete CONNECT.
const connectDeadline = 10 * time.Second

// maxConnect bounds the first packet: nobody is known yet.
const maxConnect = 64 << 10

// errTooLarge ends a connection whose packet is over the bound.
type errTooLarge struct{ size, limit uint32 }

func (e errTooLarge) Error() string {
	return fmt.Sprintf("packet of %d bytes is over the limit of %d", e.size, e.limit)
}

// frameConn follows the packet borders of what a client sends, without looking
// inside: an over-long packet is answered with DISCONNECT 0x95 and never
// buffered, and a client that does not send its CONNECT in time is cut off.
type frameConn struct {
	net.Conn
	limit   uint32
	onLarge func(error)

	first bool // the CONNECT is not complete yet
	v5    bool
	// The state of the packet in progress.
	inHeader bool
	header   uint32 // bytes of the fixed header read so far
	remain   uint32 // remaining length, as far as read; then bytes left
	shift    uint
	pos      uint32 // position in the CONNECT's body
	failed   error
}

func newFrameConn(c net.Conn, limit uint32, onLarge func(error)) *frameConn {
	_ = c.SetDeadline(time.Now().Add(connectDeadline))
	return &frameConn{Conn: c, limit: limit, onLarge: onLarge, first: true, inHeader: true}
}

// SetDeadline implements net.Conn. mochi sets the keepalive's deadline only
// after the CONNECT, so ours holds until then.
func (c *frameConn) SetDeadline(t time.Time) error { return c.Conn.SetDeadline(t) }

// Read implements net.Conn.
func (c *frameConn) Read(p []byte) (int, error) {
	if c.failed != nil {
		return 0, c.failed
	}
	n, err := c.Conn.Read(p)
	if ferr := c.follow(p[:n]); ferr != nil {
		c.failed = ferr
		if c.v5 {
			_ = c.Conn.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = c.Conn.Write(disconnectTooLarge(ferr.Error()))
		}
		c.onLarge(ferr)
		return 0, ferr
	}
	return n, err
}

func (c *frameConn) follow(p []byte) error {
	for len(p) > 0 {
		if !c.inHeader {
			n := min(uint32(len(p)), c.remain) //nolint:gosec // a read buffer
			if c.first {
				// Byte 6 of the CONNECT's body is the protocol level, after the
				// name "MQTT" with its length [MQTT 5, 3.1.2.2].
				if i := 6 - int64(c.pos); i >= 0 && i < int64(n) {
					c.v5 = p[i] == 5
				}
				c.pos += n
			}
			c.remain -= n
			p = p[n:]
			if c.remain == 0 {
				c.inHeader, c.header, c.shift, c.first = true, 0, 0, false
			}
			continue
		}
		b := p[0]
		p = p[1:]
		c.header++
		if c.header == 1 {
			c.remain = 0
			continue
		}
		c.remain |= uint32(b&0x7f) << c.shift
		c.shift += 7
		if b&0x80 != 0 {
			if c.shift >= 28 {
				continue // a fifth length byte: mochi refuses it as malformed
			}
			continue
		}
		limit := c.limit
		if c.first {
			limit = min(limit, maxConnect)
		}
		if c.remain+c.header > limit {
			return errTooLarge{c.remain + c.header, limit}
		}
		c.inHeader = c.remain == 0
		if c.inHeader {
			c.header, c.shift = 0, 0
		}
	}
	return nil
}

// disconnectTooLarge is a DISCONNECT with reason code 0x95 and a reason string
// [MQTT-3.14.2.1].
func disconnectTooLarge(reason string) []byte {
	reason = reason[:min(len(reason), 100)]
	props := append([]byte{0x1f, 0, byte(len(reason))}, reason...)
	body := append([]byte{0x95, byte(len(props))}, props...)
	return append([]byte{0xe0, byte(len(body))}, body...)
}
