package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/gorilla/websocket"

	"github.com/fairlead-io/fairlead/broker/client/wsconn"
)

// Listen opens a listener: host:port or mqtt://host:port for TCP,
// ws://host:port/path for WebSocket, unix:///path for a socket file. It gives
// the address that clients use, with the port that the system chose for port 0.
func (b *Broker) Listen(addr string) (string, error) {
	raw := addr
	if !strings.Contains(addr, "://") {
		addr = "mqtt://" + addr
	}
	u, err := url.Parse(addr)
	if err != nil {
		return "", fmt.Errorf("listen %q: %w; want host:port, ws://host:port/path or unix:///path", raw, err)
	}
	switch u.Scheme {
	case "mqtt", "tcp":
		l, err := listenTCP(u.Host)
		if err != nil {
			return "", err
		}
		return "mqtt://" + l.Addr().String(), b.serve(l, raw, nil)
	case "ws":
		l, err := listenTCP(u.Host)
		if err != nil {
			return "", err
		}
		path := u.Path
		if path == "" {
			path = "/"
		}
		return "ws://" + l.Addr().String() + path, b.serveWS(l, raw, path)
	case "unix":
		if u.Path == "" || u.Host != "" {
			return "", fmt.Errorf("listen %q: want unix:///absolute/path", raw)
		}
		l, err := listenUnix(u.Path)
		if err != nil {
			return "", err
		}
		return "unix://" + u.Path, b.serve(l, raw, nil)
	default:
		return "", fmt.Errorf("listen %q: scheme %q is not one of mqtt, ws, unix", raw, u.Scheme)
	}
}

// tcpListen probes a silent peer only after two minutes: a client with a
// keepalive of its own never gets there, and on a metered link each probe costs
// as much as a ping. It is for clients that connect with keepalive 0.
var tcpListen = net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 2 * time.Minute, Interval: 15 * time.Second, Count: 4}}

func listenTCP(hostport string) (net.Listener, error) {
	if _, _, err := net.SplitHostPort(hostport); err != nil {
		return nil, fmt.Errorf("listen %q: %w; want host:port, such as 127.0.0.1:1883", hostport, err)
	}
	l, err := tcpListen.Listen(context.Background(), "tcp", hostport)
	if errors.Is(err, syscall.EADDRINUSE) {
		_, port, _ := net.SplitHostPort(hostport)
		return nil, fmt.Errorf("listen %s: the port is in use; see who has it with `ss -ltnp 'sport = :%s'`, or choose another: %w", hostport, port, err)
	}
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", hostport, err)
	}
	return l, nil
}

// listenUnix opens a socket file that only its owner's group may use. A socket
// that a killed process left behind is replaced; one that answers, or another
// kind of file, is not.
func listenUnix(path string) (net.Listener, error) {
	if len(path) > 107 {
		return nil, fmt.Errorf("listen unix %s: the path has %d characters, the system allows 107; choose a shorter data folder", path, len(path))
	}
	if fi, err := os.Lstat(path); err == nil {
		// Connecting to a plain file is refused just as to a socket without owner.
		if fi.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("listen unix %s: a file that is no socket is in the way; move it or choose another path", path)
		}
		if c, err := net.Dial("unix", path); err == nil {
			_ = c.Close()
			return nil, fmt.Errorf("listen unix %s: another process answers there; stop it or choose another path", path)
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			_ = os.Remove(path)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen unix %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("listen unix %s: %w", path, err), l.Close())
	}
	return l, nil
}

// serve accepts connections until l is closed, by closing where it is given.
func (b *Broker) serve(l net.Listener, id string, closing func()) error {
	if closing == nil {
		closing = func() { _ = l.Close() }
	}
	b.mu.Lock()
	closed := b.mu.closed
	if !closed {
		b.mu.listeners = append(b.mu.listeners, closing)
		b.wg.Add(1)
	}
	b.mu.Unlock()
	if closed {
		closing()
		return ErrClosed
	}
	b.inheritWills()
	slots := make(chan struct{}, b.opts.MaxClients)
	go func() {
		defer b.wg.Done()
		for {
			c, err := l.Accept()
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				// Out of file descriptors, most likely: the backlog keeps them waiting.
				b.log.Warn("accept failed, will retry", "listener", id, "error", err)
				select {
				case <-b.stopping:
					return
				case <-time.After(100 * time.Millisecond):
				}
				continue
			}
			select {
			case slots <- struct{}{}:
			default:
				b.metrics.refused.WithLabelValues("max_clients").Inc()
				b.denied.log(b.log, "connection refused: listener is full", id, "listener", id, "limit", b.opts.MaxClients)
				_ = c.Close()
				continue
			}
			b.wg.Add(1)
			go func() {
				defer b.wg.Done()
				defer func() { <-slots }()
				b.handle(c, id)
			}()
		}
	}()
	return nil
}

// handle runs one connection to its end.
func (b *Broker) handle(nc net.Conn, listener string) {
	c := &client{done: make(chan struct{}), exact2: map[uint16]struct{}{}}
	c.fc = newFrameConn(nc, b.opts.MaxPacket, b.opts.ConnectDeadline, func(err error) {
		b.metrics.refused.WithLabelValues("packet_size").Inc()
		b.denied.log(b.log, "packet refused", nc.RemoteAddr().String(), "remote", nc.RemoteAddr().String(), "listener", listener, "error", err)
	})
	c.fc.client = c
	b.mu.Lock()
	closed := b.mu.closed
	if !closed {
		b.mu.live[c] = struct{}{}
	}
	b.mu.Unlock()
	if closed {
		_ = nc.Close()
		return
	}
	defer b.forget(c)
	// mochi's decoders panic on some malformed packets, such as a SUBSCRIBE that
	// ends after a filter: one client's bytes must not end the broker.
	defer func() {
		if r := recover(); r != nil {
			b.metrics.refused.WithLabelValues("malformed").Inc()
			b.denied.log(b.log, "malformed packet", nc.RemoteAddr().String(), "remote", nc.RemoteAddr().String(), "listener", listener, "panic", r, "stack", string(debug.Stack()))
			b.end(c, fmt.Errorf("malformed packet: %v", r))
		}
	}()
	_ = b.mqtt.EstablishConnection(listener, c.fc)
}

// forget removes what is left of a connection.
func (b *Broker) forget(c *client) {
	_ = c.fc.Close()
	c.hang.Do(func() {}) // no farewell from here on
	c.mu.Lock()
	hungUp := c.hungUp
	c.mu.Unlock()
	if hungUp != nil {
		<-hungUp
	}
	if c.conn != nil {
		c.conn.close()
	}
	if c.claimed {
		// mochi forgets them itself, but not where CONNACK failed.
		b.mqtt.UnsubscribeClient(c.mq)
		b.mqtt.Clients.Delete(c.mq.ID)
	}
	b.mu.Lock()
	delete(b.mu.live, c)
	if c.claimed {
		delete(b.mu.claims, c.mq.ID)
	}
	b.mu.Unlock()
	close(c.done)
}

// Pipe connects a client inside this process: what the client says of itself
// reaches Authenticate with the listener's name "in-process".
func (b *Broker) Pipe() (net.Conn, error) {
	b.mu.Lock()
	closed := b.mu.closed
	if !closed {
		b.wg.Add(1)
	}
	b.mu.Unlock()
	if closed {
		return nil, ErrClosed
	}
	b.inheritWills()
	here, there := net.Pipe()
	go func() {
		defer b.wg.Done()
		b.handle(there, InProcess)
	}()
	return here, nil
}

// InProcess is the listener's name of connections made with [Broker.Pipe].
const InProcess = "in-process"

func (b *Broker) serveWS(l net.Listener, id, path string) error {
	conns := newQueueListener(l.Addr())
	up := websocket.Upgrader{
		Subprotocols:     []string{wsconn.Subprotocol},
		HandshakeTimeout: b.opts.ConnectDeadline,
		ReadBufferSize:   2048,
		WriteBufferSize:  2048,
		CheckOrigin:      b.originAllowed,
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if path != "/" && r.URL.Path != path {
			http.Error(w, "MQTT over WebSocket is at "+path, http.StatusNotFound)
			return
		}
		if !slices.Contains(websocket.Subprotocols(r), wsconn.Subprotocol) {
			http.Error(w, "this is MQTT over WebSocket: ask for subprotocol mqtt", http.StatusBadRequest)
			return
		}
		ws, err := up.Upgrade(w, r, nil)
		if err != nil {
			b.metrics.refused.WithLabelValues("websocket").Inc()
			b.denied.log(b.log, "websocket refused", r.RemoteAddr, "remote", r.RemoteAddr, "origin", r.Header.Get("Origin"), "error", err)
			return
		}
		ws.SetReadLimit(int64(b.opts.MaxPacket) + 5)
		if !conns.put(wsconn.New(ws)) {
			_ = ws.Close()
		}
	})
	srv := &http.Server{
		Handler: handler, ReadHeaderTimeout: b.opts.ConnectDeadline, IdleTimeout: b.opts.ConnectDeadline, MaxHeaderBytes: 16 << 10,
		ErrorLog: slog.NewLogLogger(b.log.Handler(), slog.LevelDebug),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			b.log.Error("websocket listener ended", "listener", id, "error", err)
		}
	}()
	return b.serve(conns, id, func() {
		_ = conns.Close()
		// Shutdown waits for the handshakes under way.
		ctx, cancel := context.WithTimeout(context.Background(), farewell)
		defer cancel()
		_ = srv.Shutdown(ctx)
		_ = srv.Close()
		<-ended
	})
}

// originAllowed lets in programs (which send no Origin), pages from the
// listener's own address, and the origins that the operator named. The address
// must be a literal one: behind a name, anybody's page could make itself the
// listener's by pointing its own name here (DNS rebinding).
func (b *Broker) originAllowed(r *http.Request) bool {
	o := r.Header.Get("Origin")
	if o == "" || slices.Contains(b.opts.AllowedOrigins, o) {
		return true
	}
	u, err := url.Parse(o)
	if err != nil || !strings.EqualFold(u.Host, r.Host) {
		return false
	}
	return strings.EqualFold(u.Hostname(), "localhost") || net.ParseIP(u.Hostname()) != nil
}

// queueListener is a net.Listener over connections made elsewhere.
type queueListener struct {
	addr   net.Addr
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newQueueListener(a net.Addr) *queueListener {
	return &queueListener{addr: a, conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (q *queueListener) put(c net.Conn) bool {
	select {
	case q.conns <- c:
		return true
	case <-q.closed:
		return false
	}
}

// Accept implements net.Listener.
func (q *queueListener) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (q *queueListener) Close() error { q.once.Do(func() { close(q.closed) }); return nil }

// Addr implements net.Listener.
func (q *queueListener) Addr() net.Addr { return q.addr }
