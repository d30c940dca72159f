package broker

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
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
	"github.com/fairlead-io/fairlead/broker/client/zconn"
)

// listener is what is to be known of a listener for its connections.
type listener struct {
	id     string // as given to Listen
	refuse bool   // a full queue refuses the publisher, instead of dropping its oldest
}

// Listen opens a listener: host:port or mqtt://host:port for TCP,
// ws://host:port/path for WebSocket, mqtts and wss for the same within TLS, which
// takes [Options].TLS, unix:///path for a socket file. It gives the address that
// clients use, with the port that the system chose for port 0.
//
// A client that asks for it, by ALPN or by a WebSocket subprotocol, gets a
// compressed connection; see package zconn.
//
// ?queue-full=refuse behind the address is for publishers that would rather be
// refused, with 0x97, than have the oldest message dropped from a full queue;
// the default is queue-full=drop-oldest.
func (b *Broker) Listen(addr string) (string, error) {
	raw := addr
	if !strings.Contains(addr, "://") {
		addr = "mqtt://" + addr
	}
	u, err := url.Parse(addr)
	if err != nil {
		return "", fmt.Errorf("listen %q: %w; want host:port, ws://host:port/path or unix:///path", raw, err)
	}
	lis := listener{id: raw}
	for k, v := range u.Query() {
		switch {
		case k == "queue-full" && len(v) == 1 && v[0] == "refuse":
			lis.refuse = true
		case k == "queue-full" && len(v) == 1 && v[0] == "drop-oldest":
		default:
			return "", fmt.Errorf("listen %q: unknown setting %s=%s; there is queue-full=drop-oldest and queue-full=refuse", raw, k, strings.Join(v, ","))
		}
	}
	switch u.Scheme {
	case "mqtt", "tcp", "mqtts", "ws", "wss":
	case "unix":
		if u.Path == "" || u.Host != "" {
			return "", fmt.Errorf("listen %q: want unix:///absolute/path", raw)
		}
		l, err := listenUnix(u.Path)
		if err != nil {
			return "", err
		}
		return "unix://" + u.Path, b.serve(l, lis, nil, nil)
	default:
		return "", fmt.Errorf("listen %q: scheme %q is not one of mqtt, mqtts, ws, wss, unix", raw, u.Scheme)
	}
	secure := u.Scheme == "mqtts" || u.Scheme == "wss"
	if secure && b.opts.TLS == nil {
		return "", fmt.Errorf("listen %q: %s wants a certificate and its key, and this broker was given none", raw, u.Scheme)
	}
	l, err := listenTCP(u.Host)
	if err != nil {
		return "", err
	}
	if u.Scheme == "ws" || u.Scheme == "wss" {
		at := u.Scheme + "://" + l.Addr().String() + cmp.Or(u.Path, "/")
		if secure {
			// Browsers ask for h2, which has no WebSocket here.
			l = tls.NewListener(l, b.tlsConfig("http/1.1"))
		}
		return at, b.serveWS(l, lis, cmp.Or(u.Path, "/"))
	}
	if secure {
		return "mqtts://" + l.Addr().String(), b.serve(l, lis, b.handshake(b.tlsConfig(zconn.Protocol, wsconn.Subprotocol)), nil)
	}
	return "mqtt://" + l.Addr().String(), b.serve(l, lis, nil, nil)
}

// tlsConfig is the broker's, with the protocols of a listener.
func (b *Broker) tlsConfig(protocols ...string) *tls.Config {
	c := b.opts.TLS.Clone()
	c.MinVersion = max(c.MinVersion, tls.VersionTLS12)
	c.NextProtos = protocols
	return c
}

// handshake makes what turns an accepted connection into an MQTT one.
func (b *Broker) handshake(cfg *tls.Config) func(context.Context, net.Conn) (net.Conn, error) {
	return func(ctx context.Context, c net.Conn) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, b.opts.ConnectDeadline)
		defer cancel()
		t := tls.Server(c, cfg)
		if err := t.HandshakeContext(ctx); err != nil {
			return nil, err
		}
		if t.ConnectionState().NegotiatedProtocol == zconn.Protocol {
			return zconn.New(t), nil
		}
		return t, nil
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
// prepare, where it is given, is run on each connection's own goroutine; its
// context ends with the listener.
func (b *Broker) serve(l net.Listener, lis listener, prepare func(context.Context, net.Conn) (net.Conn, error), closing func()) error {
	id := lis.id
	if closing == nil {
		closing = func() { _ = l.Close() }
	}
	ctx, cancel := context.WithCancel(context.Background())
	closeListener := closing
	closing = func() { cancel(); closeListener() }
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
				if c = b.prepared(ctx, c, lis, prepare); c == nil {
					return
				}
				b.handle(c, lis)
			}()
		}
	}()
	return nil
}

// prepared runs prepare, off the stack on which the client is waited for.
//
//go:noinline
func (b *Broker) prepared(ctx context.Context, c net.Conn, lis listener, prepare func(context.Context, net.Conn) (net.Conn, error)) net.Conn {
	b.stats.socketsReceived.Add(1)
	if prepare == nil {
		return c
	}
	t, err := prepare(ctx, c)
	if err != nil {
		_ = c.Close()
		b.metrics.refused.WithLabelValues("tls").Inc()
		b.denied.log(b.log, "tls handshake failed", lis.id, "remote", c.RemoteAddr().String(), "listener", lis.id, "error", err)
		return nil
	}
	return t
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
		b.handle(there, listener{id: InProcess})
	}()
	return here, nil
}

// InProcess is the listener's name of connections made with [Broker.Pipe].
const InProcess = "in-process"

func (b *Broker) serveWS(l net.Listener, lis listener, path string) error {
	id := lis.id
	conns := newQueueListener(l.Addr())
	up := websocket.Upgrader{
		Subprotocols:     []string{zconn.Protocol, wsconn.Subprotocol},
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
		if !slices.ContainsFunc(websocket.Subprotocols(r), func(p string) bool { return slices.Contains(up.Subprotocols, p) }) {
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
		var c net.Conn = wsconn.New(ws)
		if ws.Subprotocol() == zconn.Protocol {
			c = zconn.New(c)
		}
		if !conns.put(c) {
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
	return b.serve(conns, lis, nil, func() {
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
