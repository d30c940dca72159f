package zconn

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// level 6 is 30 % smaller than the levels that are twice as fast, and within
// 4 % of the slowest.
const level = 6

// maxTail is how much of the stream a fresh encoder is shown.
const maxTail = 4 << 10

// maxHeld bounds the encoders that connections keep between frames, 50 MiB. The
// connections beyond borrow one for each frame, and show it the tail anew.
const maxHeld = 64

var held atomic.Int64

// encoder deflates one direction of one connection at a time.
type encoder struct {
	w   *flate.Writer
	out []byte // a frame
}

// Write takes what the flate.Writer gives.
func (e *encoder) Write(p []byte) (int, error) {
	e.out = append(e.out, p...)
	return len(p), nil
}

var encoders = sync.Pool{New: func() any {
	e := &encoder{}
	e.w, _ = flate.NewWriter(e, level)
	return e
}}

var marker = []byte{0, 0, 0xff, 0xff}

var errMarker = errors.New("compressed connection: deflate gave no sync marker")

// frame makes a deflated frame. It is good until the next call.
func (e *encoder) frame(raw []byte) ([]byte, error) {
	e.out = append(e.out[:0], make([]byte, header)...)
	if err := e.deflate(raw); err != nil {
		return nil, err
	}
	if !bytes.HasSuffix(e.out, marker) {
		return nil, errMarker
	}
	e.out = e.out[:len(e.out)-len(marker)]
	n := len(e.out) - header
	if n > maxBody {
		return nil, fmt.Errorf("compressed connection: %d bytes made a frame of %d", len(raw), n)
	}
	e.out[0], e.out[1] = byte((n|deflated)>>8), byte(n)
	return e.out, nil
}

func (e *encoder) deflate(raw []byte) error {
	if _, err := e.w.Write(raw); err != nil {
		return err
	}
	return e.w.Flush()
}

// acquire takes an encoder and shows it the end of the stream.
func (c *Conn) acquire() {
	if c.mu.enc != nil {
		return
	}
	if c.mu.held = held.Add(1) <= maxHeld; !c.mu.held {
		held.Add(-1)
	}
	c.mu.enc = encoders.Get().(*encoder)
	c.mu.enc.w.Reset(c.mu.enc)
	if len(c.mu.tail) > 0 {
		_ = c.mu.enc.deflate(c.mu.tail) // into memory; the other side has it already
	}
}

// release gives the encoder back, if there is one.
func (c *Conn) release() {
	if c.mu.enc == nil {
		return
	}
	encoders.Put(c.mu.enc)
	c.mu.enc = nil
	if c.mu.held {
		c.mu.held = false
		held.Add(-1)
	}
}

// ending closes the sync marker that a frame lacks, and the stream.
var ending = []byte{0, 0, 0xff, 0xff, 1, 0, 0, 0xff, 0xff}

// decoder inflates one frame at a time.
type decoder struct {
	r   io.ReadCloser
	in  bytes.Reader
	out [maxRaw + 1]byte
}

var decoders = sync.Pool{New: func() any {
	d := &decoder{}
	d.r = flate.NewReader(&d.in)
	return d
}}

// inflate gives what a frame holds, until the decoder is used again. body ends
// with ending; hist is what came before it.
func (d *decoder) inflate(body, hist []byte) ([]byte, error) {
	d.in.Reset(body)
	defer d.in.Reset(nil)
	if err := d.r.(flate.Resetter).Reset(&d.in, hist); err != nil {
		return nil, err
	}
	n := 0
	for {
		m, err := d.r.Read(d.out[n:])
		n += m
		switch {
		case n > maxRaw:
			return nil, fmt.Errorf("compressed connection: a frame holds more than %d bytes", maxRaw)
		case errors.Is(err, io.EOF):
			if d.in.Len() > 0 {
				return nil, errors.New("compressed connection: a frame ends before its body does")
			}
			return d.out[:n], nil
		case err != nil:
			return nil, fmt.Errorf("compressed connection: %w", err)
		}
	}
}
