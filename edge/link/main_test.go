package link

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come; a repair is tried again
// after seconds.
const patience = time.Minute

const (
	plant  = "plant-7"
	secret = "a-token-for-plant-7"
	uid    = "5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11"
)

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) has(words ...string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range strings.Split(l.b.String(), "\n") {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			return true
		}
	}
	return false
}

func (l *lines) logger(t *testing.T) *slog.Logger {
	t.Cleanup(func() {
		if t.Failed() {
			l.mu.Lock()
			defer l.mu.Unlock()
			t.Log(l.b.String())
		}
	})
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// cloudBroker starts the broker that stands in the cloud.
func cloudBroker(t *testing.T, listen string) (b *broker.Broker, addr string) {
	t.Helper()
	return cloudBrokerAt(t, t.TempDir(), listen)
}

func cloudBrokerAt(t testing.TB, dir, listen string) (b *broker.Broker, addr string) {
	t.Helper()
	b, err := broker.Open(broker.Options{
		Dir: dir, Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			switch {
			case ci.Listener == broker.InProcess:
				return access.Identity{Role: access.Cloud}, nil
			case ci.Username == plant && string(ci.Password) == secret:
				return access.Identity{Role: access.Node, Name: plant}, nil
			}
			return access.Identity{}, errors.New("unknown node or wrong token")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	addr, err = b.Listen(listen)
	if err != nil {
		t.Fatal(err)
	}
	return b, addr
}

// bridge stands in for cloudbridge: what it wants is a map in place of Kubernetes.
type bridge struct {
	t    testing.TB
	out  *repair.Outbox
	in   *repair.Inbox
	c    *client.Client
	stop func()

	mu       sync.Mutex
	wants    map[topic.Topic]string
	reported map[topic.Topic]string
	wg       sync.WaitGroup
}

func startBridge(t testing.TB, cloud *broker.Broker, wants map[topic.Topic]string) *bridge {
	t.Helper()
	b := &bridge{t: t, wants: maps.Clone(wants), reported: map[topic.Topic]string{}}
	if b.wants == nil {
		b.wants = map[topic.Topic]string{}
	}
	b.out = repair.NewOutbox(repair.OutboxConfig{Direction: topic.Desired, Epoch: repair.NewEpoch(), Get: func(x topic.Topic) ([]byte, bool) {
		b.mu.Lock()
		defer b.mu.Unlock()
		p, ok := b.wants[x]
		return []byte(p), ok
	}})
	b.out.AddNode(plant)
	for x := range b.wants {
		b.out.Touch(x)
	}
	b.in = repair.NewInbox(repair.InboxConfig{Direction: topic.Reported})
	var err error
	b.c, err = client.New(client.Config{
		Dial:     func(context.Context) (net.Conn, error) { return cloud.Pipe() },
		ClientID: "bridge",
		Subscriptions: []client.Subscription{
			{Filter: topic.Reported.AllNodes(), QoS: 1, RetainAsPublished: true},
			{Filter: topic.OfKind("+", topic.KindSyncDesiredRequest), QoS: 1},
			{Filter: topic.OfKind("+", topic.KindSyncReportedManifest), QoS: 1},
		},
		OnMessage: b.message,
		OnUp: func(ctx context.Context) {
			b.wg.Go(func() { _ = b.out.Run(ctx, b.c) })
			b.wg.Go(func() { _ = b.in.Run(ctx, b.c) })
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = b.c.Run(ctx) }()
	b.stop = sync.OnceFunc(func() { cancel(); <-done; b.wg.Wait() })
	t.Cleanup(b.stop)
	return b
}

func (b *bridge) message(m client.Message) {
	p, err := topic.Parse(string(m.Topic))
	if err != nil {
		b.t.Errorf("foreign topic %s", m.Topic)
		return
	}
	switch p.Kind {
	case topic.KindSyncDesiredRequest:
		var r payload.SyncRequest
		if err := payload.Decode(m.Payload, &r); err != nil {
			b.t.Error(err)
		}
		b.out.Request(p.Node, r, m.ResponseTopic, m.CorrelationData)
	case topic.KindSyncReportedManifest:
		var s payload.SyncManifest
		if err := payload.Decode(m.Payload, &s); err != nil {
			b.t.Error(err)
		}
		b.in.Manifest(p.Node, s, m.CorrelationData)
	case topic.KindReportedDigest:
		var d payload.Digest
		if err := payload.Decode(m.Payload, &d); err != nil {
			b.t.Error(err)
		}
		b.in.Digest(p.Node, d)
	case topic.KindReportedLink:
		var l payload.Link
		if payload.Decode(m.Payload, &l) == nil && l.Online {
			b.in.Restart(p.Node)
		}
	default:
		b.mu.Lock()
		if len(m.Payload) == 0 {
			delete(b.reported, m.Topic)
		} else {
			b.reported[m.Topic] = string(m.Payload)
		}
		b.mu.Unlock()
		b.in.Put(m.Topic, m.Payload)
	}
}

// want changes what the cloud wants; an empty payload is its end.
func (b *bridge) want(x topic.Topic, p string) {
	b.mu.Lock()
	if p == "" {
		delete(b.wants, x)
	} else {
		b.wants[x] = p
	}
	b.mu.Unlock()
	b.out.Touch(x)
}

// wire is the network between node and cloud.
type wire struct {
	l    net.Listener
	URL  string
	wg   sync.WaitGroup
	mu   sync.Mutex
	to   string // host:port; empty while the cloud cannot be reached
	open map[net.Conn]struct{}
	// limit is after how many bytes, of both ways, a connection is cut; 0 is never.
	limit int64
	conns int
	// deaf and mute hold what goes up and what comes down, and keep the connections.
	deaf, mute chan struct{} // closed by release; nil lets through
}

func newWire(t testing.TB, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{l: l, open: map[net.Conn]struct{}{}}
	scheme, rest, _ := strings.Cut(to, "://")
	host, path, _ := strings.Cut(rest, "/")
	w.URL, w.to = scheme+"://"+l.Addr().String()+"/"+path, host
	w.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			w.wg.Go(func() { w.carry(c) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); w.cut(); w.wg.Wait() })
	return w
}

func (w *wire) carry(near net.Conn) {
	defer func() { _ = near.Close() }()
	w.mu.Lock()
	to := w.to
	w.open[near] = struct{}{}
	w.conns++
	left := &atomic.Int64{}
	if left.Store(w.limit); w.limit == 0 {
		left.Store(math.MaxInt64)
	}
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		delete(w.open, near)
		w.mu.Unlock()
	}()
	if to == "" {
		return
	}
	far, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	defer func() { _ = far.Close() }()
	w.wg.Go(func() {
		w.copy(far, near, left, func() chan struct{} { return w.deaf })
		_ = far.Close()
		_ = near.Close()
	})
	w.copy(near, far, left, func() chan struct{} { return w.mute })
}

// copy carries one way of a connection. It ends with it, or at the limit, where
// what the other side is still to say is lost as well.
func (w *wire) copy(to, from net.Conn, left *atomic.Int64, held func() chan struct{}) {
	buf := make([]byte, 512)
	for {
		n, err := from.Read(buf)
		w.mu.Lock()
		wait := held()
		w.mu.Unlock()
		if wait != nil {
			<-wait
			return // what was held is lost
		}
		if rest := left.Add(-int64(n)); rest < 0 {
			_, _ = to.Write(buf[:max(0, int64(n)+rest)])
			return
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// hold keeps the connections that there are and lets nothing through, one way or
// both, until release. New connections go on.
func (w *wire) hold(up, down bool) (release func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	stop := make(chan struct{})
	if up {
		w.deaf = stop
	}
	if down {
		w.mute = stop
	}
	release = sync.OnceFunc(func() {
		w.mu.Lock()
		w.deaf, w.mute = nil, nil
		w.mu.Unlock()
		close(stop)
	})
	return release
}

// cut ends every connection; the wire lets new ones through to where it leads.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.open {
		_ = c.Close()
	}
}

// lead changes where the wire leads; nowhere for an empty address.
func (w *wire) lead(to string) {
	_, host, ok := strings.Cut(to, "://")
	if !ok {
		host = to
	}
	host, _, _ = strings.Cut(host, "/")
	w.mu.Lock()
	w.to = host
	w.mu.Unlock()
	w.cut()
}

// site is a node: its bus and its link.
type site struct {
	t    *testing.T
	bus  *broker.Broker
	link *Link
	reg  *prometheus.Registry
	log  lines
	stop func() // the link
}

func openSite(t *testing.T, dir string, change ...func(*broker.Options)) *site {
	t.Helper()
	s := &site{t: t, stop: func() {}}
	o := broker.Options{
		Dir: filepath.Join(dir, "store"), Node: plant, Logger: s.log.logger(t),
		Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, errors.New("nobody") },
	}
	for _, c := range change {
		c(&o)
	}
	var err error
	if s.bus, err = broker.Open(o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.bus.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// run starts the link; it runs until stop.
func (s *site) run(url string, change ...func(*Config)) {
	s.t.Helper()
	s.reg = prometheus.NewRegistry()
	cfg := Config{Node: plant, URL: url, Token: secret, Agent: "v0.1.0", Metrics: s.reg, Logger: s.log.logger(s.t)}
	for _, c := range change {
		c(&cfg)
	}
	l, err := New(cfg, s.bus)
	if err != nil {
		s.t.Fatal(err)
	}
	s.link = l
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- l.Run(ctx) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("the link ended with %v", err)
		}
	})
	s.t.Cleanup(s.stop)
}

func (s *site) put(x topic.Topic, p string) {
	s.t.Helper()
	if err := s.bus.Publish(s.t.Context(), broker.Message{Topic: x, Payload: []byte(p), QoS: 1, Retain: true}); err != nil {
		s.t.Fatal(err)
	}
}

// samples is the count of a histogram.
func (s *site) samples(name string) (n float64) {
	s.t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return float64(f.GetMetric()[0].GetHistogram().GetSampleCount())
		}
	}
	s.t.Fatalf("no metric %s", name)
	return 0
}

func (s *site) metric(name string) float64 {
	s.t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			m := f.GetMetric()[0]
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	s.t.Fatalf("no metric %s", name)
	return 0
}

// set lists a direction's topics and payloads, as a digest covers them.
func set(b *broker.Broker, d topic.Direction) string {
	var out strings.Builder
	for _, m := range b.RetainedMatch(d.All(plant)) {
		p, err := topic.Parse(string(m.Topic))
		if err != nil {
			continue
		}
		if is, ok := p.Direction(); ok && is == d {
			fmt.Fprintf(&out, "%s %s\n", m.Topic, m.Payload)
		}
	}
	return out.String()
}

func list(m map[topic.Topic]string) string {
	var out strings.Builder
	for _, x := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&out, "%s %s\n", x, m[x])
	}
	return out.String()
}

// agree waits until node, cloud broker and bridge hold the same, topic for topic.
func agree(s *site, cloud *broker.Broker, b *bridge) {
	s.t.Helper()
	diff := ""
	defer func() {
		if s.t.Failed() {
			s.t.Log(diff)
		}
	}()
	eventually(s.t, "both sides agree", func() bool {
		b.mu.Lock()
		wants := list(b.wants)
		b.mu.Unlock()
		desired, inCloud := set(s.bus, topic.Desired), set(cloud, topic.Desired)
		reported, mirrored := set(s.bus, topic.Reported), set(cloud, topic.Reported)
		diff = fmt.Sprintf("wanted:\n%sin the cloud:\n%son the node:\n%s\nreported:\n%sin the cloud:\n%s", wants, inCloud, desired, reported, mirrored)
		return wants == desired && desired == inCloud && reported == mirrored &&
			s.link.InSync() && b.in.InSync(plant) && s.link.out.Pending() == 0
	})
}

func linkState(b *broker.Broker) (l payload.Link, ok bool) {
	p, ok := b.Retained(topic.ReportedLink(plant))
	if !ok {
		return l, false
	}
	return l, payload.Decode(p, &l) == nil
}

// shows waits until the broker shows the link up or down.
func shows(t *testing.T, b *broker.Broker, online bool) (l payload.Link) {
	t.Helper()
	eventually(t, fmt.Sprintf("online is %v", online), func() bool {
		var ok bool
		l, ok = linkState(b)
		return ok && l.Online == online
	})
	return l
}
