package twin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

const (
	node = "plant-7"
	uid  = "5b0d1e9c-6f1a-4a53-9d41-0a8f3f6f2c11"
	uid2 = "0a8f3f6f-2c11-4a53-9d41-5b0d1e9c6f1a"
	// began is the time at which every test begins.
	began = 1790000000000
)

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

// bus is a node's bus with a twin engine whose clock the test moves.
type bus struct {
	t *testing.T
	*broker.Broker
	engine *Engine
	reg    *prometheus.Registry
	clock  atomic.Int64
	log    lockedBuffer
	dir    string
	stop   func()
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// open starts a bus on a folder at a time, without running the engine.
func open(t *testing.T, dir string, now int64, change ...func(*broker.Options)) *bus {
	t.Helper()
	b := &bus{t: t, dir: dir, reg: prometheus.NewRegistry()}
	b.clock.Store(now)
	log := slog.New(slog.NewTextHandler(&b.log, nil))
	b.engine = New(Config{Node: node, Metrics: b.reg, Logger: log, Now: func() time.Time { return time.UnixMilli(b.clock.Load()) }})
	o := broker.Options{
		Dir: dir, Node: node, Interceptors: []broker.Interceptor{b.engine}, Presence: b.engine.Presence, Logger: log,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username == "mapper" {
				return access.Identity{Role: access.Mapper, Name: "modbus"}, nil
			}
			return access.Identity{Role: access.Local}, nil
		},
	}
	for _, c := range change {
		c(&o)
	}
	var err error
	if b.Broker, err = broker.Open(o); err != nil {
		t.Fatal(err)
	}
	b.stop = sync.OnceFunc(func() {
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Log(b.log.String())
		}
	})
	t.Cleanup(b.stop)
	return b
}

// start starts a bus with its engine started and running.
func start(t *testing.T, dir string, now int64) *bus {
	t.Helper()
	b := open(t, dir, now)
	if err := b.engine.Start(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	b.run()
	return b
}

// run runs the engine until the bus is stopped.
func (b *bus) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.engine.Run(ctx, b) }()
	closeBus := b.stop
	b.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			b.t.Errorf("the engine ended with %v", err)
		}
		closeBus()
	})
	b.t.Cleanup(b.stop)
}

// at moves the clock to so many milliseconds after the beginning and lets the
// engine look at it.
func (b *bus) at(ms int64) {
	b.clock.Store(began + ms)
	b.engine.signal()
}

// cloud publishes a desired topic as the link does; nil clears it.
func (b *bus) cloud(t topic.Topic, v any) {
	b.t.Helper()
	if err := b.tryCloud(t, v); err != nil {
		b.t.Fatalf("%s: %v", t, err)
	}
}

func (b *bus) tryCloud(t topic.Topic, v any) error {
	var p []byte
	switch v := v.(type) {
	case nil:
	case string:
		p = []byte(v)
	default:
		p = payload.Encode(v)
	}
	return b.Publish(b.t.Context(), broker.Message{Topic: t, Payload: p, QoS: 1, Retain: true})
}

// wish publishes the cloud's wish; a rev or exp is counted from the beginning.
func (b *bus) wish(prop, v string, rev int64, exp ...int64) {
	b.t.Helper()
	w := payload.Wish{V: json.RawMessage(v), Rev: began + rev, UID: uid}
	if len(exp) > 0 {
		w.Exp = began + exp[0]
	}
	b.cloud(wishTopic(prop), w)
}

func wishTopic(prop string) topic.Topic { return topic.DesiredTwin(node, "default", "pump-1", prop) }
func targetTopic(prop string) topic.Topic {
	return topic.ReportedTarget(node, "default", "pump-1", prop)
}
func twinTopic(prop string) topic.Topic { return topic.ReportedTwin(node, "default", "pump-1", prop) }
func setTopic(prop string) topic.Topic  { return topic.Set(node, "default", "pump-1", prop) }

var (
	deviceTopic = topic.DesiredDevice(node, "default", "pump-1")
	statusTopic = topic.ReportedDevice(node, "default", "pump-1")
)

// set publishes a local wish.
func (b *bus) set(prop, p string) error {
	return b.Publish(b.t.Context(), broker.Message{
		Topic: setTopic(prop), Payload: []byte(p), QoS: 1, From: access.Identity{Role: access.Local}, ClientID: "local/red",
	})
}

func (b *bus) mustSet(prop, p string) {
	b.t.Helper()
	if err := b.set(prop, p); err != nil {
		b.t.Fatalf("set %s %s: %v", prop, p, err)
	}
}

// report publishes as a mapper does.
func (b *bus) report(t topic.Topic, p string) error {
	return b.Publish(b.t.Context(), broker.Message{
		Topic: t, Payload: []byte(p), QoS: 1, Retain: true, From: access.Identity{Role: access.Mapper, Name: "modbus"}, ClientID: "mapper/modbus/1",
	})
}

// target gives the target of a property, its times counted from the beginning;
// nil is none.
func (b *bus) target(prop string) *payload.Target {
	b.t.Helper()
	p, ok := b.Retained(targetTopic(prop))
	if !ok {
		return nil
	}
	var g payload.Target
	if err := payload.Decode(p, &g); err != nil {
		b.t.Fatal(err)
	}
	g.Rev -= began
	g.T -= began
	if g.Wish != 0 {
		g.Wish -= began
	}
	if g.Exp != 0 {
		g.Exp -= began
	}
	return &g
}

// count reads a counter of the engine.
func (b *bus) count(name, label string) float64 {
	b.t.Helper()
	families, err := b.reg.Gather()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func number(s string) *json.Number { n := json.Number(s); return &n }

// pump is the device that the tests are about.
func pump() device.Device {
	return device.Device{
		UID: uid, Rev: began, Namespace: "default", Name: "pump-1", Model: "pump-station", Protocol: "modbus",
		Properties: []device.Property{
			{Name: "speed", Type: device.Uint16, Unit: "rpm", Access: device.ReadWrite, Min: number("0"), Max: number("3000")},
			{Name: "mode", Type: device.Uint8, Access: device.ReadWrite, Enum: []json.RawMessage{json.RawMessage("0"), json.RawMessage("1")}},
			{Name: "pressure", Type: device.Float64, Unit: "bar", Min: number("0"), Max: number("10")},
			{Name: "label", Type: device.String, Access: device.ReadWrite, MaxLength: 4},
			{Name: "run", Type: device.Bool, Access: device.WriteOnly},
			{Name: "recipe", Type: device.JSON, Access: device.ReadWrite},
			{Name: "energy", Type: device.Uint64, Access: device.ReadWrite},
		},
	}
}

func without(d device.Device, name string) device.Device {
	var keep []device.Property
	for _, p := range d.Properties {
		if p.Name != name {
			keep = append(keep, p)
		}
	}
	d.Properties = keep
	d.Rev++
	return d
}

// dial connects a client over a connection in the process.
func (b *bus) dial(user string, subs ...client.Subscription) (*client.Client, <-chan client.Message) {
	b.t.Helper()
	c, msgs, _ := b.dialAs(user, "red", subs...)
	return c, msgs
}

// dialAs connects with a client id, until leave.
func (b *bus) dialAs(user, id string, subs ...client.Subscription) (c *client.Client, got <-chan client.Message, leave func()) {
	b.t.Helper()
	msgs := make(chan client.Message, 1000)
	up := make(chan struct{})
	var once sync.Once
	c, err := client.New(client.Config{
		Dial: func(context.Context) (net.Conn, error) { return b.Pipe() }, ClientID: id, Username: user, Subscriptions: subs,
		OnMessage: func(m client.Message) { msgs <- m },
		OnUp:      func(context.Context) { once.Do(func() { close(up) }) },
	})
	if err != nil {
		b.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	leave = func() { cancel(); <-done }
	b.t.Cleanup(leave)
	select {
	case <-up:
	case <-time.After(patience):
		b.t.Fatal("client did not connect")
	}
	return c, msgs, leave
}

func next(t *testing.T, msgs <-chan client.Message) client.Message {
	t.Helper()
	select {
	case m := <-msgs:
		return m
	case <-time.After(patience):
		t.Fatal("no message")
		return client.Message{}
	}
}

// wantRefused checks a refusal's kind and that its sentence holds the words.
func wantRefused(t *testing.T, err error, code byte, kind string, words ...string) {
	t.Helper()
	var r *broker.Refusal
	if !errors.As(err, &r) {
		t.Fatalf("want a refusal of kind %s, got %v", kind, err)
	}
	if r.Code != code || r.Kind != kind {
		t.Errorf("want code 0x%02x and kind %s, got 0x%02x and %s: %s", code, kind, r.Code, r.Kind, r.Reason)
	}
	for _, w := range words {
		if !strings.Contains(r.Reason, w) {
			t.Errorf("want %q in the reason, got %q", w, r.Reason)
		}
	}
}
