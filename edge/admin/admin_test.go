package admin_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/edge/admin"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func serve(t *testing.T, add func(*admin.Server)) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), admin.Socket)
	s := admin.New(slog.New(slog.DiscardHandler))
	add(s)
	stop, err := s.Serve(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, stop
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func ask(t *testing.T, c net.Conn, request string) (status int, body string) {
	t.Helper()
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	b, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(b)
}

func TestServe(t *testing.T) {
	path, stop := serve(t, func(s *admin.Server) {
		s.Handle("GET /x", func(w http.ResponseWriter, _ *http.Request) { admin.JSON(w, map[string]int{"n": 1}, nil) })
		s.Handle("GET /bad", func(w http.ResponseWriter, _ *http.Request) { admin.JSON(w, nil, errors.New("no room")) })
		s.Handle("POST /big", func(w http.ResponseWriter, r *http.Request) {
			_, err := io.Copy(io.Discard, r.Body)
			admin.JSON(w, 1, err)
		})
	})
	defer stop()
	for _, c := range []struct {
		request, body string
		status        int
	}{
		{"GET /x HTTP/1.1\r\nHost: a\r\n\r\n", `{"n":1}`, 200},
		{"GET /bad HTTP/1.1\r\nHost: a\r\n\r\n", "no room", 500},
		{"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", "Method Not Allowed", 405},
		{"POST /big HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100_000), "too large", 500},
		{"GET /x HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 100_000) + "\r\n\r\n", "", 431},
	} {
		if status, body := ask(t, dial(t, path), c.request); status != c.status || !strings.Contains(body, c.body) {
			t.Errorf("%.20s: %d %s", c.request, status, body)
		}
	}
}

// The connections beyond the limit wait until one of the others ends.
func TestLimit(t *testing.T) {
	in, out := make(chan struct{}), make(chan struct{})
	path, stop := serve(t, func(s *admin.Server) {
		s.Handle("GET /wait", func(http.ResponseWriter, *http.Request) { in <- struct{}{}; <-out })
	})
	defer stop()
	const limit, more = 16, 4
	for range limit + more {
		c := dial(t, path)
		if _, err := fmt.Fprint(c, "GET /wait HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	for range limit {
		<-in
	}
	select {
	case <-in:
		t.Error("one more than the limit")
	default:
	}
	for range more { // one ends, one comes
		out <- struct{}{}
		<-in
	}
	for range limit {
		out <- struct{}{}
	}
}

// Stopping cuts a handler's connection and waits for it; a socket that a kill
// left is replaced, anything else is not.
func TestStop(t *testing.T) {
	in, ended := make(chan struct{}), false
	path, stop := serve(t, func(s *admin.Server) {
		s.Handle("GET /wait", func(_ http.ResponseWriter, r *http.Request) {
			close(in)
			<-r.Context().Done()
			time.Sleep(1200 * time.Millisecond) // beyond the grace, and stop must wait for it
			ended = true
		})
	})
	c := dial(t, path)
	if _, err := fmt.Fprint(c, "GET /wait HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-in
	stop()
	if !ended {
		t.Error("the handler still runs")
	}
	s := admin.New(slog.New(slog.DiscardHandler))
	old, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	_ = old.Close() // as after a kill
	stop, err = s.Serve(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	stop()
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Serve(path); err == nil || !strings.Contains(err.Error(), "something else") {
		t.Errorf("got %v", err)
	}
	if _, err := s.Serve("/" + strings.Repeat("x", 120)); err == nil || !strings.Contains(err.Error(), "--data") {
		t.Errorf("got %v", err)
	}
}
