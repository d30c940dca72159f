package link

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// quickly lets the link come back at once.
func quickly(c *Config) { c.minBackoff, c.maxBackoff = time.Millisecond, 20*time.Millisecond }

func setting(i int) topic.Topic {
	return topic.DesiredConfigMap(plant, "default", fmt.Sprintf("setting-%03d", i))
}

func gauge(i int) topic.Topic {
	return topic.ReportedTwin(plant, "default", "pump-1", fmt.Sprintf("gauge%03d", i))
}

// A proxy that cuts every connection after so many bytes holds the link up, but
// each connection gets further than the one before.
func TestCutAfterBytes(t *testing.T) {
	const topics = 100
	wants := map[topic.Topic]string{}
	for i := range topics {
		wants[setting(i)] = fmt.Sprintf(`{"data":{"n":"%d"}}`, i)
	}
	cloud, addr := cloudBroker(t, "127.0.0.1:0")
	b := startBridge(t, cloud, wants)
	w := newWire(t, addr)
	// Below that, on a machine that is very busy, a connection may be used up by
	// what it takes to begin.
	for n := int64(12_000); n <= 50_000; n += n {
		s := openSite(t, t.TempDir())
		for i := range topics {
			s.put(gauge(i), fmt.Sprintf(`{"v":%d,"t":%d}`, i, n))
		}
		w.mu.Lock()
		w.limit, w.conns = n, 0
		w.mu.Unlock()
		s.run(w.URL, quickly)
		agree(s, cloud, b)
		s.stop()
		w.mu.Lock()
		t.Logf("cut after %d bytes: %d connections", n, w.conns)
		if n < 20_000 && w.conns < 3 {
			t.Errorf("%d bytes were enough for nearly all: nothing was cut", n)
		}
		w.mu.Unlock()
	}
}

// A connection that is open and carries nothing, one way or both, is noticed
// from both ends, and what was sent into it arrives.
func TestHalfOpen(t *testing.T) {
	for _, tc := range []struct {
		name     string
		up, down bool
	}{{"both ways", true, true}, {"up", true, false}, {"down", false, true}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			cloud, addr := cloudBroker(t, "127.0.0.1:0")
			b := startBridge(t, cloud, wanted())
			w := newWire(t, addr)
			s := openSite(t, t.TempDir())
			s.reportAll()
			s.run(w.URL, quickly, func(c *Config) { c.KeepAlive = time.Second })
			agree(s, cloud, b)
			shows(t, cloud, true)
			to := w.to
			release := w.hold(tc.up, tc.down)
			t.Cleanup(release)
			w.mu.Lock()
			w.to = "" // no new connection tells the broker that the old one is dead
			w.mu.Unlock()
			s.put(pressure, `{"v":7,"t":7}`)
			b.want(speed, wish(70, 70))
			b.want(pod, "")
			shows(t, s.bus, false)
			shows(t, cloud, false)
			if !tc.up { // else the broker may hang up first
				eventually(t, "the log says that the link is dead", func() bool { return s.log.has("the link is dead") })
			}
			s.put(gauge(1), `{"v":8,"t":8}`)
			release()
			w.lead(to)
			agree(s, cloud, b)
			if p, _ := cloud.Retained(pressure); string(p) != `{"v":7,"t":7}` {
				t.Errorf("the cloud has %s", p)
			}
		})
	}
}

// copied gives a copy of a closed store's folder.
func copied(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.CopyFS(filepath.Join(to, "copy"), os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return filepath.Join(to, "copy")
}

// The cloud broker comes back from an old copy, and what writes to it counts
// anew under a clock that was set back: all revs are smaller than the node's.
func TestCloudRestored(t *testing.T) {
	dir := t.TempDir()
	cloud, addr := cloudBrokerAt(t, dir, "127.0.0.1:0")
	w := newWire(t, addr)
	b := startBridge(t, cloud, wanted())
	s := openSite(t, t.TempDir())
	s.reportAll()
	s.run(w.URL, quickly)
	agree(s, cloud, b)
	stopCloud := func() {
		w.lead("")
		b.stop()
		if err := cloud.Close(); err != nil {
			t.Fatal(err)
		}
	}
	stopCloud()
	old := copied(t, dir)

	cloud, addr = cloudBrokerAt(t, dir, "127.0.0.1:0")
	w.lead(addr)
	now := wanted()
	now[speed], now[pump] = wish(60, 6000), `{"uid":"`+uid+`","rev":6000}`
	now[setting(1)] = `{"data":{}}`
	b = startBridge(t, cloud, now)
	s.put(pressure, `{"v":9,"t":9}`)
	agree(s, cloud, b)
	stopCloud()

	// The bridge is not there at first: an old digest must not cost the node
	// what is newer.
	cloud, addr = cloudBrokerAt(t, old, "127.0.0.1:0")
	w.lead(addr)
	shows(t, cloud, true)
	now[speed], now[pump] = wish(50, 50), `{"uid":"`+uid+`","rev":50}`
	var dropped []topic.Topic
	stop, err := s.bus.Watch(t.Context(), topic.Desired.All(plant), func(m broker.Message) {
		if len(m.Payload) == 0 {
			dropped = append(dropped, m.Topic)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	b = startBridge(t, cloud, now)
	agree(s, cloud, b)
	stop()
	if len(dropped) > 0 {
		t.Errorf("dropped for a while: %v", dropped)
	}
	for i := range 3 { // and it goes on from there, without a repair for each
		b.want(speed, wish(51+i, 51+i))
		agree(s, cloud, b)
	}
}

// A node comes back from an old image of its disk.
func TestNodeRestored(t *testing.T) {
	cloud, addr := cloudBroker(t, "127.0.0.1:0")
	b := startBridge(t, cloud, wanted())
	dir := t.TempDir()
	s := openSite(t, dir)
	s.reportAll()
	s.put(gauge(1), `{"v":1,"t":1}`)
	s.run(addr, quickly)
	agree(s, cloud, b)
	closeSite := func() {
		s.stop()
		if err := s.bus.Close(); err != nil {
			t.Fatal(err)
		}
	}
	closeSite()
	old := copied(t, dir)

	s = openSite(t, dir)
	s.run(addr, quickly)
	s.put(gauge(1), "")
	s.put(gauge(2), `{"v":2,"t":2}`)
	s.put(running, `{"v":60,"rev":6000}`)
	b.want(speed, wish(60, 60))
	b.want(settings, "")
	agree(s, cloud, b)
	closeSite()

	s = openSite(t, old)
	s.run(addr, quickly)
	agree(s, cloud, b)
	if _, ok := cloud.Retained(gauge(2)); ok {
		t.Error("the cloud has a topic that the node does not")
	}
}

// Two agents with one name, as after a disk was cloned: the one that has been
// running longer has the link, the other one knows who that is and waits.
func TestClone(t *testing.T) {
	cloud, b, w, first := together(t)
	named := func(name string) func(*Config) { return func(c *Config) { c.Host = name } }
	first.stop()
	first.run(w.URL, quickly, named("plant 10.0.0.1"))
	agree(first, cloud, b)
	clone := openSite(t, t.TempDir())
	clone.reportAll()
	clone.put(gauge(5), `{"v":5,"t":5}`) // it has a life of its own
	clone.run(w.URL, quickly, named("lab 10.9.9.9"))
	waits := func(s *site, host string) {
		t.Helper()
		eventually(t, "one is on standby", func() bool {
			return s.metric("fairlead_link_standby") == 1 && s.log.has("on standby until it is gone", host)
		})
	}
	waits(clone, "plant 10.0.0.1")
	agree(first, cloud, b)
	if !first.log.has("another agent took the node's link over", "lab 10.9.9.9") {
		t.Error("the first one does not say who took its link over")
	}
	if l := shows(t, cloud, true); l.Host != "plant 10.0.0.1" || l.Epoch != first.link.epoch {
		t.Errorf("the cloud shows %+v", l)
	}
	shows(t, clone.bus, false)
	// It stays so: no connection is made while the first one's carries on.
	w.mu.Lock()
	conns := w.conns
	w.mu.Unlock()
	for i := range 5 {
		b.want(speed, wish(100+i, 100+i))
		agree(first, cloud, b)
	}
	w.mu.Lock()
	if w.conns != conns {
		t.Errorf("%d connections were made", w.conns-conns)
	}
	w.mu.Unlock()
	if a, b := first.metric("fairlead_link_takeovers_total"), clone.metric("fairlead_link_takeovers_total"); a != 1 || b != 1 {
		t.Errorf("taken over %g and %g times", a, b)
	}

	// The first one goes, and the clone takes its place, with its own state.
	first.stop()
	agree(clone, cloud, b)
	if l := shows(t, cloud, true); l.Host != "lab 10.9.9.9" {
		t.Errorf("the cloud shows %+v", l)
	}
	// It comes back as the younger one.
	first.run(w.URL, quickly, named("plant 10.0.0.1"))
	waits(first, "lab 10.9.9.9")
	agree(clone, cloud, b)
	clone.stop()
	agree(first, cloud, b)
}

// What comes together is stored together, in an order that the twin engine
// understands; what is no good keeps nothing else out.
func TestStoredTogether(t *testing.T) {
	reg := prometheus.NewRegistry()
	g := &guard{}
	s := openSite(t, t.TempDir(), func(o *broker.Options) { o.Metrics, o.Interceptors = reg, []broker.Interceptor{g} })
	l, err := New(Config{Node: plant, URL: "mqtt://127.0.0.1:1", Token: secret, Logger: s.log.logger(t)}, s.bus)
	if err != nil {
		t.Fatal(err)
	}
	message := func(x topic.Topic, p string) client.Message {
		return client.Message{Topic: x, Payload: []byte(p), QoS: 1, Retain: true}
	}
	s.reg = reg
	syncs := func() float64 { return s.samples("fairlead_broker_store_sync_seconds") }

	ms := []client.Message{message(speed, wish(1, 1)), message(pump, `{"uid":"a","rev":1}`)}
	for i := range 298 {
		ms = append(ms, message(setting(i), "1"))
	}
	ms = append(ms, message(setting(0), "2"), message(speed, wish(3, 3)), message(speed, wish(2, 2)))
	before := syncs()
	l.messages(ms)
	if n := syncs() - before; n != 2 {
		t.Errorf("300 topics took %g syncs", n)
	}
	if len(g.seen) != 300 || g.seen[0] != pump || g.seen[299] != speed {
		t.Errorf("%d were stored, first %s and last %s", len(g.seen), g.seen[0], g.seen[len(g.seen)-1])
	}
	for x, want := range map[topic.Topic]string{speed: wish(3, 3), setting(0): "2", setting(297): "1"} {
		if p, _ := s.bus.Retained(x); string(p) != want {
			t.Errorf("%s is %s", x, p)
		}
		if !l.in.Has(x) {
			t.Errorf("%s is not known to the repair", x)
		}
	}

	before = syncs()
	l.absent([]topic.Topic{setting(0), setting(1), setting(2)})
	if n := syncs() - before; n != 1 || l.in.Has(setting(1)) {
		t.Errorf("3 deletions took %g syncs", n)
	}

	l.messages([]client.Message{message(setting(3), "3"), message(pump, "bad"), message(setting(4), "3")})
	if p, _ := s.bus.Retained(setting(4)); string(p) != "3" {
		t.Errorf("behind a refused one it is %s", p)
	}
	if p, _ := s.bus.Retained(pump); string(p) == "bad" || !s.log.has("desired state not stored", string(pump)) {
		t.Errorf("the refused one is %s", p)
	}
	// What is about the set comes after what came before it.
	d := payload.Digest{Epoch: "x", Count: 1}
	l.messages([]client.Message{message(setting(3), "4"), message(topic.DesiredDigest(plant), string(payload.Encode(d))), message(setting(3), "5")})
	if p, _ := s.bus.Retained(setting(3)); string(p) != "5" {
		t.Errorf("it is %s", p)
	}
}

// guard notes what is stored, and refuses what is bad.
type guard struct{ seen []topic.Topic }

func (g *guard) Intercept(m *broker.Message) ([]broker.Message, error) {
	if string(m.Payload) == "bad" {
		return nil, &broker.Refusal{Code: broker.CodePayloadFormat, Kind: "payload", Reason: "test"}
	}
	if strings.HasPrefix(string(m.Topic), "fl/") {
		g.seen = append(g.seen, m.Topic)
	}
	return nil, nil
}

// BenchmarkDesired is the way down: topics that changed in the cloud during an
// outage, stored and synced on the node; one operation is one topic.
func BenchmarkDesired(b *testing.B) {
	cloud, addr := cloudBrokerAt(b, b.TempDir(), "127.0.0.1:0")
	br := startBridge(b, cloud, nil)
	o := broker.Options{Dir: b.TempDir(), Node: plant, Authenticate: func(broker.ConnectInfo) (access.Identity, error) {
		return access.Identity{}, errors.New("nobody")
	}}
	bus, err := broker.Open(o)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = bus.Close() })
	for left := b.N; left > 0; left -= 10_000 {
		b.StopTimer()
		l, err := New(Config{Node: plant, URL: addr, Token: secret}, bus)
		if err != nil {
			b.Fatal(err)
		}
		for i := range min(left, 10_000) {
			br.want(topic.DesiredTwin(plant, "default", fmt.Sprintf("pump-%d", i/100), fmt.Sprintf("p%d", i%100)), wish(left, left))
		}
		for br.out.Pending() > 0 {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Second) // the digest is out
		ctx, cancel := context.WithCancel(b.Context())
		done := make(chan error, 1)
		b.StartTimer()
		go func() { done <- l.Run(ctx) }()
		for !l.InSync() {
			time.Sleep(time.Millisecond)
		}
		b.StopTimer()
		cancel()
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "topics/s")
}
