package broker

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// maxConnect bounds the first packet: nobody is known yet.
const maxConnect = 64 << 10

// farewell bounds how long a connection that is being ended may take over its
// last packet.
const farewell = time.Second

// errTooLarge ends a connection whose packet is over the bound.
type errTooLarge struct{ size, limit uint32 }

func (e errTooLarge) Error() string {
	return fmt.Sprintf("packet of %d bytes is over the limit of %d", e.size, e.limit)
}

// errLength ends a connection whose packet has a fifth length byte
// [MQTT-1.5.5-1]: mochi would go on reading length bytes for ever.
var errLength = errors.New("the packet's length takes more than four bytes")

// frameConn follows the packet borders of what a client sends, without looking
// inside: an over-long packet is answered with DISCONNECT 0x95 and never
// buffered, and a client that does not send its CONNECT in time is cut off.
type frameConn struct {
	net.Conn
	client *conn // whose connection it is
	limit  uint32

	ending atomic.Bool // the deadline is the last one

	first    bool   // the CONNECT is not complete yet
	kind     byte   // first byte of the packet in progress
	keep     int    // how much of its body is looked at
	body     []byte // that much
	v5       bool
	deadline time.Time // as set last

	ahead    *[16 << 10]byte // what was read and not taken is from:to
	from, to int
	more     bool // there was more than the buffer took

	// The state of the packet in progress.
	inHeader bool
	header   uint32 // bytes of the fixed header read so far
	remain   uint32 // remaining length, as far as read; then bytes left
	shift    uint
	pos      uint32 // position in the CONNECT's body
	failed   error
	refused  bool
}

// newFrameConn bounds the time until the CONNECT is complete: mochi sets the
// keepalive's deadline only then.
func newFrameConn(client *conn, c net.Conn, limit uint32, connect time.Duration) *frameConn {
	_ = c.SetDeadline(time.Now().Add(connect))
	return &frameConn{Conn: c, client: client, limit: limit, first: true, inHeader: true}
}

// SetDeadline implements net.Conn. mochi sets one for each packet; a second
// more or less is not worth the system's time.
func (c *frameConn) SetDeadline(t time.Time) error {
	if c.ending.Load() {
		return nil
	}
	if !c.deadline.IsZero() && !t.IsZero() && t.Sub(c.deadline).Abs() < time.Second {
		return nil
	}
	c.deadline = t
	return c.Conn.SetDeadline(t)
}

// end gives the connection its last deadline.
func (c *frameConn) end() {
	c.ending.Store(true)
	_ = c.Conn.SetDeadline(time.Now().Add(farewell))
}

// Read implements net.Conn. What came before a packet that is refused is read
// as if nothing had happened.
func (c *frameConn) Read(p []byte) (int, error) {
	if c.failed != nil {
		return 0, c.refuse()
	}
	n, err := c.next(p)
	good, ferr := c.follow(p[:n])
	if ferr == nil {
		return n, err
	}
	c.failed = ferr
	if good > 0 {
		return good, nil
	}
	return 0, c.refuse()
}

// aheads are what busy connections read into, so that idle ones need no buffer.
var aheads = sync.Pool{New: func() any { return new([16 << 10]byte) }}

// next reads what has come. Where it fills the caller's small buffer there is
// most likely more, which is then read in one go.
func (c *frameConn) next(p []byte) (n int, err error) {
	if c.ahead == nil {
		c.client.flush()
		if !c.more || len(p) == 0 {
			n, err = c.Conn.Read(p)
			c.client.b.stats.bytesReceived.Add(uint64(n))
			c.more = n == len(p)
			return n, err
		}
		buf := aheads.Get().(*[16 << 10]byte)
		n, err = c.Conn.Read(buf[:])
		c.client.b.stats.bytesReceived.Add(uint64(n))
		c.more = n == len(buf)
		if n == 0 {
			aheads.Put(buf)
			return 0, err
		} // an error beside it comes again
		c.ahead, c.from, c.to = buf, 0, n
	}
	n = copy(p, c.ahead[c.from:c.to])
	c.from += n
	if c.from == c.to {
		aheads.Put(c.ahead)
		c.ahead = nil
	}
	return n, nil
}

func (c *frameConn) refuse() error {
	if !c.refused {
		c.refused = true
		b, remote := c.client.b, c.RemoteAddr().String()
		why := "packet_size"
		if _, ok := c.failed.(packets.Code); ok { //nolint:errorlint // made by follow
			why = "malformed"
		}
		b.metrics.refused.WithLabelValues(why).Inc()
		b.denied.log(b.log, "packet refused", remote, "remote", remote, "listener", c.client.listener, "error", c.failed)
	}
	return c.failed
}

// follow gives the number of bytes before the packet that is refused.
func (c *frameConn) follow(p []byte) (good int, err error) {
	all := len(p)
	for len(p) > 0 {
		if !c.inHeader {
			n := min(uint32(len(p)), c.remain)
			if c.first {
				// Byte 6 of the CONNECT's body is the protocol level, after the
				// name "MQTT" with its length [MQTT 5, 3.1.2.2].
				if i := 6 - int64(c.pos); i >= 0 && i < int64(n) {
					c.v5 = p[i] == 5
				}
				c.pos += n
			}
			room := c.keep - len(c.body)
			c.body = append(c.body, p[:min(int(n), room)]...)
			c.remain -= n
			p = p[n:]
			if c.keep > 0 && (c.remain == 0 || room > 0 && len(c.body) == c.keep) && !c.first {
				if code := checkBody(c.kind, c.body, c.remain == 0); code != packets.CodeSuccess {
					return good, code
				}
			}
			if c.remain == 0 {
				c.inHeader, c.header, c.shift, c.first = true, 0, 0, false
			}
			continue
		}
		if c.header == 0 {
			good = all - len(p)
		}
		b := p[0]
		p = p[1:]
		c.header++
		if c.header == 1 {
			c.kind, c.remain = b, 0
			continue
		}
		c.remain |= uint32(b&0x7f) << c.shift
		c.shift += 7
		if b&0x80 != 0 {
			if c.header == 5 {
				return good, errLength
			}
			continue
		}
		limit := c.limit
		if c.first {
			limit = min(limit, maxConnect)
		}
		if c.remain+c.header > limit {
			return good, errTooLarge{c.remain + c.header, limit}
		}
		switch {
		case c.first:
			c.keep = maxConnect
		case c.v5:
			c.keep, c.body = bodyToCheck(c.kind), c.body[:0]
		default:
			c.keep = 0
		}
		c.inHeader = c.remain == 0
		if c.inHeader {
			c.header, c.shift, c.first = 0, 0, false
		}
	}
	return good, nil
}

// code is the reason code for what follow refused [MQTT-3.14.2.1].
func (c *frameConn) code() packets.Code {
	var code packets.Code
	switch {
	case errors.As(c.failed, &code):
		return code
	case errors.Is(c.failed, errLength):
		return packets.Code{Code: codeMalformed, Reason: c.failed.Error()}
	default:
		return packets.Code{Code: codePacketTooLarge, Reason: c.failed.Error()}
	}
}
