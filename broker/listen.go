package broker

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
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
		b.serve(l, raw)
		return "mqtt://" + l.Addr().String(), nil
	case "ws":
		l, err := listenTCP(u.Host)
		if err != nil {
			return "", err
		}
		path := u.Path
		if path == "" {
			path = "/"
		}
		b.serveWS(l, raw, path)
		return "ws://" + l.Addr().String() + path, nil
	case "unix":
		l, err := listenUnix(u.Path)
		if err != nil {
			return "", err
		}
		b.serve(l, raw)
		return "unix://" + u.Path, nil
	default:
		return "", fmt.Errorf("listen %q: scheme %q is not one of mqtt, ws, unix", raw, u.Scheme)
	}
}

func listenTCP(hostport string) (net.Listener, error) {
	if _, _, err := net.SplitHostPort(hostport); err != nil {
		return nil, fmt.Errorf("listen %q: %w; want host:port, such as 127.0.0.1:1883", hostport, err)
	}
	l, err := net.Listen("tcp", hostport)
	if errors.Is(err, syscall.EADDRINUSE) {
		_, port, _ := net.SplitHostPort(hostport)
		return nil, fmt.Errorf("listen %s: the port is in use; see who has it with `ss -ltnp 'sport = :%s'`, or choose another: %w", hostport, port, err)
	}
	if err != nil {
		return nil, fmt.Errorf("listen %s: %w", hostport, err)
	}
	return l, nil
}

// listenUnix opens a socket file that only its owner's group may use. A file
// that a killed process left behind is replaced; one that answers is not.
func listenUnix(path string) (net.Listener, error) {
	if path == "" {
		return nil, errors.New("listen unix: want unix:///absolute/path")
	}
	if len(path) > 107 {
		return nil, fmt.Errorf("listen unix %s: the path has %d characters, the system allows 107; choose a shorter data folder", path, len(path))
	}
	if c, err := net.Dial("unix", path); err == nil {
		_ = c.Close()
		return nil, fmt.Errorf("listen unix %s: another process answers there; stop it or choose another path", path)
	} else if errors.Is(err, syscall.ECONNREFUSED) {
		_ = os.Remove(path)
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

func (b *Broker) serve(l net.Listener, id string) {
	b.mu.Lock()
	b.mu.listeners = append(b.mu.listeners, l)
	b.mu.Unlock()
	slots := make(chan struct{}, b.opts.MaxClients)
	b.wg.Add(1)
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
}

// handle runs one connection to its end.
func (b *Broker) handle(c net.Conn, listener string) {
	select {
	case <-b.stopping:
		_ = c.Close()
		return
	default:
	}
	fc := newFrameConn(c, b.opts.MaxPacket, func(err error) {
		b.metrics.refused.WithLabelValues("packet_size").Inc()
		b.denied.log(b.log, "packet refused", c.RemoteAddr().String(), "remote", c.RemoteAddr().String(), "listener", listener, "error", err)
	})
	_ = b.mqtt.EstablishConnection(listener, fc)
	b.hook.clients.Delete(fc)
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
	here, there := net.Pipe()
	go func() {
		defer b.wg.Done()
		b.handle(there, InProcess)
	}()
	return here, nil
}

// InProcess is the listener's name of connections made with [Broker.Pipe].
const InProcess = "in-process"

func (b *Broker) serveWS(l net.Listener, id, path string) {
	conns := newQueueListener(l.Addr())
	up := websocket.Upgrader{
		Subprotocols:     []string{wsconn.Subprotocol},
		HandshakeTimeout: connectDeadline,
		ReadBufferSize:   2048,
		WriteBufferSize:  2048,
		CheckOrigin:      b.originAllowed,
	}
	mux := http.NewServeMux()
	mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
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
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: connectDeadline, IdleTimeout: connectDeadline, MaxHeaderBytes: 16 << 10}
	b.mu.Lock()
	b.mu.listeners = append(b.mu.listeners, srv)
	b.mu.Unlock()
	b.wg.Add(1)
	go func() {
		defer b.wg.Done()
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			b.log.Error("websocket listener ended", "listener", id, "error", err)
		}
	}()
	b.serve(conns, id)
}

// originAllowed lets in programs (which send no Origin), pages from the
// listener's own host, and the origins that the operator named.
func (b *Broker) originAllowed(r *http.Request) bool {
	o := r.Header.Get("Origin")
	if o == "" || slices.Contains(b.opts.AllowedOrigins, o) {
		return true
	}
	u, err := url.Parse(o)
	return err == nil && strings.EqualFold(u.Host, r.Host)
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
