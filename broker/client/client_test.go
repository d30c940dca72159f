package client_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

func receive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("never: " + what)
		panic("unreachable")
	}
}

// gate is an interceptor that holds hold/#, refuses refuse/# and passes the rest.
type gate struct{ open chan struct{} }

func (g gate) Intercept(m *broker.Message) ([]broker.Message, error) {
	switch {
	case strings.HasPrefix(string(m.Topic), "hold/"):
		<-g.open
	case strings.HasPrefix(string(m.Topic), "refuse/"):
		return nil, &broker.Refusal{Code: 0x99, Kind: "test", Reason: "not that"}
	}
	return nil, nil
}

func serve(t *testing.T, change ...func(*broker.Options)) (*broker.Broker, string) {
	t.Helper()
	o := broker.Options{
		Dir: t.TempDir(), Node: "plant-7",
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username == "stranger" {
				return access.Identity{}, errors.New("who are you?")
			}
			return access.Identity{Role: access.Local}, nil
		},
	}
	for _, c := range change {
		c(&o)
	}
	b, err := broker.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	addr, err := b.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return b, addr
}

// running is a client that runs until the test ends or stop is called.
type running struct {
	*client.Client
	stop func()
	up   chan struct{}
	down chan error
	msgs chan client.Message
}

func run(t *testing.T, cfg client.Config) *running {
	t.Helper()
	r := &running{up: make(chan struct{}, 100), down: make(chan error, 100), msgs: make(chan client.Message, 10000)}
	cfg.OnUp = func(context.Context) { r.up <- struct{}{} }
	cfg.OnDown = func(err error) { r.down <- err }
	if cfg.OnMessage == nil {
		cfg.OnMessage = func(m client.Message) { r.msgs <- m }
	}
	if cfg.ClientID == "" {
		cfg.ClientID = t.Name()
	}
	if cfg.MinBackoff == 0 {
		cfg.MinBackoff = 10 * time.Millisecond
	}
	cfg.MaxBackoff = 50 * time.Millisecond
	cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	c, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			cancel()
			if err := receive(t, "Run returns", done); err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	t.Cleanup(r.stop)
	return r
}

func TestParseURL(t *testing.T) {
	for _, c := range []struct{ raw, want string }{
		{"127.0.0.1:1883", "mqtt://127.0.0.1:1883"},
		{"localhost:1", "mqtt://localhost:1"},
		{"mqtt://cloud", "mqtt://cloud:1883"},
		{"mqtts://cloud", "mqtts://cloud:8883"},
		{"ws://cloud/mqtt", "ws://cloud:80/mqtt"},
		{"wss://cloud/mqtt", "wss://cloud:443/mqtt"},
		{"mqtt://[::1]", "mqtt://[::1]:1883"},
		{"unix:///run/x", "unix:///run/x"},
	} {
		d, err := client.ParseURL(c.raw, nil)
		if err != nil || d.String() != c.want {
			t.Errorf("%q: %v, %v, want %s", c.raw, d, err, c.want)
		}
	}
	for _, c := range []struct{ raw, want string }{
		{"", "empty"},
		{"http://cloud", `scheme "http"`},
		{"mqtt://", "no host"},
		{"mqtt://:1883", "no host"},
		{"unix://", "unix:///absolute/path"},
		{"unix://relative/x", "unix:///absolute/path"},
		{"mqtt://cloud:port", "invalid port"},
		{"mqtt://user:secret@cloud", "leave the credentials out"},
	} {
		d, err := client.ParseURL(c.raw, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v, %v, want %q", c.raw, d, err, c.want)
		}
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  client.Config
		want string
	}{
		{client.Config{}, "empty"},
		{client.Config{URL: "mqtt://x", KeepAlive: time.Millisecond}, "keepalive"},
		{client.Config{URL: "mqtt://x", KeepAlive: 20 * time.Hour}, "keepalive"},
	} {
		if _, err := client.New(c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.cfg, err)
		}
	}
}

// What goes wrong before a connection is up is retried, and says why.
func TestCannotConnect(t *testing.T) {
	b, addr := serve(t)
	ws, err := b.Listen("ws://127.0.0.1:0/mqtt")
	if err != nil {
		t.Fatal(err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = free.Close()
	for _, c := range []struct {
		name string
		cfg  client.Config
		want string
	}{
		{"nobody listens", client.Config{URL: free.Addr().String()}, "connection refused"},
		{"no such socket", client.Config{URL: "unix://" + filepath.Join(t.TempDir(), "x")}, "no such file"},
		{"refused", client.Config{URL: addr, Username: "stranger"}, "who are you?"},
		{"wrong path", client.Config{URL: strings.Replace(ws, "/mqtt", "/other", 1)}, "404"},
		{"subscription refused", client.Config{URL: addr, Subscriptions: []client.Subscription{{Filter: "a", QoS: 1}, {Filter: "a/#/b", QoS: 1}}}, "subscribe a/#/b"},
		{"not MQTT", client.Config{Dial: func(context.Context) (net.Conn, error) {
			here, there := net.Pipe()
			go func() {
				_, _ = there.Read(make([]byte, 100))
				_, _ = there.Write([]byte("HTTP/1.1 400\r\n"))
				_ = there.Close()
			}()
			return here, nil
		}}, "connect"},
	} {
		t.Run(c.name, func(t *testing.T) {
			said := make(chan string, 1000)
			c.cfg.Logger = slog.New(slog.NewTextHandler(chanWriter(said), nil))
			c.cfg.MinBackoff, c.cfg.MaxBackoff = time.Millisecond, 2*time.Millisecond
			cl, err := client.New(c.cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- cl.Run(ctx) }()
			for range 2 { // it tries again
				for !strings.Contains(receive(t, c.want, said), c.want) {
				}
			}
			if cl.Connected() {
				t.Error("connected")
			}
			if err := cl.Publish(t.Context(), client.Message{Topic: "a", QoS: 1}); !errors.Is(err, client.ErrOffline) {
				t.Errorf("Publish: %v", err)
			}
			cancel()
			if err := receive(t, "Run returns", done); err != nil {
				t.Error(err)
			}
		})
	}
}

type chanWriter chan string

func (c chanWriter) Write(b []byte) (int, error) {
	select {
	case c <- string(b):
	default:
	}
	return len(b), nil
}

func TestPublishOutcomes(t *testing.T) {
	g := gate{make(chan struct{})}
	_, addr := serve(t, func(o *broker.Options) { o.Interceptors = []broker.Interceptor{g} })
	r := run(t, client.Config{URL: addr})
	receive(t, "up", r.up)
	for qos := byte(0); qos <= 2; qos++ {
		if err := r.Publish(t.Context(), client.Message{Topic: "a", Payload: []byte("x"), QoS: qos}); err != nil {
			t.Errorf("QoS %d: %v", qos, err)
		}
		err := r.Publish(t.Context(), client.Message{Topic: "refuse/x", QoS: qos})
		var refused *client.Refused
		if qos == 0 && err != nil || qos > 0 && (!errors.As(err, &refused) || refused.Code != 0x99 || refused.Reason != "not that") {
			t.Errorf("QoS %d: %v", qos, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := r.Publish(ctx, client.Message{Topic: "hold/x", QoS: 1}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("held: %v", err)
	}
	// Lost while it waits for its answer.
	ack, err := r.Send(t.Context(), client.Message{Topic: "hold/y", QoS: 1})
	if err != nil {
		t.Fatal(err)
	}
	r.Drop(errors.New("test"))
	if err := receive(t, "answer", ack); !errors.Is(err, client.ErrLost) {
		t.Errorf("lost: %v", err)
	}
	close(g.open)
	_ = receive(t, "down", r.down)
	receive(t, "up again", r.up)
	r.stop()
	if err := r.Publish(t.Context(), client.Message{Topic: "a", QoS: 1}); !errors.Is(err, client.ErrOffline) {
		t.Errorf("after the end: %v", err)
	}
}

// Answers go to their own messages, and messages leave in the order of Send.
func TestSendOrder(t *testing.T) {
	b, addr := serve(t, func(o *broker.Options) { o.Interceptors = []broker.Interceptor{gate{}} })
	got := make(chan string, 10000)
	stop, err := b.Watch(t.Context(), "#", func(m broker.Message) { got <- string(m.Topic) })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	r := run(t, client.Config{URL: addr})
	receive(t, "up", r.up)
	const n = 3000 // beyond the broker's receive maximum
	var acks []<-chan error
	for i := range n {
		tp := topic.Topic("ok/" + string(rune('a'+i%26)))
		if i%3 == 0 {
			tp = topic.Topic("refuse/" + string(rune('a'+i%26)))
		}
		ack, err := r.Send(t.Context(), client.Message{Topic: tp, QoS: byte(1 + i%2)})
		if err != nil {
			t.Fatal(err)
		}
		acks = append(acks, ack)
	}
	for i, ack := range acks {
		err := receive(t, "answer", ack)
		if (err != nil) != (i%3 == 0) {
			t.Fatalf("message %d: %v", i, err)
		}
		if err == nil {
			if tp := receive(t, "message", got); tp != "ok/"+string(rune('a'+i%26)) {
				t.Fatalf("message %d: %s", i, tp)
			}
		}
	}
}

// After an interruption the subscriptions come first, then OnUp.
func TestReconnect(t *testing.T) {
	dir := t.TempDir()
	at := filepath.Join(t.TempDir(), "s")
	var b *broker.Broker
	start := func() {
		t.Helper()
		var err error
		b, _ = serve(t, func(o *broker.Options) { o.Dir = dir })
		if _, err = b.Listen("unix://" + at); err != nil {
			t.Fatal(err)
		}
	}
	start()
	c := run(t, client.Config{URL: "unix://" + at, Subscriptions: []client.Subscription{{Filter: "a/#", QoS: 1, RetainAsPublished: true}}})
	for i := range 3 {
		receive(t, "up", c.up)
		if !c.Connected() {
			t.Error("not connected")
		}
		if err := c.Publish(t.Context(), client.Message{Topic: "a/b", Payload: []byte{byte(i)}, QoS: 1, Retain: true, ResponseTopic: "re", CorrelationData: []byte{9}}); err != nil {
			t.Fatal(err)
		}
		m := receive(t, "message", c.msgs)
		if i > 0 { // what was retained before
			if m.Payload[0] != byte(i-1) || !m.Retain {
				t.Errorf("got %+v", m)
			}
			m = receive(t, "message", c.msgs)
		}
		if m.Topic != "a/b" || m.Payload[0] != byte(i) || !m.Retain || m.QoS != 1 || m.ResponseTopic != "re" || m.CorrelationData[0] != 9 {
			t.Errorf("got %+v", m)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		err := receive(t, "down", c.down)
		var refused *client.Refused
		if !errors.As(err, &refused) || refused.Code != 0x8b { // server shutting down
			t.Errorf("down: %v", err)
		}
		eventually(t, "offline", func() bool { return !c.Connected() })
		start()
	}
}

// OnMessage may publish, and wait for the answer, also while the link breaks.
func TestPublishFromOnMessage(t *testing.T) {
	b, addr := serve(t)
	var self atomic.Pointer[running]
	var echoed atomic.Int32
	cfg := client.Config{
		URL: addr, Subscriptions: []client.Subscription{{Filter: "in/#", QoS: 1}},
		OnMessage: func(m client.Message) {
			if self.Load().Publish(context.Background(), client.Message{Topic: "out", Payload: m.Payload, QoS: 1}) == nil {
				echoed.Add(1)
			}
		},
	}
	cfg.ReceiveMaximum = 4
	hold := make(chan struct{})
	cfg.Dial = func(ctx context.Context) (net.Conn, error) { <-hold; return dialer(t, addr).Dial(ctx) }
	r := run(t, cfg)
	self.Store(r)
	close(hold)
	receive(t, "up", r.up)
	flood := func(n int) {
		for range n {
			if err := b.Publish(t.Context(), broker.Message{Topic: "in/x", Payload: []byte("x"), QoS: 1}); err != nil {
				t.Fatal(err)
			}
		}
	}
	flood(500)
	eventually(t, "500 echoes", func() bool { return echoed.Load() == 500 })
	for range 5 {
		flood(200)
		r.Drop(errors.New("test"))
		_ = receive(t, "down", r.down)
		receive(t, "up", r.up)
	}
}

func dialer(t *testing.T, addr string) *client.Dialer {
	d, err := client.ParseURL(addr, nil)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// proxy carries bytes until it is told to stop, without closing anything.
type proxy struct {
	net.Listener
	to    string
	stuck atomic.Bool
	wg    sync.WaitGroup
	ended chan struct{}
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{Listener: l, to: strings.TrimPrefix(to, "mqtt://"), ended: make(chan struct{})}
	p.wg.Add(1)
	go p.serve()
	t.Cleanup(func() { _ = l.Close(); close(p.ended); p.wg.Wait() })
	return p
}

func (p *proxy) serve() {
	defer p.wg.Done()
	for {
		in, err := p.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", p.to)
		if err != nil {
			_ = in.Close()
			continue
		}
		p.wg.Add(2)
		go p.carry(in, out)
		go p.carry(out, in)
	}
}

// carry reads on while the proxy is stuck, and keeps the end of one side from
// the other.
func (p *proxy) carry(from, to net.Conn) {
	defer p.wg.Done()
	defer func() { _ = to.Close(); _ = from.Close() }()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			if p.stuck.Load() {
				<-p.ended
			}
			return
		}
		if !p.stuck.Load() {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

// A link that carries nothing any more, without anybody closing it, is noticed.
func TestDeadLink(t *testing.T) {
	_, addr := serve(t)
	p := newProxy(t, addr)
	r := run(t, client.Config{URL: p.Addr().String(), KeepAlive: time.Second})
	receive(t, "up", r.up)
	p.stuck.Store(true)
	ack, err := r.Send(t.Context(), client.Message{Topic: "a", QoS: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := receive(t, "down", r.down); err == nil || !strings.Contains(err.Error(), "the link is dead") {
		t.Errorf("down: %v", err)
	}
	if err := receive(t, "answer", ack); !errors.Is(err, client.ErrLost) {
		t.Errorf("got %v", err)
	}
	p.stuck.Store(false)
	receive(t, "up again", r.up)
	if err := r.Publish(t.Context(), client.Message{Topic: "a", QoS: 1}); err != nil {
		t.Error(err)
	}
}

// Run ends at once though the link is dead and its buffers are full, and though
// others are publishing.
func TestStopOnFullLink(t *testing.T) {
	held := make(chan struct{})
	defer close(held)
	here := make(chan net.Conn, 10)
	_, addr := serve(t)
	r := run(t, client.Config{Dial: func(ctx context.Context) (net.Conn, error) {
		c, err := dialer(t, addr).Dial(ctx)
		if err != nil {
			return nil, err
		}
		s := &stoppable{Conn: c, closed: make(chan struct{})}
		here <- s
		return s, nil
	}})
	receive(t, "up", r.up)
	s := (<-here).(*stoppable)
	s.stop.Store(true)
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			err := r.Publish(context.Background(), client.Message{Topic: "a", Payload: make([]byte, 1000), QoS: byte(i % 3)})
			if err != nil && !errors.Is(err, client.ErrLost) && !errors.Is(err, client.ErrOffline) {
				t.Errorf("got %v", err)
			}
		}()
	}
	eventually(t, "a write is stuck", func() bool { return s.stuck.Load() })
	r.stop()
	wg.Wait()
}

// stoppable is a connection whose writes stop, until it is closed.
type stoppable struct {
	net.Conn
	stop, stuck atomic.Bool
	once        sync.Once
	closed      chan struct{}
}

func (s *stoppable) Write(p []byte) (int, error) {
	if s.stop.Load() {
		s.stuck.Store(true)
		<-s.closed
		return 0, net.ErrClosed
	}
	return s.Conn.Write(p)
}

func (s *stoppable) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}

// A client that goes on purpose leaves its Will behind as well.
func TestWill(t *testing.T) {
	b, addr := serve(t)
	r := run(t, client.Config{URL: addr, Will: func() *client.Message {
		return &client.Message{Topic: "gone", Payload: []byte("bye"), QoS: 1, Retain: true}
	}})
	receive(t, "up", r.up)
	r.stop()
	eventually(t, "will", func() bool { p, _ := b.Retained("gone"); return string(p) == "bye" })
	r = run(t, client.Config{URL: addr, ClientID: "other", Will: func() *client.Message { return nil }})
	receive(t, "up", r.up)
}
