package zconn

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcp gives both ends of a TCP connection.
func tcp(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if a, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

// reading is a PUBLISH as a node sends it.
func reading(r *rand.Rand, i int) []byte {
	return fmt.Appendf(nil, "\x33\x60\x00\x32fl/plant-7/reported/twin/default/press-%02d/property_%02d%c%c\x00{\"v\":%.1f,\"t\":%d}",
		r.IntN(50), r.IntN(100), byte(i>>8), byte(i), r.Float64()*100, 1790000000123+2*i)
}

// mixed gives data of all kinds: readings, one byte, what does not shrink, what
// shrinks to nothing.
func mixed(r *rand.Rand, size int) []byte {
	var b []byte
	for len(b) < size {
		switch r.IntN(8) {
		case 0:
			noise := make([]byte, r.IntN(3*maxRaw))
			for i := range noise {
				noise[i] = byte(r.Uint32())
			}
			b = append(b, noise...)
		case 1:
			b = append(b, make([]byte, r.IntN(3*maxRaw))...)
		case 2:
			b = append(b, 0xc0, 0)
		default:
			for range r.IntN(100) {
				b = append(b, reading(r, r.IntN(1<<16))...)
			}
		}
	}
	return b
}

// Both directions at once, in random pieces, come out as they went in.
func TestStream(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	a, b := tcp(t)
	ends := []*Conn{New(a), New(b)}
	var wg sync.WaitGroup
	for i := range ends {
		from, to := ends[i], ends[1-i]
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		want := mixed(r, 2<<20)
		wg.Go(func() {
			for rest := want; len(rest) > 0; {
				n := min(1+r.IntN(200), len(rest))
				if r.IntN(20) == 0 {
					n = min(r.IntN(5*maxRaw), len(rest))
				}
				if m, err := from.Write(rest[:n]); m != n || err != nil {
					t.Errorf("wrote %d of %d: %v", m, n, err)
					return
				}
				rest = rest[n:]
			}
		})
		rr := rand.New(rand.NewPCG(seed, uint64(i+10)))
		wg.Go(func() {
			var got []byte
			for len(got) < len(want) {
				p := make([]byte, 1+rr.IntN(5000))
				n, err := to.Read(p)
				if err != nil {
					t.Errorf("after %d bytes: %v", len(got), err)
					return
				}
				got = append(got, p[:n]...)
			}
			if !bytes.Equal(got, want) {
				t.Error("what was read is not what was written")
			}
		})
	}
	wg.Wait()
	for _, c := range ends {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if n := held.Load(); n != 0 {
		t.Errorf("%d encoders are held", n)
	}
}

// The window reaches back as far as DEFLATE does.
func TestWindow(t *testing.T) {
	c, w := opened(t)
	r := rand.New(rand.NewPCG(1, 1))
	noise := make([]byte, 2*maxRaw-1000)
	for i := range noise {
		noise[i] = byte(r.Uint32())
	}
	want := []byte("CONNECT")
	for range 3 {
		for rest := noise; len(rest) > 0; rest = rest[min(1000, len(rest)):] {
			write(t, c, rest[:min(1000, len(rest))])
			c.lock()
			c.flush()
			c.unlock()
		}
		want = append(want, noise...)
	}
	_ = c.Close()
	all := bytes.Join(w.frames, nil)
	in := reader{src: bytes.NewReader(all)}
	if got, err := io.ReadAll(readFunc(in.read)); !bytes.Equal(got, want) || err != nil {
		t.Errorf("%d bytes of %d, %v", len(got), len(want), err)
	}
	if cap(in.hist) > window+maxRaw {
		t.Errorf("the reader holds %d bytes", cap(in.hist))
	}
	if len(all) > len(noise)*5/4 {
		t.Errorf("the same %d bytes three times took %d", len(noise), len(all))
	}
}

// Several writers at once do not mix what each of them writes.
func TestWriters(t *testing.T) {
	a, b := tcp(t)
	from, to := New(a), New(b)
	if _, err := from.Write([]byte{255, 255}); err != nil {
		t.Fatal(err)
	}
	const writers, each, size = 8, 200, 100
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for range each {
				if _, err := from.Write(bytes.Repeat([]byte{byte(w)}, size)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		if _, err := io.ReadFull(to, make([]byte, 2)); err != nil {
			t.Error(err)
		}
		for range writers * each {
			p := make([]byte, size)
			if _, err := io.ReadFull(to, p); err != nil {
				t.Error(err)
				return
			}
			if bytes.Count(p, p[:1]) != size {
				t.Errorf("mixed up: %v", p)
			}
		}
	})
	wg.Wait()
	_ = from.Close()
}

// wire is a connection that keeps every write apart.
type wire struct {
	net.Conn
	mu       sync.Mutex
	frames   [][]byte
	at       []time.Time
	err      error
	closed   bool
	deadline time.Time
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.frames = append(w.frames, bytes.Clone(p))
	w.at = append(w.at, time.Now())
	return len(p), w.err
}

func (w *wire) Close() error                       { w.closed = true; return nil }
func (w *wire) SetWriteDeadline(t time.Time) error { w.deadline = t; return nil }
func (w *wire) SetReadDeadline(time.Time) error    { return nil }
func (w *wire) Read([]byte) (int, error)           { return 0, net.ErrClosed }

func (w *wire) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.frames)
}

// opened is a connection after its first write.
func opened(t *testing.T) (*Conn, *wire) {
	t.Helper()
	w := &wire{}
	c := New(w)
	if _, err := c.Write([]byte("CONNECT")); err != nil {
		t.Fatal(err)
	}
	if string(w.frames[0]) != "\x00\x07CONNECT" {
		t.Fatalf("the first write left as %q", w.frames[0])
	}
	return c, w
}

func write(t *testing.T, c *Conn, p []byte) {
	t.Helper()
	if n, err := c.Write(p); n != len(p) || err != nil {
		t.Fatalf("%d of %d: %v", n, len(p), err)
	}
}

// The pace: nobody waits after a quiet moment, few wait 5 ms, none more than 40.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, w := opened(t)
		r := rand.New(rand.NewPCG(1, 1))
		write(t, c, reading(r, 0))
		if n := w.count(); n != 2 {
			t.Fatalf("%d frames: the first packet after a rest is kept back", n)
		}
		// A burst of packets is two frames.
		for i := range 10 {
			write(t, c, reading(r, i))
		}
		time.Sleep(minGap - 1)
		if n := w.count(); n != 2 {
			t.Errorf("%d frames at once", n)
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if n := w.count(); n != 3 {
			t.Errorf("%d frames for a burst", n)
		}
		// Now and then a packet: each leaves at once.
		for i := range 20 {
			time.Sleep(interval)
			before := w.count()
			write(t, c, reading(r, i))
			if w.count() != before+1 {
				t.Fatalf("packet %d waits", i)
			}
		}
		// 500 a second: 25 frames a second, once the burst is over.
		steady := func() {
			for i := range 250 {
				time.Sleep(2 * time.Millisecond)
				write(t, c, reading(r, i))
			}
			synctest.Wait()
		}
		steady()
		before := w.count()
		steady()
		if n := w.count() - before; n < 12 || n > 13 {
			t.Errorf("%d frames in half a second", n)
		}
		// Behind megabytes, a small packet waits no longer than ever.
		write(t, c, make([]byte, 10<<20))
		write(t, c, []byte{0xc0, 0})
		before = w.count()
		time.Sleep(interval)
		synctest.Wait()
		if w.count() != before+1 {
			t.Error("a packet waits for long behind a large one")
		}
		// A window of acknowledgements does not wait.
		time.Sleep(time.Second)
		before = w.count()
		for i := range 4*maxWrites + 1 {
			write(t, c, []byte{0x40, 2, byte(i >> 8), byte(i)})
		}
		if n := w.count() - before; n != 5 {
			t.Errorf("%d frames for %d packets", n, 4*maxWrites+1)
		}
		_ = c.Close()
	})
}

// What waits leaves before the write deadline, whichever came first.
func TestWriteDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, w := opened(t)
		write(t, c, []byte("a"))
		write(t, c, []byte("b"))
		if n := w.count(); n != 2 {
			t.Fatalf("%d frames", n)
		}
		_ = c.SetWriteDeadline(time.Now().Add(time.Millisecond))
		synctest.Wait()
		if n := w.count(); n != 3 {
			t.Error("what waited when the deadline was set is late")
		}
		write(t, c, []byte("c"))
		if n := w.count(); n != 4 {
			t.Error("what was written under a deadline is late")
		}
		_ = c.SetDeadline(time.Time{})
		write(t, c, []byte("d"))
		if n := w.count(); n != 4 {
			t.Error("the deadline still counts")
		}
		_ = c.Close()
	})
	// Nobody reads: the write ends at its deadline, and so does the connection.
	synctest.Test(t, func(t *testing.T) {
		a, b := net.Pipe()
		c := New(a)
		_ = c.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := c.Write(make([]byte, 10*maxRaw)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Write: %v", err)
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("Read: %v", err)
		}
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the other side: %v", err)
		}
	})
}

// A read that timed out, in the middle of a frame too, goes on later.
func TestReadDeadline(t *testing.T) {
	a, b := tcp(t)
	c := New(b)
	for i, x := range []byte("\x00\x03abc") {
		_ = c.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := c.Read(make([]byte, 8)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("byte %d: %v", i, err)
		}
		if _, err := a.Write([]byte{x}); err != nil {
			t.Fatal(err)
		}
	}
	_ = c.SetReadDeadline(time.Time{})
	p := make([]byte, 8)
	if n, err := c.Read(p); string(p[:n]) != "abc" || err != nil {
		t.Errorf("%q, %v", p[:n], err)
	}
}

// Sending that fails behind the writer's back shows at the reader and at the
// next write.
func TestLateError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, w := opened(t)
		broken := errors.New("test: broken pipe")
		write(t, c, []byte("a"))
		w.err = broken
		write(t, c, []byte("b"))
		time.Sleep(minGap)
		synctest.Wait()
		if !w.closed {
			t.Error("the connection stays open")
		}
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, broken) {
			t.Errorf("Read: %v", err)
		}
		if _, err := c.Write([]byte("c")); !errors.Is(err, broken) {
			t.Errorf("Write: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

func TestClose(t *testing.T) {
	// What was written arrives, whenever the close comes.
	for range 200 {
		a, b := tcp(t)
		from, to := New(a), New(b)
		want := 0
		for range rand.IntN(100) {
			want += 100
			if _, err := from.Write(make([]byte, 100)); err != nil {
				t.Fatal(err)
			}
		}
		if rand.IntN(2) == 0 {
			time.Sleep(minGap - time.Duration(rand.IntN(200))*time.Microsecond)
		}
		if err := from.Close(); err != nil {
			t.Error(err)
		}
		if _, err := from.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Write: %v", err)
		}
		if _, err := from.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Read: %v", err)
		}
		got, err := io.ReadAll(to)
		if len(got) != want || err != nil {
			t.Fatalf("%d bytes of %d, %v", len(got), want, err)
		}
	}
	// One that nobody reads holds Close for a second, and a second Close ends that.
	for _, writing := range []bool{false, true} {
		for _, again := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				a, b := net.Pipe()
				c := New(a)
				go func() { _, _ = io.ReadFull(b, make([]byte, 3+3)) }()
				write(t, c, []byte("x"))
				write(t, c, []byte("y"))
				synctest.Wait()
				wrote := make(chan error, 1)
				if writing {
					go func() { _, err := c.Write(make([]byte, 10*maxRaw)); wrote <- err }()
					synctest.Wait()
				} else {
					write(t, c, []byte("z"))
				}
				if again {
					time.AfterFunc(farewell/10, func() { _ = c.Close() })
				}
				began := time.Now()
				_ = c.Close()
				want := farewell
				if again {
					want = farewell / 10
				}
				if took := time.Since(began); took != want {
					t.Errorf("writing %v, again %v: Close took %s, want %s", writing, again, took, want)
				}
				if writing {
					if err := <-wrote; err == nil {
						t.Error("the write that was cut off succeeded")
					}
				}
				_ = b.Close()
			})
		}
	}
	if n := held.Load(); n != 0 {
		t.Errorf("%d encoders are held", n)
	}
}

// The other side may stop sending and go on reading.
func TestHalfClose(t *testing.T) {
	a, b := tcp(t)
	from, to := New(a), New(b)
	write(t, from, []byte("question"))
	_ = a.(*net.TCPConn).CloseWrite()
	if got, err := io.ReadAll(to); string(got) != "question" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	write(t, to, []byte("answer"))
	_ = to.Close()
	if got, err := io.ReadAll(from); string(got) != "answer" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// The credential of the first write is not something to refer to.
func TestFirstWriteIsApart(t *testing.T) {
	secret := make([]byte, 200)
	for i := range secret {
		secret[i] = byte(rand.Uint32())
	}
	w := &wire{}
	c := New(w)
	write(t, c, secret)
	write(t, c, secret)
	if n := len(w.frames[1]); n < len(secret) {
		t.Errorf("the same bytes again took %d bytes", n)
	}
	_ = c.Close()
}

// Beyond the encoders that may be kept, connections borrow, and nothing else
// changes. A silent one gives its encoder back, and goes on where it was.
func TestEncoders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := rand.New(rand.NewPCG(1, 1))
		var conns []*Conn
		var wires []*wire
		want := make([][]byte, maxHeld+10)
		round := func() {
			for i, c := range conns {
				for j := range 3 {
					p := reading(r, j)
					want[i] = append(want[i], p...)
					write(t, c, p)
				}
			}
			time.Sleep(interval)
			synctest.Wait()
		}
		for i := range want {
			c, w := opened(t)
			conns, wires, want[i] = append(conns, c), append(wires, w), []byte("CONNECT")
		}
		for range 5 {
			round()
		}
		if n := held.Load(); n != maxHeld {
			t.Errorf("%d encoders are held, want %d", n, maxHeld)
		}
		// A deadline, as for a keepalive, does not keep it.
		_ = conns[0].SetDeadline(time.Now().Add(interval / 2))
		synctest.Wait()
		_ = conns[0].SetDeadline(time.Now().Add(rest / 2))
		time.Sleep(rest)
		synctest.Wait()
		if n := held.Load(); n != 0 {
			t.Errorf("%d encoders are held after a rest", n)
		}
		_ = conns[0].SetDeadline(time.Time{})
		for range 5 {
			round()
		}
		for i, c := range conns {
			_ = c.Close()
			in := reader{src: bytes.NewReader(bytes.Join(wires[i].frames, nil))}
			if got, err := io.ReadAll(readFunc(in.read)); !bytes.Equal(got, want[i]) || err != nil {
				t.Fatalf("connection %d: %d bytes of %d, %v", i, len(got), len(want[i]), err)
			}
			if last := wires[i].frames[len(wires[i].frames)-1]; len(last) > 90 {
				t.Errorf("connection %d: the last readings took %d bytes", i, len(last))
			}
		}
		if n := held.Load(); n != 0 {
			t.Errorf("%d encoders are held", n)
		}
	})
}

type readFunc func([]byte) (int, error)

func (f readFunc) Read(p []byte) (int, error) { return f(p) }

// frame makes a deflated frame of data as another implementation might.
func frame(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	n := b.Len() - len(marker)
	return append([]byte{byte(n>>8) | 0x80, byte(n)}, b.Bytes()[:n]...)
}

// What makes no sense ends the connection with an error, within its bounds.
func TestMalformed(t *testing.T) {
	full := frame(t, make([]byte, maxRaw))
	for name, x := range map[string]struct {
		in   []byte
		want string
	}{
		"end":               {nil, "EOF"},
		"end in a header":   {[]byte{0}, "unexpected EOF"},
		"end in a body":     {[]byte{0, 2, 1}, "unexpected EOF"},
		"empty":             {[]byte{0, 0}, "frame of 0 bytes"},
		"empty, deflated":   {[]byte{0x80, 0}, "frame of 0 bytes"},
		"long":              {[]byte{0x40, 1}, "frame of 16385 bytes"},
		"long, deflated":    {[]byte{0xc0, 0x41}, "frame of 16449 bytes"},
		"garbage":           {[]byte{0x80, 3, 0xff, 0xff, 0xff}, "corrupt"},
		"a bomb":            {frame(t, make([]byte, maxRaw+1)), "more than 16384 bytes"},
		"a larger bomb":     {frame(t, make([]byte, 10<<20)), "more than 16384 bytes"},
		"the stream's end":  {[]byte{0x80, 7, 1, 1, 0, 0xfe, 0xff, 'x', 'y'}, "ends before its body"},
		"before the window": {[]byte{0x80, 4, 0x4a, 0x04, 0x32, 0x00}, "corrupt"},
	} {
		r := reader{src: bytes.NewReader(append(bytes.Clone(full), x.in...))}
		got, err := io.ReadAll(readFunc(func(p []byte) (int, error) {
			n, err := r.read(p)
			if errors.Is(err, io.EOF) {
				err = errors.New("EOF")
			}
			return n, err
		}))
		if len(got) < maxRaw || bytes.Count(got, []byte{0}) != len(got) && name != "the stream's end" {
			t.Errorf("%s: %d bytes came before", name, len(got))
		}
		if err == nil || !bytes.Contains([]byte(err.Error()), []byte(x.want)) {
			t.Errorf("%s: %v, want %q", name, err, x.want)
		}
		if _, again := r.read(make([]byte, 1)); again == nil {
			t.Errorf("%s: the stream goes on", name)
		}
	}
}

// Whatever comes, the reader ends, within its memory.
func FuzzReader(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	var some []byte
	for i := range 20 {
		some = append(some, reading(r, i)...)
	}
	f.Add([]byte("\x00\x03abc"))
	f.Add(frame(f, some))
	f.Add(append(frame(f, some), frame(f, some)...))
	f.Add(frame(f, make([]byte, maxRaw)))
	f.Add([]byte{0x80, 7, 1, 1, 0, 0xfe, 0xff, 'x', 'y'})
	f.Fuzz(func(t *testing.T, in []byte) {
		r := reader{src: bytes.NewReader(in)}
		n, err := io.Copy(io.Discard, readFunc(r.read))
		if n > int64(maxRaw*(len(in)/3+1)) {
			t.Errorf("%d bytes out of %d", n, len(in))
		}
		if cap(r.hist) > window+maxRaw || cap(r.body) > maxBody+len(ending)+2048 {
			t.Errorf("the reader holds %d and %d bytes", cap(r.hist), cap(r.body))
		}
		if err == nil && len(r.head) != 0 {
			t.Error("a frame that was cut off passed")
		}
	})
}

// Whatever is written comes out, in whichever pieces: cuts holds their lengths.
func FuzzStream(f *testing.F) {
	f.Add([]byte("CONNECT and then something else"), []byte{7, 1, 200})
	f.Add(bytes.Repeat([]byte("fl/plant-7/reported/twin/default/press-7/p"), 3000), []byte{40, 255, 255, 3})
	f.Fuzz(func(t *testing.T, want, cuts []byte) {
		w := &wire{}
		c := New(w)
		for rest, i := want, 0; len(rest) > 0; i++ {
			n := len(rest)
			if i < len(cuts) {
				n = min(int(cuts[i])*int(cuts[i]), n)
			}
			write(t, c, rest[:n])
			rest = rest[n:]
		}
		_ = c.Close()
		r := reader{src: bytes.NewReader(bytes.Join(w.frames, nil))}
		if got, err := io.ReadAll(readFunc(r.read)); !bytes.Equal(got, want) || err != nil {
			t.Fatalf("%d bytes of %d, %v", len(got), len(want), err)
		}
	})
}

// BenchmarkReadings gives the cost of a change at 500 a second: CPU of both ends,
// and bytes, the acknowledgements and 22 bytes of TLS for every frame included.
func BenchmarkReadings(b *testing.B) {
	const group = 20 // changes in 40 ms
	r := rand.New(rand.NewPCG(1, 1))
	var up, down counted
	node, cloud := encoders.New().(*encoder), encoders.New().(*encoder)
	ack := reader{src: &down}
	in := reader{src: &up}
	var raw, acks []byte
	p := make([]byte, maxRaw)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		raw, acks = append(raw, reading(r, i)...), append(acks, 0x40, 2, byte(i>>8), byte(i))
		if i%group < group-1 {
			continue
		}
		for _, x := range []struct {
			e   *encoder
			c   *counted
			r   *reader
			raw []byte
		}{{node, &up, &in, raw}, {cloud, &down, &ack, acks}} {
			f, err := x.e.frame(x.raw)
			if err != nil {
				b.Fatal(err)
			}
			_, _ = x.c.Write(f)
			x.c.n += len(f) + 22
			if _, err := io.ReadFull(readFunc(x.r.read), p[:len(x.raw)]); err != nil || !bytes.Equal(p[:len(x.raw)], x.raw) {
				b.Fatal(err)
			}
		}
		raw, acks = raw[:0], acks[:0]
	}
	b.ReportMetric(float64(up.n)/float64(b.N), "up-B/op")
	b.ReportMetric(float64(down.n)/float64(b.N), "down-B/op")
}

type counted struct {
	bytes.Buffer
	n int
}

// BenchmarkIdle gives the memory of a connection that has had traffic both ways
// and rests, per end.
func BenchmarkIdle(b *testing.B) {
	const n = 100
	for b.Loop() {
		var before, after runtime.MemStats
		var conns []*Conn
		settle := func(m *runtime.MemStats) {
			for range 3 { // the pools take two rounds
				runtime.GC()
			}
			runtime.ReadMemStats(m)
		}
		settle(&before)
		r := rand.New(rand.NewPCG(1, 1))
		for range n {
			var in bytes.Buffer
			for range 64 {
				var some []byte
				for i := range 20 {
					some = append(some, reading(r, i)...)
				}
				in.Write(frame(b, some))
			}
			c := New(&loop{in: in.Bytes()})
			if _, err := io.Copy(io.Discard, c); err != nil {
				b.Fatal(err)
			}
			c.inner.(*loop).in = nil
			for i := range 500 {
				if _, err := c.Write(reading(r, i)); err != nil {
					b.Fatal(err)
				}
			}
			c.lock()
			c.flush()
			c.release()
			c.unlock()
			conns = append(conns, c)
		}
		settle(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/conn")
		for _, c := range conns {
			_ = c.Close()
		}
	}
}

// loop reads what it was given and writes nowhere.
type loop struct {
	net.Conn
	in []byte
}

func (l *loop) Read(p []byte) (int, error) {
	if len(l.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, l.in)
	l.in = l.in[n:]
	return n, nil
}
func (l *loop) Write(p []byte) (int, error)      { return len(p), nil }
func (l *loop) Close() error                     { return nil }
func (l *loop) SetWriteDeadline(time.Time) error { return nil }
