package modbus

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// server is a scripted Modbus TCP server: answer is called for every request
// with its number, over all connections, and writes what it likes.
type server struct {
	addr  string
	conns atomic.Int32
}

func serve(t *testing.T, answer func(n int, c net.Conn, request []byte)) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String()}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	var requests atomic.Int32
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns.Add(1)
			mu.Lock()
			open = append(open, c)
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				for {
					head := make([]byte, headerSize)
					if _, err := io.ReadFull(c, head); err != nil {
						return
					}
					body := make([]byte, int(binary.BigEndian.Uint16(head[4:]))-1)
					if _, err := io.ReadFull(c, body); err != nil {
						return
					}
					answer(int(requests.Add(1)), c, append(head, body...))
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return s
}

// reply makes a reply with one register to a read of holding registers.
func reply(request []byte, value uint16) []byte {
	b := []byte{0, 0, 0, 0, 0, 5, request[6], request[7], 2, 0, 0}
	copy(b, request[:2])
	binary.BigEndian.PutUint16(b[9:], value)
	return b
}

// open gives a session with properties a and b, holding registers 0 and 100.
func open(t *testing.T, d driver.Driver, addr string, unit byte, timeout time.Duration) (driver.Session, *device.Device) {
	t.Helper()
	dev := &device.Device{Namespace: "default", Name: fmt.Sprint("d", unit), Protocol: Protocol,
		Modbus: &device.ModbusDevice{Address: addr, Unit: unit, Timeout: device.Duration(timeout)},
		Properties: []device.Property{
			{Name: "a", Type: device.Uint16, Access: device.ReadWrite, Modbus: &device.ModbusProperty{Table: device.HoldingRegister}},
			{Name: "b", Type: device.Uint16, Modbus: &device.ModbusProperty{Table: device.HoldingRegister, Address: 100}},
		}}
	s, err := d.Open(t.Context(), dev)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, dev
}

func readOne(ctx context.Context, s driver.Session, p *device.Property) string {
	r := s.Read(ctx, []*device.Property{p})[0]
	if r.Err != nil {
		var f *driver.Fault
		if errors.As(r.Err, &f) {
			return f.Quality
		}
		return r.Err.Error()
	}
	return fmt.Sprint(r.Value)
}

// TestTransportFaults: each case scripts the answers to the requests in turn and
// states what three reads of the same register give.
func TestTransportFaults(t *testing.T) {
	type script = func(n int, c net.Conn, q []byte)
	write := func(c net.Conn, b []byte) { _, _ = c.Write(b) }
	first := func(fault script) script {
		return func(n int, c net.Conn, q []byte) {
			if n == 1 {
				fault(n, c, q)
			} else {
				write(c, reply(q, uint16(n)))
			}
		}
	}
	for _, test := range []struct {
		name   string
		script script
		want   string // three reads
		conns  int32
	}{
		{"well behaved", func(n int, c net.Conn, q []byte) { write(c, reply(q, uint16(n))) }, "1 2 3", 1},
		{"no reply, redialled after the timeout", first(func(int, net.Conn, []byte) {}), "bad:timeout 2 3", 2},
		{"a late reply is never another request's value", func(n int, c net.Conn, q []byte) {
			if n == 1 { // longer than the timeout: it comes when the next request waits
				time.Sleep(150 * time.Millisecond)
			}
			write(c, reply(q, uint16(n)))
		}, "bad:timeout 2 3", 2},
		{"a reply to an earlier transaction is passed over", func(n int, c net.Conn, q []byte) {
			old := reply(q, 999)
			binary.BigEndian.PutUint16(old, binary.BigEndian.Uint16(q)-1)
			write(c, append(old, reply(q, uint16(n))...))
		}, "1 2 3", 1},
		{"a doubled reply is flushed", func(n int, c net.Conn, q []byte) {
			write(c, append(reply(q, uint16(n)), reply(q, 999)...))
		}, "1 2 3", 1},
		{"only stale transactions: the deadline is absolute", first(func(_ int, c net.Conn, q []byte) {
			old := reply(q, 999)
			binary.BigEndian.PutUint16(old, binary.BigEndian.Uint16(q)+7)
			for range 20 {
				write(c, old)
				time.Sleep(10 * time.Millisecond)
			}
		}), "bad:timeout 2 3", 2},
		{"byte by byte", func(n int, c net.Conn, q []byte) {
			for _, b := range reply(q, uint16(n)) {
				write(c, []byte{b})
				time.Sleep(time.Millisecond)
			}
		}, "1 2 3", 1},
		{"an exception split 4+5 bytes does not corrupt the next reply", first(func(_ int, c net.Conn, q []byte) {
			e := []byte{q[0], q[1], 0, 0, 0, 3, q[6], q[7] | exception, 2}
			write(c, e[:4])
			time.Sleep(5 * time.Millisecond)
			write(c, e[4:])
		}), "bad:device 2 3", 1},
		{"half a frame, then silence", first(func(_ int, c net.Conn, q []byte) { write(c, reply(q, 1)[:8]) }), "bad:timeout 2 3", 2},
		{"half a frame, then closed", first(func(_ int, c net.Conn, q []byte) { write(c, reply(q, 1)[:8]); c.Close() }), "bad:unreachable 2 3", 2},
		{"a frame shorter than asked", first(func(_ int, c net.Conn, q []byte) {
			write(c, []byte{q[0], q[1], 0, 0, 0, 4, q[6], q[7], 1, 9})
		}), "bad:device 2 3", 1},
		{"a byte count that lies", first(func(_ int, c net.Conn, q []byte) {
			r := reply(q, 1)
			r[8] = 4
			write(c, r)
		}), "bad:device 2 3", 1},
		{"the peer closes instead of answering: asked once more", func(n int, c net.Conn, q []byte) {
			if n == 2 {
				c.Close()
				return
			}
			write(c, reply(q, uint16(n)))
		}, "1 3 4", 2},
		{"the peer closes after every reply", func(n int, c net.Conn, q []byte) { write(c, reply(q, uint16(n))); c.Close() }, "1 2 3", 3},
		{"wrong unit", first(func(_ int, c net.Conn, q []byte) {
			r := reply(q, 1)
			r[6]++
			write(c, r)
		}), "bad:device 2 3", 2},
		{"wrong function", first(func(_ int, c net.Conn, q []byte) {
			r := reply(q, 1)
			r[7]++
			write(c, r)
		}), "bad:device 2 3", 2},
		{"not Modbus at all", first(func(_ int, c net.Conn, _ []byte) { write(c, []byte("HTTP/1.1 400 Bad Request\r\n")) }), "bad:device 2 3", 2},
		{"a length of nothing", first(func(_ int, c net.Conn, q []byte) { write(c, []byte{q[0], q[1], 0, 0, 0, 1, 1, 3}) }), "bad:device 2 3", 2},
		{"a length beyond all frames", first(func(_ int, c net.Conn, q []byte) { write(c, []byte{q[0], q[1], 0, 0, 0xff, 0xff, 1, 3}) }), "bad:device 2 3", 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			srv := serve(t, test.script)
			s, dev := open(t, New(nil), srv.addr, 1, 100*time.Millisecond)
			var got []string
			for range 3 {
				got = append(got, readOne(t.Context(), s, &dev.Properties[0]))
				if strings.Contains(test.name, "flushed") || strings.Contains(test.name, "closes after") {
					time.Sleep(5 * time.Millisecond) // for what came unasked to arrive
				}
			}
			if g := strings.Join(got, " "); g != test.want || srv.conns.Load() != test.conns {
				t.Errorf("got %q on %d connections; want %q on %d", g, srv.conns.Load(), test.want, test.conns)
			}
		})
	}
}

// TestSharedLine: devices at one address share one connection, with one request
// under way at a time, and each gets its own answers.
func TestSharedLine(t *testing.T) {
	var busy atomic.Int32
	srv := serve(t, func(_ int, c net.Conn, q []byte) {
		if busy.Add(1) > 1 {
			t.Error("two requests under way on one line")
		}
		time.Sleep(time.Millisecond)
		busy.Add(-1)
		_, _ = c.Write(reply(q, uint16(q[6])*1000+binary.BigEndian.Uint16(q[8:])))
	})
	d := New(nil)
	var wg sync.WaitGroup
	for unit := byte(1); unit <= 4; unit++ {
		s, dev := open(t, d, srv.addr, unit, time.Second)
		for i := range dev.Properties {
			wg.Go(func() {
				p := &dev.Properties[i]
				want := fmt.Sprint(int(unit)*1000 + int(p.Modbus.Address))
				for range 20 {
					if s, ok := s.(*session); ok { // Read is not to be called twice at a time
						reply, err := s.request(t.Context(), block{device.HoldingRegister, p.Modbus.Address, 1, []int{0}})
						if got := fmt.Sprint(binary.BigEndian.Uint16(append(reply, 0, 0))); err != nil || got != want {
							t.Errorf("unit %d address %d: got %s, %v; want %s", unit, p.Modbus.Address, got, err, want)
						}
					}
				}
			})
		}
	}
	wg.Wait()
	if n := srv.conns.Load(); n != 1 {
		t.Errorf("%d connections for one address; want 1", n)
	}
}

// TestWriteGoesFirst: a write does not queue behind reads that wait.
func TestWriteGoesFirst(t *testing.T) {
	var ts turnstile
	if err := ts.take(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var order []string
	var wg sync.WaitGroup
	pass := func(name string, urgent bool, waiting int) {
		wg.Go(func() {
			if err := ts.take(t.Context(), urgent); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			order = append(order, name)
			mu.Unlock()
			ts.give()
		})
		for { // until it waits
			ts.mu.Lock()
			n := len(ts.mu.normal) + len(ts.mu.urgent)
			ts.mu.Unlock()
			if n == waiting {
				return
			}
			time.Sleep(time.Millisecond)
		}
	}
	pass("read1", false, 1)
	pass("read2", false, 2)
	pass("write", true, 3)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := ts.take(ctx, false); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting past the context: %v", err)
	}
	ts.give()
	wg.Wait()
	if got := strings.Join(order, " "); got != "write read1 read2" {
		t.Errorf("order: %s", got)
	}
	if ts.mu.busy {
		t.Error("the turnstile stays busy")
	}
}

func TestCancelledRequestReturnsAtOnce(t *testing.T) {
	asked := make(chan struct{}, 1)
	srv := serve(t, func(n int, c net.Conn, q []byte) {
		if n == 1 {
			asked <- struct{}{}
			return
		}
		_, _ = c.Write(reply(q, uint16(n)))
	})
	s, dev := open(t, New(nil), srv.addr, 1, time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan string, 1)
	go func() { done <- readOne(ctx, s, &dev.Properties[0]) }()
	<-asked
	cancel()
	if got := <-done; got != context.Canceled.Error() {
		t.Errorf("cancelled read: %s", got)
	}
	if got := readOne(t.Context(), s, &dev.Properties[0]); got != "2" {
		t.Errorf("after a cancelled read: %s; want 2", got)
	}
}

func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	s, dev := open(t, New(nil), addr, 1, 100*time.Millisecond)
	results := s.Read(t.Context(), []*device.Property{&dev.Properties[0], &dev.Properties[1]})
	for i, r := range results {
		var f *driver.Fault
		if !errors.As(r.Err, &f) || f.Quality != payload.QualityUnreachable {
			t.Errorf("property %d: %v", i, r.Err)
		}
	}
	if !strings.Contains(results[0].Err.Error(), addr) {
		t.Errorf("the error does not name %s: %v", addr, results[0].Err)
	}
}

// TestFailedDialAnswersWhoWaited: the requests behind a failed dial fail with
// it; one that comes later dials again, however soon.
func TestFailedDialAnswersWhoWaited(t *testing.T) {
	srv, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	dialled := make(chan struct{}, 8)
	go func() {
		for {
			c, err := srv.Accept()
			if err != nil {
				return
			}
			dialled <- struct{}{}
			c.Close()
		}
	}()
	l := &line{addr: srv.Addr().String()}
	send := func() error {
		r := &request{line: l, ctx: t.Context(), timeout: time.Second}
		_, err := r.Send([]byte{0, 0, 0, 0, 0, 6, 1, 3, 0, 0, 0, 1})
		return err
	}
	if err := l.turn.take(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	const waiting = 3
	results := make(chan error, waiting)
	for range waiting {
		go func() { results <- send() }()
	}
	for queued := 0; queued < waiting; {
		l.turn.mu.Lock()
		queued = len(l.turn.mu.normal)
		l.turn.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
	failed := errors.New("no route")
	l.dialErr, l.dialedAt = failed, time.Now()
	l.turn.give()
	for range waiting {
		if err := <-results; !errors.Is(err, failed) {
			t.Errorf("a request that waited behind the dial: %v", err)
		}
	}
	if n := len(dialled); n != 0 {
		t.Errorf("dialled %d times for those that waited", n)
	}
	if err := send(); errors.Is(err, failed) {
		t.Error("a request that came after the failed dial was answered by it")
	}
	<-dialled
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte{0, 1, 0, 0, 0, 5, 1, 3, 2, 0, 7})
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		frame, err := readFrame(strings.NewReader(string(b)))
		if err == nil && (len(frame) < headerSize+2 || len(frame) > maxADU || string(frame) != string(b[:len(frame)])) {
			t.Errorf("frame %x of %x", frame, b)
		}
	})
}
