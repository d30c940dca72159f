// Package zconn compresses the two directions of a connection, for links that
// are paid by the byte. Both ends agree on it before the first byte, by ALPN or
// by a WebSocket subprotocol named [Protocol]; it knows nothing of MQTT but that
// the first write carries a credential.
//
// A direction is a sequence of frames: two bytes, big-endian, the highest bit
// telling a deflated frame from a stored one, the others the length of the body;
// then the body, of at most 16 KiB once inflated. The bodies of the deflated
// frames are one raw DEFLATE stream (RFC 1951), each with its sync marker
// 00 00 ff ff taken off its end; what stored frames carry is no part of it.
//
// A frame costs as much as one reading does, and 22 bytes more in TLS, so writes
// are gathered. The first after a quiet moment leaves at once, as do the next few
// at 5 ms from each other; a direction that never rests sends 25 frames a
// second, or one of every 64 writes if that is more. So a write waits for 40 ms at
// most, and only where others came just before it.
package zconn

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Protocol names the compressed connection in ALPN and among WebSocket subprotocols.
const Protocol = "fl-mqtt-deflate"

const (
	maxRaw  = 16 << 10    // of a frame, inflated
	maxBody = maxRaw + 64 // DEFLATE adds a few bytes to what does not shrink
	window  = 32 << 10    // DEFLATE's

	header   = 2
	deflated = 0x8000

	// minGap, interval and burst pace the frames: one per interval in the long
	// run, up to burst of them a minGap apart after a rest.
	minGap   = 5 * time.Millisecond
	interval = 40 * time.Millisecond
	burst    = 8
	// maxWrites lets a window of small packets, such as acknowledgements, move
	// on without waiting for the pace.
	maxWrites = 64

	// minDeflate is the least that is worth taking an encoder for.
	minDeflate = 64
	// rest is how long a connection that is silent keeps its encoder.
	rest = time.Minute
	// farewell bounds how long Close waits for what is not sent yet.
	farewell = time.Second
	// maxKept bounds the buffers that a connection keeps between frames.
	maxKept = 4 << 10
)

var errClosed = fmt.Errorf("compressed connection: %w", net.ErrClosed)

// Conn is a compressed connection. Its methods may be called from any goroutine.
//
// Write gathers: an error of sending shows at the next Write or Read, and closes
// the connection. A deadline that is shorter than the gathering is kept. Close
// sends what was written first, for a second at most; closing again does not wait.
//
// An idle connection holds some 50 KiB, most of it the window of what it read;
// one that sends holds an encoder of 800 KiB, too, see [maxHeld].
type Conn struct {
	inner net.Conn
	r     reader

	closing chan struct{} // closed by the first Close
	once    sync.Once

	// turn is the lock of mu, which is held during a write; a channel, so that
	// synctest's clock goes on meanwhile.
	turn chan struct{}

	dl struct { // comes after turn
		sync.Mutex
		write time.Time
		timer *time.Timer // calls tick
	}

	mu struct { // guarded by turn
		err     error  // why nothing can be sent any more
		first   bool   // something was written
		raw     []byte // what waits
		writes  int    // that it came in
		enc     *encoder
		held    bool      // enc is one of the maxHeld
		tail    []byte    // the end of the stream, for the next encoder
		sent    time.Time // the last frame
		allowed time.Time // when the pace allows one, but for the burst
	}
}

// New compresses what goes over c, which is the Conn's from now on.
func New(c net.Conn) *Conn {
	return &Conn{inner: c, r: reader{src: c}, closing: make(chan struct{}), turn: make(chan struct{}, 1)}
}

func (c *Conn) lock()   { c.turn <- struct{}{} }
func (c *Conn) unlock() { <-c.turn }

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	n, err := c.r.read(p)
	if err != nil {
		select {
		case <-c.closing:
		default:
			if !errors.Is(err, net.ErrClosed) {
				break
			}
			c.lock()
			if c.mu.err != nil { // rather than that we closed it
				err = c.mu.err
			}
			c.unlock()
		}
	}
	return n, err
}

// Write implements net.Conn. It blocks while as much as a frame takes waits for
// the connection below. The first write leaves as it is: it holds a credential,
// and next to what others can choose the length of compressed text tells it.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.lock()
	defer c.unlock()
	if !c.mu.first {
		c.mu.first = true
		for n < len(p) && c.mu.err == nil {
			part := p[n:min(n+maxRaw, len(p))]
			c.send(append([]byte{byte(len(part) >> 8), byte(len(part))}, part...))
			n += len(part)
		}
		return n, c.mu.err
	}
	c.mu.writes++
	for {
		select {
		case <-c.closing:
			return n, errClosed
		default:
		}
		if c.mu.err != nil {
			return n, c.mu.err
		}
		part := min(len(p)-n, maxRaw-len(c.mu.raw))
		c.mu.raw = append(c.mu.raw, p[n:n+part]...)
		n += part
		if len(c.mu.raw) == maxRaw {
			c.flush()
		}
		if n == len(p) {
			break
		}
	}
	if len(c.mu.raw) == 0 {
		return n, c.mu.err
	}
	if c.mu.writes >= maxWrites || !c.gather(c.due()) {
		c.flush()
	}
	return n, c.mu.err
}

// due is when the pace allows the next frame.
func (c *Conn) due() time.Time {
	at := c.mu.sent.Add(minGap)
	if paced := c.mu.allowed.Add(-burst * interval); paced.After(at) {
		at = paced
	}
	return at
}

// gather sets the timer to send what waits, unless at is now or not before the
// write deadline.
func (c *Conn) gather(at time.Time) bool {
	c.dl.Lock()
	defer c.dl.Unlock()
	if time.Until(at) <= 0 || !c.dl.write.IsZero() && !at.Before(c.dl.write) {
		return false
	}
	c.wakeLocked(at)
	return true
}

// wakeLocked sets the timer; dl is held.
func (c *Conn) wakeLocked(at time.Time) {
	if c.dl.timer == nil {
		c.dl.timer = time.AfterFunc(time.Until(at), c.tick)
		return
	}
	c.dl.timer.Reset(time.Until(at))
}

// tick sends what waits, and lets the encoder of a silent connection go.
func (c *Conn) tick() {
	c.lock()
	defer c.unlock()
	if c.mu.err != nil {
		return
	}
	switch {
	case len(c.mu.raw) > 0:
		c.flush()
	case time.Since(c.mu.sent) >= rest:
		c.release()
	default:
		c.retire()
	}
}

// retire sets the timer to let the encoder go.
func (c *Conn) retire() {
	if c.mu.enc != nil {
		c.dl.Lock()
		c.wakeLocked(c.mu.sent.Add(rest))
		c.dl.Unlock()
	}
}

// flush sends what waits.
func (c *Conn) flush() {
	raw := c.mu.raw
	if c.mu.raw = raw[:0]; cap(raw) > maxKept {
		c.mu.raw = nil
	}
	c.mu.writes = 0
	if len(raw) == 0 || c.mu.err != nil {
		return
	}
	now := time.Now()
	if c.mu.allowed.Before(now) {
		c.mu.allowed = now
	}
	c.mu.allowed = c.mu.allowed.Add(interval)
	// Full frames are not paced, and what follows them does not pay for them.
	if latest := now.Add((burst + 1) * interval); c.mu.allowed.After(latest) {
		c.mu.allowed = latest
	}
	if c.mu.enc == nil && len(raw) < minDeflate {
		c.send(append([]byte{byte(len(raw) >> 8), byte(len(raw))}, raw...))
	} else {
		c.acquire()
		frame, err := c.mu.enc.frame(raw)
		if err != nil {
			c.fail(err)
			return
		}
		c.keep(raw)
		c.send(frame)
		if !c.mu.held {
			c.release()
		}
	}
	c.mu.sent = time.Now()
	c.retire()
}

// keep keeps the end of the stream.
func (c *Conn) keep(raw []byte) {
	if len(raw) > maxTail {
		raw = raw[len(raw)-maxTail:]
	}
	if over := len(c.mu.tail) + len(raw) - maxTail; over > 0 {
		c.mu.tail = c.mu.tail[:copy(c.mu.tail, c.mu.tail[over:])]
	}
	c.mu.tail = append(c.mu.tail, raw...)
}

// send writes a frame, or notes why it cannot.
func (c *Conn) send(frame []byte) {
	if _, err := c.inner.Write(frame); err != nil {
		c.fail(err)
	}
}

// fail ends the connection. Whoever reads notices.
func (c *Conn) fail(err error) {
	c.mu.err, c.mu.raw = err, nil
	c.release()
	c.dl.Lock()
	if c.dl.timer != nil {
		c.dl.timer.Stop()
	}
	c.dl.Unlock()
	_ = c.inner.Close()
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	first := false
	c.once.Do(func() { first = true; close(c.closing) })
	if !first {
		return c.inner.Close()
	}
	// From here on the deadline is ours. It frees a write that is under way.
	c.dl.Lock()
	last := time.Now().Add(farewell)
	if c.dl.write.IsZero() || c.dl.write.After(last) {
		_ = c.inner.SetWriteDeadline(last)
	}
	c.dl.Unlock()
	c.lock()
	defer c.unlock()
	c.flush()
	if c.mu.err != nil { // and so it is closed
		return nil
	}
	c.fail(errClosed)
	return nil
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return c.inner.LocalAddr() }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return c.inner.RemoteAddr() }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.inner.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn. What waits is sent before it.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.dl.Lock()
	defer c.dl.Unlock()
	select {
	case <-c.closing:
		return nil
	default:
	}
	c.dl.write = t
	if c.dl.timer != nil && !t.IsZero() && time.Until(t) <= interval {
		c.dl.timer.Reset(0)
	}
	return c.inner.SetWriteDeadline(t)
}

// reader is the receiving half. Its bounds are a frame and the window.
type reader struct {
	mu   sync.Mutex
	src  io.Reader
	err  error  // sticky: the stream makes no sense any more
	head []byte // of the frame under way
	body []byte // the same; need bytes of it are wanted
	need int
	zip  bool
	out  []byte // inflated and not read yet; in body or in hist
	hist []byte // the end of what was inflated
}

func (r *reader) read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(p) == 0 {
		return 0, nil
	}
	for len(r.out) == 0 {
		if r.err != nil {
			return 0, r.err
		}
		if err := r.frame(); err != nil {
			// What is half read stays, for a deadline that is set anew.
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				r.err = err
			}
			return 0, err
		}
	}
	n := copy(p, r.out)
	r.out = r.out[n:]
	return n, nil
}

// fill reads until b has n bytes.
func (r *reader) fill(b *[]byte, n int) error {
	for len(*b) < n {
		if cap(*b) < n {
			*b = append(make([]byte, 0, n+len(ending)), *b...)
		}
		m, err := r.src.Read((*b)[len(*b):n])
		*b = (*b)[:len(*b)+m]
		if err != nil && len(*b) < n {
			return err
		}
	}
	return nil
}

// frame reads one frame.
func (r *reader) frame() error {
	if r.need == 0 {
		if err := r.fill(&r.head, header); err != nil {
			if errors.Is(err, io.EOF) && len(r.head) > 0 {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		v := int(r.head[0])<<8 | int(r.head[1])
		limit := maxRaw
		r.zip = v&deflated != 0
		if r.need = v &^ deflated; r.zip {
			limit = maxBody
		}
		if r.need == 0 || r.need > limit {
			return fmt.Errorf("compressed connection: a frame of %d bytes came, want 1 to %d", r.need, limit)
		}
		if r.body = r.body[:0]; cap(r.body) > maxKept {
			r.body = nil
		}
	}
	if err := r.fill(&r.body, r.need); err != nil {
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	r.head, r.need = r.head[:0], 0
	if !r.zip {
		r.out = r.body
		return nil
	}
	d := decoders.Get().(*decoder)
	defer decoders.Put(d)
	raw, err := d.inflate(append(r.body, ending...), r.hist)
	if err != nil {
		return err
	}
	if over := len(r.hist) - window; over > 0 {
		r.hist = r.hist[:copy(r.hist, r.hist[over:])]
	}
	if n := len(r.hist) + len(raw); n > cap(r.hist) {
		r.hist = append(make([]byte, 0, min(max(n, 2*cap(r.hist)), window+maxRaw)), r.hist...)
	}
	r.hist = append(r.hist, raw...)
	r.out = r.hist[len(r.hist)-len(raw):]
	return nil
}
