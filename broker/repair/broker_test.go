package repair_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// patience is how long a test waits for what must come.
const patience = 60 * time.Second

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

// site is a real broker that may be restarted, with or without its memory.
type site struct {
	t   *testing.T
	dir string
	at  string
	b   *broker.Broker
}

func newSite(t *testing.T) *site {
	s := &site{t: t, dir: filepath.Join(t.TempDir(), "store"), at: filepath.Join(t.TempDir(), "s")}
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *site) start() {
	s.t.Helper()
	b, err := broker.Open(broker.Options{
		Dir: s.dir, Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			switch ci.Username {
			case "cloud":
				return access.Identity{Role: access.Cloud}, nil
			case plant:
				return access.Identity{Role: access.Node, Name: plant}, nil
			}
			return access.Identity{}, errors.New("unknown")
		},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := b.Listen("unix://" + s.at); err != nil {
		s.t.Fatal(err)
	}
	s.b = b
}

func (s *site) stop() {
	if err := s.b.Close(); err != nil {
		s.t.Error(err)
	}
}

// party is one of the two clients, with its end of both directions.
type party struct {
	*client.Client
	out  *repair.Outbox
	in   *repair.Inbox
	wg   sync.WaitGroup
	stop func()
	ups  atomic.Int32

	mu    sync.Mutex
	truth map[topic.Topic]string // what it writes
	held  map[topic.Topic]string // what it has of the other's
}

func (p *party) put(t topic.Topic, v string) {
	p.mu.Lock()
	if v == "" {
		delete(p.truth, t)
	} else {
		p.truth[t] = v
	}
	p.mu.Unlock()
	p.out.Touch(t)
}

func (p *party) store(t topic.Topic, b []byte) {
	p.mu.Lock()
	if len(b) == 0 {
		delete(p.held, t)
	} else {
		p.held[t] = string(b)
	}
	p.mu.Unlock()
	p.in.Put(t, b)
}

// join connects a party: it writes one direction and receives the other.
func join(t *testing.T, s *site, user string, writes topic.Direction) *party {
	t.Helper()
	reads := topic.Desired
	if writes == topic.Desired {
		reads = topic.Reported
	}
	p := &party{truth: map[topic.Topic]string{}, held: map[topic.Topic]string{}}
	p.out = repair.NewOutbox(repair.OutboxConfig{Direction: writes, Epoch: "e", Get: func(t topic.Topic) ([]byte, bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		v, ok := p.truth[t]
		return []byte(v), ok
	}})
	p.out.AddNode(plant)
	ic := repair.InboxConfig{Direction: reads}
	if reads == topic.Desired { // the node drops, the cloud has it cleared
		ic.Absent = func(ts []topic.Topic) {
			for _, t := range ts {
				p.store(t, nil)
			}
		}
	}
	p.in = repair.NewInbox(ic)
	var err error
	p.Client, err = client.New(client.Config{
		Dial:     func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", s.at) },
		ClientID: user, Username: user,
		MinBackoff: time.Millisecond, MaxBackoff: 20 * time.Millisecond,
		Subscriptions: []client.Subscription{
			{Filter: reads.All(plant), QoS: 1, RetainHandling: 2},
			{Filter: topic.Filter(reads.Digest(plant)), QoS: 1},
			{Filter: topic.Filter(topic.SyncManifest(plant, reads)), QoS: 1},
			{Filter: topic.Filter(topic.SyncRequest(plant, writes)), QoS: 1},
		},
		OnMessage: func(m client.Message) {
			switch m.Topic {
			case reads.Digest(plant):
				var d payload.Digest
				if err := payload.Decode(m.Payload, &d); err != nil {
					t.Error(err)
				}
				p.in.Digest(plant, d)
			case topic.SyncManifest(plant, reads):
				var sm payload.SyncManifest
				if err := payload.Decode(m.Payload, &sm); err != nil {
					t.Error(err)
				}
				p.in.Manifest(plant, sm, m.CorrelationData)
			case topic.SyncRequest(plant, writes):
				var r payload.SyncRequest
				if err := payload.Decode(m.Payload, &r); err != nil {
					t.Error(err)
				}
				p.out.Request(plant, r, m.ResponseTopic, m.CorrelationData)
			default:
				p.store(m.Topic, m.Payload)
			}
		},
		OnUp: func(ctx context.Context) {
			p.ups.Add(1)
			for _, run := range []func(context.Context, repair.Sender) error{p.out.Run, p.in.Run} {
				p.wg.Go(func() {
					if err := run(ctx, p.Client); err != nil && ctx.Err() == nil {
						p.Drop(err)
					}
				})
			}
		},
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.Run(ctx) }()
	var once sync.Once
	p.stop = func() { once.Do(func() { cancel(); <-done; p.wg.Wait() }) }
	t.Cleanup(p.stop)
	return p
}

// agree tells whether the reader has what the writer writes, and knows it.
func agree(writer, reader *party) bool {
	writer.mu.Lock()
	want := maps.Clone(writer.truth)
	writer.mu.Unlock()
	reader.mu.Lock()
	defer reader.mu.Unlock()
	return maps.Equal(want, reader.held) && reader.in.InSync(plant) && writer.out.Pending() == 0
}

func reading(i int) topic.Topic {
	return topic.ReportedTwin(plant, "default", "pump", fmt.Sprintf("p%d", i))
}

// Both directions, over a real broker that loses connections, its process and
// its memory.
func TestThroughBroker(t *testing.T) {
	s := newSite(t)
	cloud, node := join(t, s, "cloud", topic.Desired), join(t, s, plant, topic.Reported)
	both := func(what string) {
		t.Helper()
		eventually(t, what, func() bool { return agree(cloud, node) && agree(node, cloud) })
	}
	change := func(round int) {
		for i := range 300 {
			switch (i + round) % 5 {
			case 0:
				cloud.put(device(i), "")
				node.put(reading(i), "")
			case 1, 2:
				cloud.put(device(i), fmt.Sprint(round))
				node.put(reading(i), fmt.Sprint(-round))
			}
		}
	}
	both("nothing yet")
	change(1)
	both("the first state")

	// A reconnect in sync: digests, and nothing else.
	var mu sync.Mutex
	var seen []topic.Topic
	unwatch, err := s.b.Watch(t.Context(), topic.NodeAll(plant), func(m broker.Message) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, m.Topic)
	})
	if err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	seen = nil // what was retained
	mu.Unlock()
	digests := func(of topic.Topic) (n int) {
		mu.Lock()
		defer mu.Unlock()
		for _, tp := range seen {
			if tp == of {
				n++
			}
		}
		return n
	}
	repairs := node.in.Repairs() + cloud.in.Repairs()
	for i := range 3 {
		node.Drop(errors.New("test"))
		cloud.Drop(errors.New("test"))
		eventually(t, "both digests", func() bool {
			return digests(topic.DesiredDigest(plant)) > i && digests(topic.ReportedDigest(plant)) > i
		})
	}
	both("still")
	mu.Lock()
	if len(seen) != 6 {
		t.Errorf("in sync, %d messages were sent: %v", len(seen), seen)
	}
	mu.Unlock()
	if n := node.in.Repairs() + cloud.in.Repairs(); n != repairs {
		t.Errorf("%d repairs in sync", n-repairs)
	}
	unwatch()

	for round := range 3 { // connections break while all is on its way
		change(10 + round)
		node.Drop(errors.New("test"))
		change(20 + round)
		cloud.Drop(errors.New("test"))
		change(30 + round)
	}
	both("after broken connections")

	s.stop() // the broker goes, and comes back with its memory
	change(40)
	s.start()
	both("after a restart of the broker")

	s.stop() // and without
	change(50)
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
	s.start()
	both("after the broker lost its memory")

	// A party that begins anew, with nothing and with wrong assumptions.
	old := node
	old.stop()
	change(60) // the cloud goes on
	node = join(t, s, plant, topic.Reported)
	for tp, v := range old.truth {
		node.out.Assume(tp, []byte(v))
		node.put(tp, v)
	}
	for i := range 7 {
		tp := reading(1000 + i)
		node.out.Assume(tp, []byte("never sent"))
		node.put(tp, "never sent")
	}
	both("after the node began anew")
}
