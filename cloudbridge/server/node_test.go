package server_test

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// node is an edge node without an edge: a plain MQTT client that keeps what it
// is sent, reports what it is told to, and repairs both by the digests.
type node struct {
	name string
	c    *client.Client
	out  *repair.Outbox
	in   *repair.Inbox
	stop func()

	mu       sync.Mutex
	desired  map[topic.Topic][]byte
	reported map[topic.Topic][]byte
	digest   payload.Digest
	received int // messages on desired topics
}

// newNode makes a node that is not connected yet.
func newNode(name string) *node {
	n := &node{name: name, desired: map[topic.Topic][]byte{}, reported: map[topic.Topic][]byte{}}
	n.out = repair.NewOutbox(repair.OutboxConfig{Direction: topic.Reported, Epoch: name, Get: func(t topic.Topic) ([]byte, bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		p, ok := n.reported[t]
		return p, ok
	}})
	n.out.AddNode(name)
	n.in = repair.NewInbox(repair.InboxConfig{Direction: topic.Desired, Absent: func(ts []topic.Topic) {
		for _, t := range ts {
			n.store(t, nil)
		}
	}})
	n.report(topic.ReportedNode(name), payload.Node{Agent: "v0", OS: "linux", Arch: "amd64", CPUs: 2, MemoryBytes: 1 << 30, InternalAddress: "192.0.2.7", Hostname: name})
	return n
}

func (n *node) store(t topic.Topic, p []byte) {
	n.mu.Lock()
	if len(p) == 0 {
		delete(n.desired, t)
	} else {
		n.desired[t] = p
	}
	n.mu.Unlock()
	n.in.Put(t, p)
}

// report sets a reported topic; nil clears it.
func (n *node) report(t topic.Topic, v any) {
	n.mu.Lock()
	if v == nil {
		delete(n.reported, t)
	} else {
		n.reported[t] = payload.Encode(v)
	}
	n.mu.Unlock()
	n.out.Touch(t)
}

// connect dials until disconnect.
func (n *node) connect(t *testing.T, url, token string) {
	t.Helper()
	since := payload.Millis(time.Now())
	link := func(online bool) *client.Message {
		return &client.Message{Topic: topic.ReportedLink(n.name), QoS: 1, Retain: true, Payload: payload.Encode(payload.Link{Online: online, Since: since, Agent: "v0"})}
	}
	var wg sync.WaitGroup
	var err error
	n.c, err = client.New(client.Config{
		URL: url, ClientID: "sim", Username: n.name, Password: token, MinBackoff: 50 * time.Millisecond, MaxBackoff: 500 * time.Millisecond,
		Will: func() *client.Message { return link(false) },
		Subscriptions: []client.Subscription{
			{Filter: topic.Desired.All(n.name), QoS: 1, RetainAsPublished: true},
			{Filter: topic.OfKind(n.name, topic.KindSyncDesiredManifest), QoS: 1},
			{Filter: topic.OfKind(n.name, topic.KindSyncReportedRequest), QoS: 1},
		},
		OnMessage: n.message,
		OnUp: func(ctx context.Context) {
			wg.Go(func() {
				if n.c.Publish(ctx, *link(true)) != nil {
					return
				}
				_ = n.out.Run(ctx, n.c)
			})
			wg.Go(func() { _ = n.in.Run(ctx, n.c) })
		},
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)).With("sim", n.name),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	wg.Go(func() { _ = n.c.Run(ctx) })
	n.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(n.stop)
}

func (n *node) message(m client.Message) {
	p, err := topic.Parse(string(m.Topic))
	if err != nil {
		return
	}
	switch p.Kind {
	case topic.KindDesiredDigest:
		var d payload.Digest
		if payload.Decode(m.Payload, &d) == nil {
			n.mu.Lock()
			n.digest = d
			n.mu.Unlock()
			n.in.Digest(n.name, d)
		}
	case topic.KindSyncDesiredManifest:
		var sm payload.SyncManifest
		if payload.Decode(m.Payload, &sm) == nil {
			n.in.Manifest(n.name, sm, m.CorrelationData)
		}
	case topic.KindSyncReportedRequest:
		var r payload.SyncRequest
		if payload.Decode(m.Payload, &r) == nil {
			n.out.Request(n.name, r, m.ResponseTopic, m.CorrelationData)
		}
	default:
		n.mu.Lock()
		n.received++
		n.mu.Unlock()
		n.store(m.Topic, m.Payload)
	}
}

// has gives what the node holds of a desired topic.
func (n *node) has(t topic.Topic) ([]byte, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, ok := n.desired[t]
	return p, ok
}

// holds lists the node's desired topics without the prefix, sorted.
func (n *node) holds() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for t := range maps.Keys(n.desired) {
		out = append(out, strings.TrimPrefix(string(t), "fl/"+n.name+"/desired/"))
	}
	slices.Sort(out)
	return out
}

// inStep tells whether the node's set is what the cloud's digest says.
func (n *node) inStep() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	set := digest.NewSet()
	for t, p := range n.desired {
		set.Put(string(t), p)
	}
	return n.digest.Count == set.Count() && n.digest.Sum == set.Sum() && n.digest.Epoch != ""
}
