package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"
)

// conn is one MQTT 5 connection, as cheap as a load generator needs it: packets
// are parsed where they were read, and written in batches. One goroutine reads,
// one writes.
type conn struct {
	nc       net.Conn
	in       []byte
	from, to int // what of in is read and not parsed
	out      []byte

	receiveMax int  // the broker's
	present    bool // the broker had the session
}

// connect is what CONNECT carries.
type connect struct {
	id, user, password string
	keepalive          uint16
	expiry             uint32 // of the session, s; 0 ends it with the connection
	resume             bool   // clean start false
}

// Packet types, as the upper half of the first byte.
const (
	typeConnack    = 2
	typePublish    = 3
	typePuback     = 4
	typeSuback     = 9
	typeDisconnect = 14
)

type packet struct {
	first byte
	body  []byte // valid until the next fill
}

func (p packet) typ() byte { return p.first >> 4 }

var errFrame = errors.New("malformed packet from the broker")

const dialTimeout = 20 * time.Second

// dial connects and waits for the CONNACK. The connection is closed when ctx ends.
func dial(ctx context.Context, addr string, o connect) (*conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	nc, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	context.AfterFunc(ctx, func() { _ = nc.Close() })
	c := &conn{nc: nc, in: make([]byte, 2048), receiveMax: 65535}
	_ = nc.SetDeadline(time.Now().Add(dialTimeout))
	body := appendString(nil, "MQTT")
	flags := byte(0)
	if !o.resume {
		flags |= 2
	}
	if o.user != "" {
		flags |= 0xc0
	}
	body = append(body, 5, flags)
	body = binary.BigEndian.AppendUint16(body, o.keepalive)
	if o.expiry > 0 {
		body = append(body, 5, 0x11)
		body = binary.BigEndian.AppendUint32(body, o.expiry)
	} else {
		body = append(body, 0)
	}
	body = appendString(body, o.id)
	if o.user != "" {
		body = appendString(appendString(body, o.user), o.password)
	}
	c.out = appendPacket(c.out, 0x10, body)
	if err := c.flush(); err != nil {
		return nil, errors.Join(err, nc.Close())
	}
	p, err := c.wait(typeConnack)
	if err == nil {
		err = c.connack(p.body)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("connect to %s as %s: %w", addr, o.id, err), nc.Close())
	}
	_ = nc.SetDeadline(time.Time{})
	return c, nil
}

func (c *conn) connack(b []byte) error {
	if len(b) < 2 {
		return errFrame
	}
	if b[1] != 0 {
		return fmt.Errorf("the broker refused with reason code 0x%02x", b[1])
	}
	c.present = b[0]&1 != 0
	props, _, err := varint(b[2:])
	if err != nil {
		return err
	}
	for len(props) > 0 {
		id := props[0]
		n := 0
		switch id {
		case 0x24, 0x25, 0x28, 0x29, 0x2a:
			n = 1
		case 0x13, 0x21, 0x22:
			n = 2
		case 0x11, 0x27:
			n = 4
		case 0x12, 0x15, 0x16, 0x1a, 0x1c, 0x1f, 0x26:
			for range 1 + int(id/0x26) { // a user property is two strings
				if len(props) < 3+n {
					return errFrame
				}
				n += 2 + int(binary.BigEndian.Uint16(props[1+n:]))
			}
		default:
			return errFrame
		}
		if len(props) < 1+n {
			return errFrame
		}
		if id == 0x21 {
			c.receiveMax = int(binary.BigEndian.Uint16(props[1:]))
		}
		props = props[1+n:]
	}
	return nil
}

// noRetained in a subscription's options asks for live messages only.
const noRetained = 2 << 4

// suback gives the error of a subscription that was refused.
func suback(p packet) error {
	if len(p.body) < 4 {
		return errFrame
	}
	if code := p.body[len(p.body)-1]; code >= 0x80 {
		return fmt.Errorf("the broker refused the subscription with reason code 0x%02x", code)
	}
	return nil
}

// wait gives the next packet, which must be of the type.
func (c *conn) wait(typ byte) (packet, error) {
	for {
		p, ok, err := c.next()
		if err != nil {
			return p, err
		}
		if ok {
			if p.typ() == typ {
				return p, nil
			}
			if err := c.ended(p); err != nil {
				return p, err
			}
			return p, fmt.Errorf("packet of type %d instead of %d", p.typ(), typ)
		}
		if err := c.fill(); err != nil {
			return p, err
		}
	}
}

// ended says why the broker disconnects, if the packet does.
func (c *conn) ended(p packet) error {
	if p.typ() != typeDisconnect {
		return nil
	}
	code := byte(0)
	if len(p.body) > 0 {
		code = p.body[0]
	}
	return fmt.Errorf("the broker disconnected with reason code 0x%02x", code)
}

// next gives the next packet that was read whole.
func (c *conn) next() (p packet, ok bool, err error) {
	b := c.in[c.from:c.to]
	if len(b) < 2 {
		return p, false, nil
	}
	n, i := 0, 1
	for shift := 0; ; shift += 7 {
		if shift > 21 {
			return p, false, errFrame
		}
		if i == len(b) {
			return p, false, nil
		}
		d := b[i]
		i++
		n |= int(d&0x7f) << shift
		if d < 0x80 {
			break
		}
	}
	if len(b) < i+n {
		return p, false, nil
	}
	c.from += i + n
	return packet{b[0], b[i : i+n]}, true, nil
}

// fill reads once. It voids the packets before.
func (c *conn) fill() error {
	if c.from > 0 {
		c.to = copy(c.in, c.in[c.from:c.to])
		c.from = 0
	}
	// Idle connections keep 2 kB, busy ones grow once.
	if len(c.in)-c.to < 1024 {
		in := make([]byte, max(64<<10, 2*len(c.in)))
		copy(in, c.in[:c.to])
		c.in = in
	}
	n, err := c.nc.Read(c.in[c.to:])
	c.to += n
	if n > 0 {
		return nil
	}
	return err
}

func (c *conn) flush() error {
	if len(c.out) == 0 {
		return nil
	}
	_, err := c.nc.Write(c.out)
	c.out = c.out[:0]
	return err
}

// disconnect says goodbye and ends the session, a stored one as well.
func (c *conn) disconnect() {
	_, _ = c.nc.Write([]byte{typeDisconnect << 4, 7, 0, 5, 0x11, 0, 0, 0, 0})
	_ = c.nc.Close()
}

// parsePublish takes a PUBLISH apart. id is 0 with QoS 0.
func parsePublish(p packet) (topic, payload []byte, id uint16, err error) {
	b := p.body
	if len(b) < 2 {
		return nil, nil, 0, errFrame
	}
	n := 2 + int(binary.BigEndian.Uint16(b))
	if len(b) < n {
		return nil, nil, 0, errFrame
	}
	topic, b = b[2:n], b[n:]
	if p.first&6 != 0 {
		if len(b) < 2 {
			return nil, nil, 0, errFrame
		}
		id, b = binary.BigEndian.Uint16(b), b[2:]
	}
	_, payload, err = varint(b)
	return topic, payload, id, err
}

// parsePuback gives the packet id and the reason code.
func parsePuback(p packet) (id uint16, code byte, err error) {
	if len(p.body) < 2 {
		return 0, 0, errFrame
	}
	if len(p.body) > 2 {
		code = p.body[2]
	}
	return binary.BigEndian.Uint16(p.body), code, nil
}

// varint splits b into what its leading length covers and the rest.
func varint(b []byte) (head, rest []byte, err error) {
	n := 0
	for i := range min(4, len(b)) {
		n |= int(b[i]&0x7f) << (7 * i)
		if b[i] < 0x80 {
			if b = b[i+1:]; len(b) < n {
				break
			}
			return b[:n], b[n:], nil
		}
	}
	return nil, nil, errFrame
}

func appendString(dst []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint16(dst, uint16(len(s))), s...)
}

func appendHeader(dst []byte, first byte, n int) []byte {
	dst = append(dst, first)
	for ; n > 0x7f; n >>= 7 {
		dst = append(dst, byte(n)|0x80)
	}
	return append(dst, byte(n))
}

func appendPacket(dst []byte, first byte, body []byte) []byte {
	return append(appendHeader(dst, first, len(body)), body...)
}

// appendPublish appends a PUBLISH of QoS 1.
func appendPublish(dst []byte, topic string, id uint16, retain bool, payload []byte) []byte {
	first := byte(typePublish<<4 | 1<<1)
	if retain {
		first |= 1
	}
	dst = appendHeader(dst, first, 2+len(topic)+2+1+len(payload))
	dst = appendString(dst, topic)
	dst = binary.BigEndian.AppendUint16(dst, id)
	dst = append(dst, 0)
	return append(dst, payload...)
}

func appendPuback(dst []byte, id uint16) []byte {
	return append(dst, typePuback<<4, 2, byte(id>>8), byte(id))
}

func appendSubscribe(dst []byte, filter string, options byte) []byte {
	body := appendString([]byte{0, 1, 0}, filter)
	return appendPacket(dst, 0x82, append(body, options))
}
