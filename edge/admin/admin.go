// Package admin serves an agent's admin socket: HTTP over a unix socket in the
// data folder, for the operator's command on the same host.
//
//	s := admin.New(log)
//	s.Handle("GET /store/stats", handler)
//	stop, err := s.Serve(filepath.Join(dir, admin.Socket))
//	defer stop()
//
// The file's mode is 0600: who may read the store may use the socket, nobody else.
package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

// Socket is the socket's name in the data folder.
const Socket = "admin.sock"

const (
	maxConns = 16
	maxBody  = 64 << 10
	// maxPath is the longest path that every system takes for a unix socket.
	maxPath = 103
	// stall is how long a reader of the answer may take nothing.
	stall = 30 * time.Second
)

// Server is an admin socket. Add the handlers before Serve.
type Server struct {
	mux *http.ServeMux
	log *slog.Logger
}

// New makes a server without handlers.
func New(log *slog.Logger) *Server { return &Server{mux: http.NewServeMux(), log: log} }

// Handle adds a handler for a pattern such as "GET /store/stats". An answer that
// its reader does not take for 30 s is ended; one that goes on may take as long
// as it likes. A request's body is cut at 64 KiB.
func (s *Server) Handle(pattern string, h http.HandlerFunc) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		h(&patient{ResponseWriter: w, c: http.NewResponseController(w)}, r)
	})
}

// patient gives every write its own deadline.
type patient struct {
	http.ResponseWriter
	c *http.ResponseController
}

func (p *patient) Write(b []byte) (int, error) {
	if err := p.c.SetWriteDeadline(time.Now().Add(stall)); err != nil {
		return 0, err
	}
	return p.ResponseWriter.Write(b)
}

func (p *patient) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// JSON answers with a value, or with an error as [Fail] does.
func JSON(w http.ResponseWriter, v any, err error) {
	if err != nil {
		Fail(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // whoever asked is gone, or will see that it ends
}

// Fail answers with an error as plain text, its fate as the status.
func Fail(w http.ResponseWriter, status int, err error) {
	http.Error(w, err.Error(), status)
}

// Serve listens at path until stop is called; stop returns when no handler runs
// any more. A socket that a killed agent left is replaced; the caller makes sure
// that no other agent uses the folder.
func (s *Server) Serve(path string) (stop func(), err error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("admin socket %s: the path has %d bytes, a socket's may have %d: give a shorter --data", path, len(path), maxPath)
	}
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("admin socket %s: there is something else: move it away", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	// On Linux the file gets the descriptor's mode when it is made, so that
	// nobody slips in before the Chmod that other systems need.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), 0o600) })
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("admin socket: %w", err), l.Close())
	}
	ctx, cancel := context.WithCancel(context.Background())
	var life sync.RWMutex // held by every handler, and by stop for good
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !life.TryRLock() {
				return // too late; the connection is closed already
			}
			defer life.RUnlock()
			s.mux.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		IdleTimeout:       30 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(limit(l, maxConns)); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("admin socket ended", "path", path, "error", err)
		}
	}()
	return func() {
		cancel()
		grace, end := context.WithTimeout(context.Background(), time.Second)
		defer end()
		_ = srv.Shutdown(grace) // what is not done by then is cut off
		_ = srv.Close()
		<-done
		life.Lock() // every handler has ended
	}, nil
}

// limited lets only so many connections be at a time; the others wait in the
// system's queue.
type limited struct {
	net.Listener
	free   chan struct{} // has one entry for every connection
	closed chan struct{}
	once   sync.Once
}

func limit(l net.Listener, n int) *limited {
	return &limited{Listener: l, free: make(chan struct{}, n), closed: make(chan struct{})}
}

func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &conn{Conn: c, done: sync.OnceFunc(func() { <-l.free })}, nil
}

func (l *limited) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type conn struct {
	net.Conn
	done func()
}

func (c *conn) Close() error {
	defer c.done()
	return c.Conn.Close()
}
