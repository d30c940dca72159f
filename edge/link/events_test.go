package link

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const alarm = topic.Topic("fl/plant-7/event/alarm/pump-1")

func withLog(o *broker.Options) { o.EventBytes, o.EventAge = 16<<20, 24*time.Hour }

// observer sees what comes into the cloud broker, over its restarts.
type observer struct {
	t  *testing.T
	mu sync.Mutex
	// got are the node's messages that the broker let through, in order.
	got []broker.Message
	// at calls fn, on a goroutine of its own, when so many have come.
	at map[int]func()
	wg sync.WaitGroup
}

func observe(t *testing.T) *observer {
	o := &observer{t: t, at: map[int]func(){}}
	t.Cleanup(o.wg.Wait)
	return o
}

func (o *observer) watch(cloud *broker.Broker, f topic.Filter) {
	o.t.Helper()
	_, err := cloud.Watch(o.t.Context(), f, func(m broker.Message) {
		if strings.HasSuffix(string(m.Topic), "/digest") || strings.HasSuffix(string(m.Topic), "/link") {
			return
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		o.got = append(o.got, m)
		if fn := o.at[len(o.got)]; fn != nil {
			o.wg.Go(fn)
		}
	})
	if err != nil {
		o.t.Fatal(err)
	}
}

func (o *observer) messages() []broker.Message {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.got[:len(o.got):len(o.got)]
}

func (o *observer) count() int { return len(o.messages()) }

// short writes what came: the payload, or from and to of a gap.
func (o *observer) short() string {
	var out []string
	for _, m := range o.messages() {
		if m.Topic == topic.EventGap(plant) {
			var g payload.EventGap
			if err := payload.Decode(m.Payload, &g); err != nil {
				o.t.Error(err)
			}
			out = append(out, fmt.Sprintf("gap %d-%d %s", g.From, g.To, g.Err))
			continue
		}
		out = append(out, string(m.Payload))
	}
	return strings.Join(out, ", ")
}

// cloudAt starts a cloud broker on a folder that may have been one's before.
func cloudAt(t *testing.T, dir string, change ...func(*broker.Options)) (b *broker.Broker, addr string, stop func()) {
	t.Helper()
	o := broker.Options{
		Dir: dir, Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username != plant || string(ci.Password) != secret {
				return access.Identity{}, errors.New("unknown node or wrong token")
			}
			return access.Identity{Role: access.Node, Name: plant}, nil
		},
	}
	for _, c := range change {
		c(&o)
	}
	b, err := broker.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	if addr, err = b.Listen("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	return b, addr, stop
}

// emit publishes events whose payloads count from from to to.
func (s *site) emit(from, to int) {
	s.t.Helper()
	var ms []broker.Message
	for i := from; i <= to; i++ {
		ms = append(ms, broker.Message{Topic: alarm, Payload: []byte(strconv.Itoa(i)), QoS: 1})
	}
	if err := s.bus.Publish(s.t.Context(), ms...); err != nil {
		s.t.Fatal(err)
	}
}

// plantAt is a site whose disk can be copied as a power cut leaves it.
type plantAt struct {
	*site
	disk *vfs.MemFS
}

func openPlant(t *testing.T, disk *vfs.MemFS, change ...func(*broker.Options)) *plantAt {
	t.Helper()
	return &plantAt{openSite(t, "/", append([]func(*broker.Options){withLog, func(o *broker.Options) { o.Store.FS = disk }}, change...)...), disk}
}

// copy gives a copy of the site's disk, with some of what was not synced.
func (p *plantAt) copy() *vfs.MemFS {
	return p.disk.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 50, RNG: rand.New(rand.NewPCG(1, 2))})
}

// end stops the site for good.
func (p *plantAt) end() {
	p.t.Helper()
	p.stop()
	if err := p.bus.Close(); err != nil {
		p.t.Fatal(err)
	}
}

// numbers fails unless the cloud saw the events 1 to n once each and in order.
func (o *observer) numbers(n int) {
	o.t.Helper()
	got := o.messages()
	for i, m := range got {
		if string(m.Payload) != strconv.Itoa(i+1) {
			o.t.Fatalf("event %d of %d is %s %s; before it came %s", i+1, n, m.Topic, m.Payload, got[max(0, i-1)].Payload)
		}
	}
	if len(got) != n {
		o.t.Fatalf("%d events, want %d", len(got), n)
	}
}

// Every event comes into the cloud broker once and in order, whatever is cut,
// killed and started again meanwhile.
func TestEventReplay(t *testing.T) {
	cloudDir := t.TempDir()
	cloud, addr, stopCloud := cloudAt(t, cloudDir)
	w := newWire(t, addr)
	o := observe(t)
	o.watch(cloud, topic.Filter(alarm))
	s := openPlant(t, vfs.NewCrashableMem())

	const total = 9000
	s.emit(1, 3000) // before there ever was a link
	for _, at := range []int{40, 700, 1500} {
		o.at[at] = w.cut
	}
	s.run(w.URL)
	eventually(t, "the outage is replayed", func() bool { return o.count() == 3000 })
	o.numbers(3000)

	// The node is killed in the middle; what its disk has is older than what the
	// cloud took.
	killed := make(chan *vfs.MemFS, 1)
	o.mu.Lock()
	o.at[4200] = func() { killed <- s.copy() }
	o.mu.Unlock()
	s.emit(3001, 6000)
	disk := <-killed
	s.end()
	s = openPlant(t, disk)
	s.emit(6001, 6100) // in the epoch of its own
	s.run(w.URL)
	eventually(t, "all of the killed node's events", func() bool { return o.count() >= 6100 })

	// The cloud is stopped in the middle and comes back elsewhere.
	stopped := make(chan struct{})
	o.mu.Lock()
	o.at[7000] = func() { stopCloud(); close(stopped) }
	o.mu.Unlock()
	s.emit(6101, 8000)
	<-stopped
	s.emit(8001, total)
	cloud, addr, _ = cloudAt(t, cloudDir)
	o.watch(cloud, topic.Filter(alarm))
	w.lead(addr)
	eventually(t, "all events", func() bool { return o.count() >= total })
	o.numbers(total)
	eventually(t, "the log is empty", func() bool { return s.bus.EventBacklog().Count == 0 })
	if got := s.metric("fairlead_link_events_sent_total"); got < total-6100 {
		t.Errorf("the metric counts %v", got)
	}
	for _, m := range o.messages() {
		id, ok, err := payload.ReadEventID(m.Props.User)
		if !ok || err != nil || id.Time == 0 {
			t.Fatalf("%s: %v, %v, %v", m.Payload, m.Props.User, ok, err)
		}
	}
}

// An edge that was restored from an old copy of its disk, or cloned, says
// nothing twice, and what it says anew is not taken for old.
func TestEventsOfOldCopy(t *testing.T) {
	cloud, addr, _ := cloudAt(t, t.TempDir())
	o := observe(t)
	o.watch(cloud, topic.Filter(alarm))
	s := openPlant(t, vfs.NewCrashableMem())
	s.emit(1, 10)
	old := s.copy() // a backup, with ten events that wait
	s.run(addr)
	eventually(t, "the first", func() bool { return o.count() == 10 })
	s.emit(11, 20)
	eventually(t, "the second", func() bool { return o.count() == 20 })
	s.end()

	restored := openPlant(t, old)
	restored.emit(21, 40) // whose numbers were used by 11 to 20
	restored.run(addr)
	eventually(t, "the third", func() bool { return o.count() >= 40 })
	eventually(t, "the log is empty", func() bool { return restored.bus.EventBacklog().Count == 0 })
	o.numbers(40)
}

// What the bounds dropped is marked in its place.
func TestEventGap(t *testing.T) {
	cloud, addr, _ := cloudAt(t, t.TempDir())
	o := observe(t)
	o.watch(cloud, topic.OfKind(plant, topic.KindEvent))
	s := openPlant(t, vfs.NewCrashableMem(), func(o *broker.Options) { o.EventBytes = 32 << 10 })
	for i := range 20 {
		s.emit(1+100*i, 100+100*i)
	}
	waiting := s.bus.EventBacklog()
	if waiting.Dropped == 0 || waiting.Count+waiting.Dropped != 2000 {
		t.Fatalf("backlog %+v", waiting)
	}
	s.run(addr)
	eventually(t, "all that is left", func() bool { return o.count() == int(waiting.Count)+1 })
	got := o.messages()
	var g payload.EventGap
	if err := payload.Decode(got[0].Payload, &g); err != nil || got[0].Topic != topic.EventGap(plant) {
		t.Fatalf("first comes %s %s", got[0].Topic, got[0].Payload)
	}
	id, _, _ := payload.ReadEventID(got[0].Props.User)
	if g.From != 1 || g.To != waiting.Dropped || g.Count != waiting.Dropped || g.Bytes == 0 || g.T == 0 || g.Err != "" || id.Seq != g.To || id.Epoch != g.Epoch {
		t.Errorf("gap %+v, id %+v, dropped %d", g, id, waiting.Dropped)
	}
	for i, m := range got[1:] {
		if want := strconv.Itoa(int(g.To) + 1 + i); string(m.Payload) != want {
			t.Fatalf("got %s, want %s", m.Payload, want)
		}
	}
	s.emit(2001, 2001)
	eventually(t, "the next", func() bool { return o.count() == int(waiting.Count)+2 })
}

// State goes first: what changed during the outage is in the cloud before its
// first event.
func TestStateBeforeEvents(t *testing.T) {
	cloud, addr, _ := cloudAt(t, t.TempDir())
	o := observe(t)
	o.watch(cloud, topic.NodeAll(plant))
	s := openPlant(t, vfs.NewCrashableMem())
	w := newWire(t, "mqtt://127.0.0.1:1")
	s.run(w.URL)
	eventually(t, "it tries", func() bool { return s.log.has("cannot connect") })
	const topics, events = 500, 500
	for i := range topics {
		s.put(topic.ReportedTwin(plant, "default", "pump-1", fmt.Sprintf("p%d", i)), `{"v":1,"t":1}`)
	}
	s.emit(1, events)
	eventually(t, "the state waits", func() bool { return s.link.out.Pending() >= topics })
	w.lead(addr)
	eventually(t, "all", func() bool { return o.count() >= topics+events })
	late, first := 0, -1
	for i, m := range o.messages() {
		switch p, _ := topic.Parse(string(m.Topic)); {
		case p.Kind == topic.KindEvent && first < 0:
			first = i
		case p.Kind == topic.KindReportedTwin && first >= 0:
			late++
		}
	}
	if late > 1 { // the last one may just have left the outbox
		t.Errorf("%d of %d state topics came after the first event", late, topics)
	}
}

// What the cloud cannot take now comes again, in order; what it can never take
// gets a gap marker in its place and holds nothing up.
func TestEventsRefused(t *testing.T) {
	var full atomic.Bool
	full.Store(true)
	refused := make(chan struct{}, 10000)
	cloud, addr, _ := cloudAt(t, t.TempDir(), func(o *broker.Options) {
		o.MaxPacket = 8 << 10
		o.Interceptors = []broker.Interceptor{intercept(func(m *broker.Message) error {
			if m.Topic == alarm && string(m.Payload) == "7" && full.Load() {
				refused <- struct{}{}
				return &broker.Refusal{Code: broker.CodeQuotaExceeded, Kind: "test", Reason: "no room"}
			}
			if m.Topic == alarm && string(m.Payload) == "99" {
				return &broker.Refusal{Code: broker.CodePayloadFormat, Kind: "test", Reason: "not ninety-nine"}
			}
			return nil
		})}
	})
	o := observe(t)
	o.watch(cloud, topic.OfKind(plant, topic.KindEvent))
	s := openPlant(t, vfs.NewCrashableMem())
	s.emit(1, 20)
	for _, m := range []broker.Message{
		{Topic: alarm, Payload: []byte(strings.Repeat("x", 10<<10)), QoS: 1},
		{Topic: alarm, Payload: []byte("late"), QoS: 1, Expires: 1},
	} {
		if err := s.bus.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	s.emit(23, 25)
	s.run(addr)
	<-refused // the first time
	<-refused // and when it came again
	if got := o.short(); got != "1, 2, 3, 4, 5, 6" {
		t.Errorf("came: %s", got)
	}
	full.Store(false)
	eventually(t, "the rest", func() bool { return strings.HasSuffix(o.short(), ", 25") })
	var want []string
	for i := 1; i <= 25; i++ {
		switch i {
		case 21:
			want = append(want, "gap 21-21 the broker refused: a packet of")
		case 22:
			want = append(want, "gap 22-22 expired")
		default:
			want = append(want, strconv.Itoa(i))
		}
	}
	got := strings.Split(o.short(), ", ")
	if len(got) != len(want) {
		t.Fatalf("came: %s", o.short())
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("%d: got %s, want %s", i, got[i], want[i])
		}
	}
	// Refused for good only once it is there: its marker follows, and so does the next.
	s.emit(99, 99)
	s.emit(100, 100)
	eventually(t, "the marker", func() bool { return strings.HasSuffix(o.short(), "not ninety-nine (0x99), 100") })
	eventually(t, "the log is empty", func() bool { return s.bus.EventBacklog().Count == 0 })
}

type intercept func(*broker.Message) error

func (f intercept) Intercept(m *broker.Message) ([]broker.Message, error) { return nil, f(m) }

// The properties that the publisher gave travel with the event.
func TestEventProperties(t *testing.T) {
	cloud, addr, _ := cloudAt(t, t.TempDir())
	o := observe(t)
	o.watch(cloud, topic.Filter(alarm))
	s := openPlant(t, vfs.NewCrashableMem())
	text := byte(1)
	m := broker.Message{Topic: alarm, Payload: []byte("dry"), Expires: time.Now().Add(time.Hour).UnixMilli()}
	m.Props.ContentType, m.Props.PayloadFormat, m.Props.ResponseTopic, m.Props.CorrelationData = "text/plain", &text, "users/answer", []byte("c")
	m.Props.User = [][2]string{{"unit", "bar"}, {"fl-epoch", "mine"}}
	if err := s.bus.Publish(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	s.run(addr)
	eventually(t, "it comes", func() bool { return o.count() == 1 })
	got := o.messages()[0]
	p := got.Props
	if p.ContentType != "text/plain" || p.PayloadFormat == nil || *p.PayloadFormat != 1 || p.ResponseTopic != "users/answer" || string(p.CorrelationData) != "c" {
		t.Errorf("got %+v", p)
	}
	if p.User[len(p.User)-1] != [2]string{"unit", "bar"} || len(p.User) != 5 {
		t.Errorf("got the user properties %v", p.User)
	}
	if left := time.Until(time.UnixMilli(got.Expires)); left < 50*time.Minute || left > time.Hour+2*time.Second {
		t.Errorf("it expires in %s", left)
	}
	if id, ok, err := payload.ReadEventID(p.User); !ok || err != nil || id.Seq != 1 || !id.First || id.Epoch == "mine" {
		t.Errorf("got %+v, %v, %v", id, ok, err)
	}
}

func TestPace(t *testing.T) {
	now := time.Unix(1000, 0)
	p := newPace()
	ack := func(n int, took time.Duration) {
		for range n {
			now = now.Add(took / 10)
			p.acked(took, 1000, now)
		}
	}
	if p.window != firstEventBytes {
		t.Errorf("it begins with %d", p.window)
	}
	ack(2000, 50*time.Millisecond)
	if p.window != maxEventBytes {
		t.Errorf("a fast link has %d", p.window)
	}
	ack(100, 600*time.Millisecond) // slower, but the state does not wait a second
	if p.window != maxEventBytes {
		t.Errorf("half a second: %d", p.window)
	}
	ack(1, 2*time.Second)
	if p.window != maxEventBytes/2 {
		t.Errorf("two seconds: %d", p.window)
	}
	ack(5, 2*time.Second) // all sent before it shrank
	if p.window != maxEventBytes/2 {
		t.Errorf("the same two seconds: %d", p.window)
	}
	ack(2000, 3*time.Second)
	if p.window != minEventBytes {
		t.Errorf("a thin link has %d", p.window)
	}
}

// BenchmarkEventReplay is an outage's backlog on its way from the log of a real
// bus into a real cloud broker over loopback, with the log's deletions.
func BenchmarkEventReplay(b *testing.B) {
	for _, size := range []int{64, 512} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			open := func(o broker.Options) *broker.Broker {
				x, err := broker.Open(o)
				if err != nil {
					b.Fatal(err)
				}
				b.Cleanup(func() { _ = x.Close() })
				return x
			}
			cloud := open(broker.Options{
				Dir: b.TempDir(), Durability: broker.CloudDurability,
				Authenticate: func(broker.ConnectInfo) (access.Identity, error) {
					return access.Identity{Role: access.Node, Name: plant}, nil
				},
			})
			bus := open(broker.Options{
				Dir: b.TempDir(), Node: plant, EventBytes: 4 << 30,
				Authenticate: func(broker.ConnectInfo) (access.Identity, error) { return access.Identity{}, nil },
			})
			addr, err := cloud.Listen("127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			var ms []broker.Message
			for i := range b.N {
				ms = append(ms, broker.Message{Topic: alarm, Payload: fmt.Appendf(nil, "%0*d", size, i), QoS: 1})
				if len(ms) == 500 || i == b.N-1 {
					if err := bus.Publish(b.Context(), ms...); err != nil {
						b.Fatal(err)
					}
					ms = nil
				}
			}
			done := make(chan struct{})
			n := 0
			if _, err := cloud.Watch(b.Context(), topic.Filter(alarm), func(broker.Message) {
				if n++; n == b.N {
					close(done)
				}
			}); err != nil {
				b.Fatal(err)
			}
			l, err := New(Config{Node: plant, URL: addr, Token: secret}, bus)
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			ended := make(chan struct{})
			b.ResetTimer()
			began := time.Now()
			go func() { defer close(ended); _ = l.Run(ctx) }()
			<-done
			b.ReportMetric(float64(b.N)/time.Since(began).Seconds(), "events/s")
			b.StopTimer()
			cancel()
			<-ended
			if n != b.N {
				b.Errorf("%d events, want %d", n, b.N)
			}
		})
	}
}
