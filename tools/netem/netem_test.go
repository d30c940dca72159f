package netem

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const patience = 30 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t *testing.T) *Line {
	t.Helper()
	l, err := Open(1)
	if errors.Is(err, ErrUnavailable) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// connect gives both ends of a TCP connection over the line.
func connect(t *testing.T, l *Line) (node, host *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(l.Host.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	dialed := make(chan error, 1)
	go func() {
		dialed <- l.Do(func() error {
			c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
			if err == nil {
				node = c.(*net.TCPConn)
			}
			return err
		})
	}()
	c, err := ln.Accept()
	if err := errors.Join(err, <-dialed); err != nil {
		t.Fatal(err)
	}
	host = c.(*net.TCPConn)
	for _, c := range []*net.TCPConn{node, host} {
		_ = c.SetDeadline(time.Now().Add(patience))
		_ = c.SetKeepAlive(false) // a probe would be told of what the test is about
		t.Cleanup(func() { _ = c.Close() })
	}
	return node, host
}

// pour sends from one end, and gives what arrives at the other.
func pour(t *testing.T, from, to *net.TCPConn, b []byte) []byte {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(b)
		sent <- errors.Join(err, from.CloseWrite())
	}()
	got, err := io.ReadAll(to)
	if err := errors.Join(err, <-sent); err != nil {
		t.Fatal(err)
	}
	return got
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 >> 3)
	}
	return b
}

func TestPerfect(t *testing.T) {
	l := open(t)
	node, host := connect(t, l)
	b := pattern(4 << 20)
	if got := pour(t, node, host, b); !bytes.Equal(got, b) {
		t.Errorf("%d bytes arrived of %d, or others", len(got), len(b))
	}
	s := l.Stats()
	if s.Up.Bytes < int64(len(b)) || s.Up.Lost+s.Up.Cut+s.Up.Duplicated+s.Up.Overtaking+s.Down.Lost+s.Resets != 0 {
		t.Errorf("stats %+v", s)
	}
}

// TCP gets everything through a bad line, and the line is as bad as it was told to be.
func TestBad(t *testing.T) {
	l := open(t)
	l.Set(Both(Path{Delay: 5 * time.Millisecond, Jitter: 2 * time.Millisecond, Loss: 0.05, Duplicate: 0.05, Reorder: 0.05}))
	began := time.Now()
	node, host := connect(t, l)
	if took := time.Since(began); took < 6*time.Millisecond { // the least that the delays allow for
		t.Errorf("connected after %s, over a line that takes at least 3 ms each way", took)
	}
	for _, x := range []struct{ from, to *net.TCPConn }{{node, host}, {host, node}} {
		b := pattern(300 << 10)
		if got := pour(t, x.from, x.to, b); !bytes.Equal(got, b) {
			t.Errorf("%d bytes arrived of %d, or others", len(got), len(b))
		}
	}
	s := l.Stats()
	for _, p := range []PathStats{s.Up, s.Down} {
		if p.Lost == 0 || p.Duplicated == 0 || p.Overtaking == 0 || p.Cut != 0 || p.Overflowed != 0 {
			t.Errorf("stats %+v", p)
		}
	}
}

// throw sends numbered datagrams up the line, and gives the socket where they arrive.
func throw(t *testing.T, l *Line, n int) *net.UDPConn {
	t.Helper()
	host, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(l.Host, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Close() })
	_ = host.SetReadBuffer(1 << 20)
	var node net.Conn
	err = l.Do(func() (err error) { node, err = net.Dial("udp", host.LocalAddr().String()); return err })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = node.Close() }()
	for i := range n {
		if _, err := node.Write([]byte{byte(i >> 8), byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	return host
}

// over waits until none of n packets is under way any more.
func over(t *testing.T, l *Line, n int64) PathStats {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		s := l.Stats().Up
		if s.Packets+s.Lost+s.Cut == n+s.Duplicated {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("packets are missing: %+v", s)
		}
		time.Sleep(time.Millisecond)
	}
}

// What is under way is cut with the line.
func TestCutUnderWay(t *testing.T) {
	l := open(t)
	l.Set(Conditions{Up: Path{Delay: time.Hour}})
	throw(t, l, 10)
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		l.mu.Lock()
		n := len(l.up.queue)
		l.mu.Unlock()
		if n == 10 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d packets are under way", n)
		}
	}
	l.Set(Conditions{Up: Path{Cut: true}})
	if s := over(t, l, 10); s.Cut != 10 {
		t.Errorf("stats %+v", s)
	}
	l.Set(Conditions{})
	throw(t, l, 10) // and is not waited for
	if s := over(t, l, 20); s.Packets != 10 {
		t.Errorf("stats %+v", s)
	}
}

// Datagrams show what happens to packets.
func TestPackets(t *testing.T) {
	const n = 200
	for _, x := range []struct {
		name       string
		path       Path
		ok         func(got []int) bool
		overtaking bool
	}{
		{"perfect", Path{}, func(got []int) bool { return len(got) == n && slices.IsSorted(got) }, false},
		{"jitter keeps the order", Path{Delay: 20 * time.Millisecond, Jitter: 20 * time.Millisecond}, func(got []int) bool { return len(got) == n && slices.IsSorted(got) }, false},
		{"loss", Path{Loss: 0.5}, func(got []int) bool { return len(got) > n/4 && len(got) < 3*n/4 && slices.IsSorted(got) }, false},
		{"duplicates", Path{Duplicate: 1}, func(got []int) bool { return len(got) == 2*n && got[0] == got[1] }, false},
		{"reordering", Path{Delay: 100 * time.Millisecond, Reorder: 0.5}, func(got []int) bool { return len(got) == n && !slices.IsSorted(got) }, true},
		{"cut", Path{Cut: true}, func(got []int) bool { return len(got) == 0 }, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			l := open(t)
			l.Set(Conditions{Up: x.path})
			host := throw(t, l, n)
			want := over(t, l, n).Packets
			var got []int
			b := make([]byte, 16)
			for range want {
				_ = host.SetReadDeadline(time.Now().Add(patience))
				if _, err := host.Read(b); err != nil {
					t.Fatal(err)
				}
				got = append(got, int(b[0])<<8|int(b[1]))
			}
			if !x.ok(got) {
				t.Errorf("%d arrived: %v", len(got), got)
			}
			if s := l.Stats().Up; (s.Overtaking > 0) != x.overtaking {
				t.Errorf("stats %+v", s)
			}
		})
	}
}

func timeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// A cut line tells nobody, and each direction can be cut alone; what TCP holds
// comes through afterwards.
func TestCut(t *testing.T) {
	for _, x := range []struct {
		name     string
		c        Conditions
		up, down bool // what gets through
	}{
		{"both", Both(Path{Cut: true}), false, false},
		{"up", Conditions{Up: Path{Cut: true}}, false, true},
		{"down", Conditions{Down: Path{Cut: true}}, true, false},
	} {
		t.Run(x.name, func(t *testing.T) {
			l := open(t)
			node, host := connect(t, l)
			l.Set(x.c)
			b := make([]byte, 8)
			for _, d := range []struct {
				from, to *net.TCPConn
				through  bool
			}{{node, host, x.up}, {host, node, x.down}} {
				if _, err := io.WriteString(d.from, "8 bytes."); err != nil {
					t.Fatal(err)
				}
				wait := 100 * time.Millisecond // for what must not come
				if d.through {
					wait = patience
				}
				_ = d.to.SetReadDeadline(time.Now().Add(wait))
				if _, err := io.ReadFull(d.to, b); d.through != (err == nil) || err != nil && !timeout(err) {
					t.Errorf("through a line with %+v: %v", x.c, err)
				}
			}
			l.Set(Conditions{})
			for _, d := range []struct {
				to      *net.TCPConn
				through bool
			}{{host, x.up}, {node, x.down}} {
				_ = d.to.SetReadDeadline(time.Now().Add(patience))
				if d.through {
					continue
				}
				if _, err := io.ReadFull(d.to, b); err != nil || string(b) != "8 bytes." {
					t.Errorf("after it healed: %q, %v", b, err)
				}
			}
		})
	}
}

// Both ends learn of a reset, idle or not; the next connection works.
func TestReset(t *testing.T) {
	l := open(t)
	l.Set(Both(Path{Delay: 5 * time.Millisecond}))
	for range 3 {
		node, host := connect(t, l)
		if _, err := node.Write(pattern(64 << 10)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(host, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		l.Reset()
		for _, c := range []*net.TCPConn{node, host} {
			if _, err := io.Copy(io.Discard, c); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v, want %v", err, syscall.ECONNRESET)
			}
		}
	}
	if s := l.Stats(); s.Resets != 3 {
		t.Errorf("stats %+v", s)
	}
}

func TestFlowBytes(t *testing.T) {
	l := open(t)
	l.Set(Conditions{FlowBytes: 100_000})
	for range 2 {
		node, host := connect(t, l)
		go func() { _, _ = node.Write(pattern(1 << 20)) }()
		n, err := io.Copy(io.Discard, host)
		if !errors.Is(err, syscall.ECONNRESET) || n > 100_000 {
			t.Errorf("%d bytes, then %v", n, err)
		}
	}
	if s := l.Stats(); s.Resets != 2 {
		t.Errorf("stats %+v", s)
	}
}

// Several lines stand side by side, lead to the same host, and leave nothing.
func TestSideBySide(t *testing.T) {
	a, b := open(t), open(t)
	if a.Host == b.Host || a.Node == b.Node {
		t.Fatalf("%s-%s and %s-%s collide", a.Host, a.Node, b.Host, b.Node)
	}
	ln, err := net.Listen("tcp", net.JoinHostPort(a.Host.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	for _, l := range []*Line{a, b} {
		err := l.Do(func() error {
			c, err := net.DialTimeout("tcp", ln.Addr().String(), patience)
			if err != nil {
				return err
			}
			return c.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(); from != l.Node || l.Stats().Up.Packets == 0 {
			t.Errorf("it came from %s, want %s; stats %+v", from, l.Node, l.Stats())
		}
		_ = c.Close()
	}
	// One thread was in a namespace; this one sees the host's devices.
	name := deviceOf(t, a.Host.String())
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if i, err := net.InterfaceByName(name); err == nil {
		t.Errorf("%v is left", i)
	}
}

// deviceOf names the host's device that has an address.
func deviceOf(t *testing.T, addr string) string {
	t.Helper()
	is, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range is {
		as, _ := i.Addrs()
		for _, a := range as {
			if ip, _, err := net.ParseCIDR(a.String()); err == nil && ip.String() == addr {
				return i.Name
			}
		}
	}
	t.Fatalf("no device has %s", addr)
	return ""
}
