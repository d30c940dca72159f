package netem

import (
	"encoding/binary"
	"net/netip"
)

// flowKey names a TCP connection by its ends.
type flowKey struct{ node, host netip.AddrPort }

// flow is what a middlebox knows of a TCP connection.
type flow struct {
	key   flowKey
	bytes int64
	dead  bool // every packet is answered with RST
	// next is the sequence number that each end wants next, as far as it has said.
	node, host struct {
		known bool
		next  uint32
	}
}

const (
	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10
)

// segment is what is read of a TCP segment.
type segment struct {
	src, dst netip.AddrPort
	up       bool
	seq, ack uint32
	flags    byte
	length   uint32 // in sequence numbers
}

// parseSegment reads an IPv4 packet; false says that it is no TCP segment with
// its header in it.
func parseSegment(b []byte, up bool) (segment, bool) {
	head := int(b[0]&0x0f) * 4
	if b[9] != 6 || binary.BigEndian.Uint16(b[6:])&0x1fff != 0 || len(b) < head+20 {
		return segment{}, false
	}
	t := b[head:]
	s := segment{
		src: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[12:16])), binary.BigEndian.Uint16(t)),
		dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[16:20])), binary.BigEndian.Uint16(t[2:])),
		up:  up, seq: binary.BigEndian.Uint32(t[4:]), ack: binary.BigEndian.Uint32(t[8:]), flags: t[13],
	}
	s.length = uint32(max(0, len(t)-int(t[12]>>4)*4))
	s.length += uint32(s.flags>>1&1) + uint32(s.flags&1) // SYN and FIN count
	return s, true
}

func (s *segment) key() flowKey {
	if s.up {
		return flowKey{node: s.src, host: s.dst}
	}
	return flowKey{node: s.dst, host: s.src}
}

// reset answers the segment of a connection that does not exist, or gives nil
// where it asks for none (RFC 9293, 3.5.2).
func (s *segment) reset() []byte {
	switch {
	case s.flags&flagRST != 0:
		return nil
	case s.flags&flagACK != 0:
		return makeReset(s.dst, s.src, s.ack, 0, flagRST)
	default:
		return makeReset(s.dst, s.src, 0, s.seq+s.length, flagRST|flagACK)
	}
}

// flowLocked finds the connection of a segment; a SYN begins a new one.
func (l *Line) flowLocked(s *segment) *flow {
	k := s.key()
	f := l.mu.flows[k]
	if f == nil || s.flags&(flagSYN|flagACK) == flagSYN && f.dead {
		f = &flow{key: k}
		l.mu.flows[k] = f
	}
	return f
}

func (f *flow) seen(s *segment) {
	end := &f.host
	if s.up {
		end = &f.node
	}
	if s.flags&flagACK != 0 {
		end.known, end.next = true, s.ack
	}
}

// endLocked ends a connection and gives the RST for each end, as far as its
// sequence numbers are known. Where more has arrived since an end named what it
// wants next, it answers this one with an ACK, and gets the right one.
func (l *Line) endLocked(f *flow) (up, down []byte) {
	f.dead = true
	l.mu.resets++
	if f.host.known {
		up = makeReset(f.key.node, f.key.host, f.host.next, 0, flagRST)
	}
	if f.node.known {
		down = makeReset(f.key.host, f.key.node, f.node.next, 0, flagRST)
	}
	return up, down
}

// Reset ends every TCP connection, as a NAT that restarted does: both ends get
// a RST, and another in answer to whatever they go on to send.
func (l *Line) Reset() {
	var ups, downs [][]byte
	l.mu.Lock()
	for k, f := range l.mu.flows {
		if f.dead {
			delete(l.mu.flows, k) // its end was long ago
			continue
		}
		up, down := l.endLocked(f)
		ups, downs = append(ups, up), append(downs, down)
	}
	l.mu.Unlock()
	l.up.write(ups...)
	l.down.write(downs...)
}

// makeReset makes an IPv4 packet with a TCP segment of flags alone.
func makeReset(src, dst netip.AddrPort, seq, ack uint32, flags byte) []byte {
	b := make([]byte, 40)
	b[0], b[8], b[9] = 0x45, 64, 6
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], src.Addr().AsSlice())
	copy(b[16:], dst.Addr().AsSlice())
	binary.BigEndian.PutUint16(b[10:], checksum(0, b[:20]))
	t := b[20:]
	binary.BigEndian.PutUint16(t, src.Port())
	binary.BigEndian.PutUint16(t[2:], dst.Port())
	binary.BigEndian.PutUint32(t[4:], seq)
	binary.BigEndian.PutUint32(t[8:], ack)
	t[12], t[13] = 5<<4, flags
	binary.BigEndian.PutUint16(t[16:], checksum(6+uint32(len(t)), b[12:]))
	return b
}

// checksum is the Internet's (RFC 1071), over an even number of bytes.
func checksum(sum uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
