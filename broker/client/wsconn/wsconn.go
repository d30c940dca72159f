// Package wsconn makes a byte stream of a WebSocket, as MQTT over WebSocket
// wants it: binary frames whose borders mean nothing [MQTT-6.0.0-1],
// subprotocol "mqtt" [MQTT-6.0.0-3].
package wsconn

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// Subprotocol is what both ends of an MQTT WebSocket offer.
const Subprotocol = "mqtt"

// Conn is a net.Conn over a WebSocket. Reads and writes may run side by side,
// but only one of each at a time; deadlines and Close at any time.
type Conn struct {
	ws *websocket.Conn
	r  io.Reader // the rest of the current frame

	// The write deadline is kept here, because the WebSocket's own may not be
	// set while somebody writes.
	mu       sync.Mutex
	deadline time.Time
}

// New wraps a WebSocket.
func New(ws *websocket.Conn) *Conn { return &Conn{ws: ws} }

// Read reads from the stream; a text frame is an error [MQTT-6.0.0-1].
func (c *Conn) Read(p []byte) (int, error) {
	for {
		if c.r == nil {
			kind, r, err := c.ws.NextReader()
			if err != nil {
				var ce *websocket.CloseError
				if errors.As(err, &ce) && ce.Code == websocket.CloseNormalClosure {
					return 0, io.EOF
				}
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, fmt.Errorf("websocket: a text frame came, MQTT travels in binary frames")
			}
			c.r = r
		}
		n, err := c.r.Read(p)
		if errors.Is(err, io.EOF) {
			c.r = nil
			if n == 0 {
				continue
			}
			err = nil
		}
		return n, err
	}
}

// Write sends p as one binary frame.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	_ = c.ws.SetWriteDeadline(c.deadline)
	c.mu.Unlock()
	if err := c.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close closes the connection below.
func (c *Conn) Close() error { return c.ws.Close() }

// LocalAddr is the address of this end.
func (c *Conn) LocalAddr() net.Addr { return c.ws.LocalAddr() }

// RemoteAddr is the address of the other end.
func (c *Conn) RemoteAddr() net.Addr { return c.ws.RemoteAddr() }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline bounds reads; one that expired makes the connection useless.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.ws.SetReadDeadline(t) }

// SetWriteDeadline bounds writes, the one in progress as well.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.deadline = t
	c.mu.Unlock()
	return c.ws.NetConn().SetWriteDeadline(t)
}
