package modbus

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

const keepAlive = 15 * time.Second

// line is the connection to one host:port. All devices there share it and one
// request is under way at a time, as most Modbus servers want it.
type line struct {
	addr string
	turn turnstile

	// The fields below belong to whoever has the turn.
	conn     net.Conn
	sent     uint16 // transaction identifier last used
	dialErr  error  // of the last dial, if it failed
	dialedAt time.Time
}

// request is one exchange; it implements [modbus.Transporter] for goburrow.
type request struct {
	line    *line
	ctx     context.Context // of the one call that the request belongs to
	timeout time.Duration
	urgent  bool
}

// Send sends a frame and gives its reply. The timeout counts from when it is
// this request's turn and covers the dial.
func (r *request) Send(adu []byte) ([]byte, error) {
	l := r.line
	arrived := time.Now()
	if err := l.turn.take(r.ctx, r.urgent); err != nil {
		return nil, err
	}
	defer l.turn.give()
	deadline := time.Now().Add(r.timeout)
	reused := l.conn != nil && !l.stale()
	for {
		if l.conn == nil {
			if l.dialErr != nil && l.dialedAt.After(arrived) {
				// A failed dial answers for the requests that waited behind it
				// too: many devices behind one dead gateway shall not wait a
				// timeout each.
				return nil, l.dialErr
			}
			if err := l.dial(r.ctx, deadline); err != nil {
				return nil, err
			}
		}
		reply, err := l.exchange(r.ctx, adu, deadline)
		if err == nil {
			return reply, nil
		}
		// Whatever went wrong, the stream cannot be trusted any more: a reply
		// that comes late finds a closed connection.
		l.hangUp()
		if r.ctx.Err() != nil {
			return nil, r.ctx.Err()
		}
		if reused && errors.Is(err, errHungUp) {
			// The peer closed an idle connection just as we sent. Nothing of
			// the request was answered; ask once more on a new one.
			reused = false
			continue
		}
		return nil, classify(err)
	}
}

// errHungUp is wrapped by the error of an exchange that ended before the first
// byte of a reply because the peer closed the connection.
var errHungUp = errors.New("the device closed the connection")

func (l *line) dial(ctx context.Context, deadline time.Time) error {
	d := net.Dialer{
		Deadline:        deadline,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: keepAlive, Interval: keepAlive, Count: 3},
	}
	conn, err := d.DialContext(ctx, "tcp", l.addr)
	l.dialedAt, l.dialErr = time.Now(), nil
	if err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // without the local port, which varies
		}
		l.dialErr = &driver.Fault{Quality: payload.QualityUnreachable, Err: fmt.Errorf("connect to %s: %w", l.addr, err)}
		return l.dialErr
	}
	l.conn = conn
	return nil
}

func (l *line) hangUp() {
	if l.conn != nil {
		_ = l.conn.Close() // nothing is left to lose
		l.conn = nil
	}
}

// stale throws away what the peer sent unasked and tells whether the connection
// is of no use any more; it is then closed.
func (l *line) stale() bool {
	closed, err := drain(l.conn)
	if closed || err != nil {
		l.hangUp()
		return true
	}
	return false
}

// exchange writes the frame and reads until its reply or the deadline.
func (l *line) exchange(ctx context.Context, adu []byte, deadline time.Time) ([]byte, error) {
	l.sent++
	binary.BigEndian.PutUint16(adu, l.sent)
	if err := l.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	conn := l.conn
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := l.conn.Write(adu); err != nil {
		return nil, hungUp(err)
	}
	for answered := false; ; answered = true {
		reply, err := readFrame(l.conn)
		switch {
		case err != nil && answered:
			return nil, err
		case err != nil:
			return nil, hungUp(err)
		case binary.BigEndian.Uint16(reply) != l.sent:
			continue // a late or doubled reply to an earlier request
		}
		return reply, verify(adu, reply)
	}
}

func hungUp(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return errHungUp
	}
	return err
}

// readFrame reads one ADU by the length in its header, however it is split.
func readFrame(r io.Reader) ([]byte, error) {
	buf := make([]byte, maxADU)
	if _, err := io.ReadFull(r, buf[:headerSize]); err != nil {
		return nil, err
	}
	if protocol := binary.BigEndian.Uint16(buf[2:]); protocol != 0 {
		return nil, malformed("protocol identifier %d in a reply: want 0; is this a Modbus TCP server?", protocol)
	}
	n := int(binary.BigEndian.Uint16(buf[4:])) - 1 // without the unit, read above
	if n < 2 || headerSize+n > maxADU {
		return nil, malformed("length %d in a reply: want 3 to %d", n+1, maxADU-headerSize+1)
	}
	if _, err := io.ReadFull(r, buf[headerSize:headerSize+n]); err != nil {
		return nil, err
	}
	return buf[:headerSize+n], nil
}

// classify gives a transport error its quality word.
func classify(err error) error {
	var f *driver.Fault
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &driver.Fault{Quality: payload.QualityTimeout, Err: errors.New("no reply in time")}
	default:
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
			err = errHungUp
		}
		return &driver.Fault{Quality: payload.QualityUnreachable, Err: err}
	}
}

// turnstile lets one at a time pass: the urgent first, then by arrival.
type turnstile struct {
	mu struct {
		sync.Mutex
		busy           bool
		urgent, normal []chan struct{}
	}
}

// take blocks until it is the caller's turn or ctx ends.
func (t *turnstile) take(ctx context.Context, urgent bool) error {
	t.mu.Lock()
	if !t.mu.busy {
		t.mu.busy = true
		t.mu.Unlock()
		return nil
	}
	c := make(chan struct{}, 1)
	if urgent {
		t.mu.urgent = append(t.mu.urgent, c)
	} else {
		t.mu.normal = append(t.mu.normal, c)
	}
	t.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		t.leave(c)
		return ctx.Err()
	}
}

// leave gives up waiting; a turn that came at the same moment is passed on.
func (t *turnstile) leave(c chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	is := func(o chan struct{}) bool { return o == c }
	t.mu.urgent = slices.DeleteFunc(t.mu.urgent, is)
	t.mu.normal = slices.DeleteFunc(t.mu.normal, is)
	select {
	case <-c:
		t.nextLocked()
	default:
	}
}

// give ends the caller's turn.
func (t *turnstile) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.nextLocked()
}

func (t *turnstile) nextLocked() {
	var c chan struct{}
	switch {
	case len(t.mu.urgent) > 0:
		c, t.mu.urgent = t.mu.urgent[0], t.mu.urgent[1:]
	case len(t.mu.normal) > 0:
		c, t.mu.normal = t.mu.normal[0], t.mu.normal[1:]
	default:
		t.mu.busy = false
		return
	}
	c <- struct{}{}
}
