package link

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

var (
	pod      = topic.DesiredPod(plant, "default", "web")
	settings = topic.DesiredConfigMap(plant, "default", "web")
	pump     = topic.DesiredDevice(plant, "default", "pump-1")
	speed    = topic.DesiredTwin(plant, "default", "pump-1", "speed")

	about    = topic.ReportedNode(plant)
	pressure = topic.ReportedTwin(plant, "default", "pump-1", "pressure")
	running  = topic.ReportedTarget(plant, "default", "pump-1", "speed")
)

func wish(v, rev int) string { return fmt.Sprintf(`{"v":%d,"rev":%d,"uid":%q}`, v, rev, uid) }

func wanted() map[topic.Topic]string {
	return map[topic.Topic]string{
		pod: `{"kind":"Pod"}`, settings: `{"data":{"a":"1"}}`, pump: `{"uid":"` + uid + `","rev":1}`, speed: wish(40, 1),
	}
}

func (s *site) reportAll() {
	s.put(about, `{"agent":"v0.1.0"}`)
	s.put(pressure, `{"v":3.5,"t":1}`)
	s.put(running, `{"v":40,"rev":1}`)
}

// together starts a cloud and a node and waits until they agree.
func together(t *testing.T) (*broker.Broker, *bridge, *wire, *site) {
	t.Helper()
	cloud, addr := cloudBroker(t, "127.0.0.1:0")
	b := startBridge(t, cloud, wanted())
	w := newWire(t, addr)
	s := openSite(t, t.TempDir())
	s.reportAll()
	s.run(w.URL)
	agree(s, cloud, b)
	shows(t, s.bus, true)
	return cloud, b, w, s
}

func TestFirstSync(t *testing.T) {
	for _, listen := range []string{"127.0.0.1:0", "ws://127.0.0.1:0/mqtt"} {
		t.Run(listen, func(t *testing.T) {
			cloud, addr := cloudBroker(t, listen)
			b := startBridge(t, cloud, wanted())
			s := openSite(t, t.TempDir())
			s.reportAll()
			// What is the node's own, or the users', stays at home.
			s.put("site/name", "north")
			mine := broker.Message{Topic: topic.Set(plant, "default", "pump-1", "speed"), Payload: []byte("1"), QoS: 1}
			s.run(addr)
			if err := s.bus.Publish(t.Context(), mine); err != nil {
				t.Fatal(err)
			}
			agree(s, cloud, b)
			up, home := shows(t, cloud, true), shows(t, s.bus, true)
			if up != home || up.Agent != "v0.1.0" || up.Since == 0 {
				t.Errorf("the link is %+v in the cloud and %+v at home", up, home)
			}
			for _, m := range cloud.RetainedMatch("#") {
				if !topic.Filter("fl/plant-7/#").Match(m.Topic) && !strings.HasPrefix(string(m.Topic), "$") {
					t.Errorf("%s came to the cloud", m.Topic)
				}
			}
			if got := s.metric("fairlead_link_up"); got != 1 {
				t.Errorf("fairlead_link_up is %g", got)
			}
			if got := s.metric("fairlead_link_outbox_topics"); got != 0 {
				t.Errorf("fairlead_link_outbox_topics is %g", got)
			}
			if got := s.metric("fairlead_link_repairs_total"); got < 1 {
				t.Errorf("fairlead_link_repairs_total is %g", got)
			}

			// From here on changes go through as they come.
			b.want(speed, wish(41, 2))
			b.want(settings, "")
			s.put(pressure, `{"v":3.6,"t":2}`)
			s.put(running, "")
			agree(s, cloud, b)
		})
	}
}

// count notes what is published to a broker below the node's topics.
func count(t *testing.T, cloud *broker.Broker) (seen func() []string) {
	t.Helper()
	var mu sync.Mutex
	var all []string
	ready := false
	stop, err := cloud.Watch(t.Context(), topic.NodeAll(plant), func(m broker.Message) {
		mu.Lock()
		defer mu.Unlock()
		if ready {
			all = append(all, strings.TrimPrefix(string(m.Topic), "fl/"+plant+"/")+" "+string(m.Payload))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	mu.Lock()
	ready = true
	mu.Unlock()
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return append([]string(nil), all...)
	}
}

// A node that comes back in sync says that it is there, and its digest.
func TestReconnectInSync(t *testing.T) {
	cloud, b, w, s := together(t)
	seen := count(t, cloud)
	wantFence(t, cloud, b, s, seen) // what the first repair still says has been said
	repairs := s.metric("fairlead_link_repairs_total")
	for _, x := range []struct {
		what string
		do   func()
		cost []string
	}{
		{"a reconnect", w.cut, []string{"reported/digest", "reported/link false", "reported/link true"}},
		{"a restart", func() { s.stop(); s.run(w.URL) }, []string{"reported/digest", "reported/link false", "reported/link true"}},
	} {
		digests := func() int {
			return len(slices.DeleteFunc(seen(), func(m string) bool { return !strings.HasPrefix(m, "reported/digest ") }))
		}
		had, begin := digests(), len(seen())
		x.do()
		eventually(t, "the node is back", func() bool { return digests() > had && s.link.InSync() && b.in.InSync(plant) })
		end := len(wantFence(t, cloud, b, s, seen))
		var cost []string
		for _, m := range seen()[begin:end] {
			kind, p, _ := strings.Cut(m, " ")
			if kind == "reported/link" {
				kind += fmt.Sprint(" ", strings.Contains(p, "true"))
			}
			cost = append(cost, kind)
		}
		slices.Sort(cost)
		cost = slices.Compact(cost) // the Will may reach the new connection, which then says again that it is there
		if !slices.Equal(cost, x.cost) || len(seen()[begin:end]) > len(x.cost)+1 {
			t.Errorf("%s cost\n%s", x.what, strings.Join(seen()[begin:end], "\n"))
		}
		if got := s.metric("fairlead_link_repairs_total"); got > repairs {
			t.Errorf("%s was repaired", x.what)
		}
	}
}

var fence int

// wantFence sends one change each way and gives what was seen before them.
func wantFence(t *testing.T, cloud *broker.Broker, b *bridge, s *site, seen func() []string) []string {
	t.Helper()
	shows(t, cloud, true)
	fence++
	p := fmt.Sprintf(`{"fence":%d}`, fence)
	s.put(topic.ReportedPod(plant, "default", "fence"), p)
	b.want(topic.DesiredPod(plant, "default", "fence"), p)
	agree(s, cloud, b)
	var before []string
	for _, m := range seen() {
		if strings.Contains(m, p) {
			return before
		}
		before = append(before, m)
	}
	t.Fatal("the change was not seen")
	return nil
}

// Whatever changes on either side while there is no link shows when it is back.
func TestWhileAway(t *testing.T) {
	cloud, b, w, s := together(t)
	to := w.to
	w.lead("")
	shows(t, cloud, false)
	shows(t, s.bus, false)
	if s.metric("fairlead_link_up") != 0 {
		t.Error("fairlead_link_up is not 0")
	}

	b.want(settings, "")       // deleted
	b.want(speed, wish(45, 9)) // changed
	b.want(topic.DesiredPod(plant, "default", "new"), `{"kind":"Pod"}`)
	fresh := topic.ReportedTwin(plant, "default", "pump-1", "mode")
	for i := range 500 { // a long outage costs the last value
		s.put(pressure, fmt.Sprintf(`{"v":%d,"t":%d}`, i, i))
	}
	s.put(fresh, `{"v":1,"t":3}`)
	s.put(running, "")
	eventually(t, "3 topics wait", func() bool { return s.metric("fairlead_link_outbox_topics") == 3 })
	seen := count(t, cloud)
	w.lead(to)
	agree(s, cloud, b)
	n := 0
	for _, m := range seen() {
		if strings.HasPrefix(m, "reported/twin/default/pump-1/pressure ") {
			n++
		}
	}
	if n != 1 {
		t.Errorf("want the pressure once, got it %d times", n)
	}
	if _, ok := s.bus.Retained(settings); ok {
		t.Error("what was deleted in the cloud is still on the node")
	}
}

// The node is off while both sides change: its own store and the digests do it.
func TestOffWhileBothChange(t *testing.T) {
	cloud, b, w, s := together(t)
	s.stop()
	shows(t, cloud, false)
	b.want(settings, "")
	b.want(speed, wish(45, 9))
	s.put(running, "")
	s.put(pressure, `{"v":9,"t":9}`)
	s.run(w.URL)
	agree(s, cloud, b)
}

// What is dropped while the link starts, after it looked what there is and before
// it watches, is dropped in the cloud too.
func TestDroppedAtStart(t *testing.T) {
	cloud, b, w, s := together(t)
	s.stop()
	busy, free := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(free) })
	t.Cleanup(release)
	dropped := make(chan error, 1)
	go func() {
		dropped <- s.bus.Do(context.Background(), func() []broker.Message {
			close(busy)
			<-free // the link can look, but not watch
			return []broker.Message{retained(pressure, nil)}
		})
	}()
	<-busy
	s.run(w.URL)
	eventually(t, "the link has looked", func() bool { return slices.Contains(s.link.out.Assumed(plant), pressure) })
	release()
	if err := <-dropped; err != nil {
		t.Fatal(err)
	}
	agree(s, cloud, b)
	if _, ok := cloud.Retained(pressure); ok {
		t.Error("the cloud has a topic that the node does not")
	}
}

// A cloud that lost its memory costs the node nothing, and gets everything back.
func TestCloudWiped(t *testing.T) {
	cloud, b, w, s := together(t)
	wants := set(s.bus, topic.Desired)
	w.lead("")
	b.stop()
	if err := cloud.Close(); err != nil {
		t.Fatal(err)
	}
	cloud, addr := cloudBroker(t, "127.0.0.1:0")
	w.lead(addr)
	shows(t, cloud, true)
	eventually(t, "the digest is there", func() bool { _, ok := cloud.Retained(topic.ReportedDigest(plant)); return ok })
	if got := set(s.bus, topic.Desired); got != wants {
		t.Errorf("an empty broker took the node's memory; left is\n%s", got)
	}
	b = startBridge(t, cloud, wanted())
	agree(s, cloud, b)
	if got := set(s.bus, topic.Desired); got != wants {
		t.Errorf("desired is now\n%s", got)
	}
}

// The state is repaired although no message of a change ever arrived.
func TestLostMessages(t *testing.T) {
	cloud, b, _, s := together(t)
	// The node's store is behind its link's back: as after a power cut of a bad disk.
	if err := s.bus.Do(t.Context(), func() []broker.Message {
		return []broker.Message{{Topic: pod, QoS: 1, Retain: true}}
	}); err != nil {
		t.Fatal(err)
	}
	s.link.in.Put(pod, nil)
	// And the cloud broker lost some of the node's.
	if err := cloud.Publish(t.Context(), broker.Message{Topic: pressure, QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	b.want(speed, wish(50, 50)) // the next digest shows it
	s.put(about, `{"agent":"v0.2.0"}`)
	agree(s, cloud, b)
}

// A message that comes late does not turn the node back; what a repair asked
// for is the cloud's truth, however old.
func TestOlderRev(t *testing.T) {
	cloud, b, _, s := together(t)
	b.want(speed, wish(50, 50))
	agree(s, cloud, b)

	late := wish(45, 45)
	if err := cloud.Publish(t.Context(), broker.Message{Topic: speed, Payload: []byte(late), QoS: 1}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the late message is ignored", func() bool { return s.log.has("older state ignored", string(speed)) })
	if p, _ := s.bus.Retained(speed); string(p) != wish(50, 50) {
		t.Errorf("the wish is %s", p)
	}

	b.want(speed, wish(46, 46))
	agree(s, cloud, b)

	// Another uid is another object: its revs begin anew.
	if p := `{"v":1,"rev":1,"uid":"another"}`; true {
		repairs := s.metric("fairlead_link_repairs_total")
		b.want(speed, p)
		agree(s, cloud, b)
		if got := s.metric("fairlead_link_repairs_total"); got != repairs {
			t.Error("another uid needed a repair")
		}
	}
}

func TestWill(t *testing.T) {
	cloud, _, w, s := together(t)
	first := shows(t, cloud, true)

	// Cut off, the node is offline on both sides, as of the connection that ended.
	to := w.to
	w.lead("")
	if got := shows(t, cloud, false); got.Since != first.Since || got.Agent != first.Agent {
		t.Errorf("the Will is %+v after %+v", got, first)
	}
	shows(t, s.bus, false)
	w.lead(to)
	if got := shows(t, cloud, true); got.Since <= first.Since {
		t.Errorf("since is %d after %d", got.Since, first.Since)
	}
	shows(t, s.bus, true)

	// The Will of a connection that was taken over comes late.
	for range 3 {
		err := cloud.Publish(t.Context(), broker.Message{Topic: topic.ReportedLink(plant), Payload: []byte(`{"online":false,"since":1}`), QoS: 1, Retain: true})
		if err != nil {
			t.Fatal(err)
		}
		shows(t, cloud, true)
	}

	// A goodbye is as good as a Will.
	s.stop()
	shows(t, cloud, false)
	shows(t, s.bus, false)
}

// A connection that died unnoticed is taken over by the next one.
func TestTakeover(t *testing.T) {
	cloud, b, w, s := together(t)
	before := shows(t, cloud, true)
	s.link.c.Drop(errors.New("the test wants a new connection"))
	eventually(t, "there is a new connection", func() bool {
		l, ok := linkState(cloud)
		return ok && l.Online && l.Since > before.Since
	})
	// A second agent with the node's name, a cloned disk: each throws the other
	// out, and when one is gone the other is there, online.
	clone := openSite(t, t.TempDir())
	clone.reportAll()
	clone.run(w.URL)
	eventually(t, "the clone was connected", func() bool { return clone.log.has("connected to broker") })
	clone.stop()
	shows(t, cloud, true)
	agree(s, cloud, b)
}

// An agent that was killed left word that it is online.
func TestKilled(t *testing.T) {
	s := openSite(t, t.TempDir())
	s.put(topic.ReportedLink(plant), `{"online":true,"since":123,"agent":"v0.0.9"}`)
	w := newWire(t, "mqtt://127.0.0.1:1")
	s.run(w.URL)
	if got := shows(t, s.bus, false); got.Since != 123 {
		t.Errorf("since is %d", got.Since)
	}
}

// What is not the cloud's to say about this node is not listened to.
func TestForeign(t *testing.T) {
	s := openSite(t, t.TempDir())
	s.put(pump, `{"uid":"`+uid+`","rev":1}`)
	s.put(pressure, `{"v":1,"t":1}`)
	l, err := New(Config{Node: plant, URL: "mqtt://127.0.0.1:1", Token: secret, Logger: s.log.logger(t)}, s.bus)
	if err != nil {
		t.Fatal(err)
	}
	all := func() string {
		var out []string
		for _, m := range s.bus.RetainedMatch("#") {
			out = append(out, string(m.Topic)+" "+string(m.Payload))
		}
		return strings.Join(out, "\n")
	}
	before := all()
	for _, x := range []topic.Topic{
		topic.DesiredDevice("plant-8", "default", "pump-1"), topic.DesiredDigest("plant-8"),
		pressure, about, running, topic.ReportedDigest(plant),
		topic.Set(plant, "default", "pump-1", "speed"), "fl/plant-7/event/alarm",
		topic.SyncRequest(plant, topic.Desired), topic.SyncManifest(plant, topic.Reported),
		"fl/plant-7/desired/unheard/of", "fl/plant-7", "fl", "site/name", "",
		// Ours, but not readable.
		topic.DesiredDigest(plant), topic.SyncManifest(plant, topic.Desired), topic.SyncRequest(plant, topic.Reported), topic.ReportedLink(plant),
	} {
		for _, p := range []string{"", "x", "null", `{"uid":1}`, `{"count":"many","topics":[],"want":1}`} {
			if p == "" && x == topic.ReportedLink(plant) {
				continue
			}
			l.messages([]client.Message{{Topic: x, Payload: []byte(p), QoS: 1}})
		}
	}
	l.wg.Wait()
	if got := all(); got != before {
		t.Errorf("stored is now\n%s", got)
	}
	for _, words := range [][]string{{"foreign topic", "plant-8"}, {"not the cloud's to write", string(pressure)}, {"digest ignored"}, {"manifest ignored"}, {"request ignored"}} {
		if !s.log.has(words...) {
			t.Errorf("the log does not say %q", words)
		}
	}
}

// The cloud refuses the node: it goes on without, and says why.
func TestRefused(t *testing.T) {
	cloud, addr := cloudBroker(t, "127.0.0.1:0")
	s := openSite(t, t.TempDir())
	s.reportAll()
	s.run(addr, func(c *Config) { c.Token = "another" })
	eventually(t, "the log says why", func() bool { return s.log.has("cannot connect", "wrong token") })
	if s.log.has("another") {
		t.Error("the log holds the token")
	}
	s.put(pressure, `{"v":2,"t":2}`)
	if len(cloud.RetainedMatch(topic.NodeAll(plant))) != 0 {
		t.Error("something came to the cloud")
	}
	if _, ok := linkState(s.bus); ok {
		t.Error("the bus shows a link that never was")
	}
}

func TestConfig(t *testing.T) {
	s := openSite(t, t.TempDir())
	for url, words := range map[string]string{
		"": "empty", "http://cloud": "scheme", "mqtt://": "host", "mqtt://me:pw@cloud": "credentials", "mqtt://cloud:port": "port",
	} {
		if _, err := New(Config{Node: plant, URL: url}, s.bus); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("%q: want %q, got %v", url, words, err)
		}
	}
	if _, err := New(Config{Node: plant, URL: "cloud", KeepAlive: 1}, s.bus); err == nil || !strings.Contains(err.Error(), "keepalive") {
		t.Errorf("got %v", err)
	}
}

// A node that cannot store keeps what it has, and catches up when it can.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Skipf("SKIP: cannot mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	cloud, addr := cloudBroker(t, "127.0.0.1:0")
	b := startBridge(t, cloud, wanted())
	s := openSite(t, dir, func(o *broker.Options) { o.Store.ReserveBytes = 32 << 20 })
	s.reportAll()
	s.run(addr)
	agree(s, cloud, b)

	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store is full", func() bool { return errors.Is(s.bus.StoreErr(), store.ErrDiskFull) })
	b.want(speed, wish(45, 9))
	b.want(settings, "")
	eventually(t, "the node says so", func() bool { return s.log.has("desired state not stored") })
	if p, _ := s.bus.Retained(speed); string(p) != wish(40, 1) {
		t.Errorf("the wish is %s", p)
	}
	s.put(pressure, `{"v":4,"t":4}`) // readings need no disk, and go on
	eventually(t, "the reading is in the cloud", func() bool { p, _ := cloud.Retained(pressure); return string(p) == `{"v":4,"t":4}` })
	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	agree(s, cloud, b)
	s.stop()
	if err := s.bus.Close(); err != nil {
		t.Error(err)
	}
}
