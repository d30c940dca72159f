package driver

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// The bus does not say when it has sent all that it retains, so the engine goes
// by silence. Erring costs a repeated start or publish, never the truth.
const (
	// Workers start when the first connection has been quiet for settleQuiet,
	// or settleLimit after it came up: a device's last readings, which carry
	// the acks, shall be known before its targets are looked at. They are also
	// subscribed before the devices.
	settleQuiet = 100 * time.Millisecond
	settleLimit = time.Second
	// What a new connection has not brought by then is gone: devices and
	// targets that were deleted while the bus was away, readings it lost.
	sweepQuiet = 2 * time.Second
	sweepLimit = 10 * time.Second
)

// engine holds what the bus says is wanted and runs workers accordingly. Its
// fields belong to the goroutine of run.
type engine struct {
	node, mapper string
	drivers      map[string]Driver
	inbox        *inbox
	out          *outbox
	metrics      *metrics
	log          *slog.Logger
	ready        atomic.Bool // settled: read by /readyz

	up       bool                    // as the outbox was told
	conn     int                     // likewise
	settled  bool                    // the first connection's retained messages are in
	swept    int                     // the connection that was last swept
	devices  map[string]*wanted      // by namespace/name, of our protocols
	foreign  map[string]bool         // devices that other mappers serve
	held     map[topic.Topic]retains // twins and statuses the bus holds, but for foreign devices'
	targets  map[string]map[string]wantedTarget
	running  map[string]*worker
	stopping map[string]*worker
	stopped  chan string // keys of workers that have ended
}

type wanted struct {
	dev  *device.Device
	conn int
}

type wantedTarget struct {
	payload.Target
	conn int
}

type retains struct {
	payload []byte
	conn    int
}

func newEngine(node, mapper string, drivers []Driver, out *outbox, m *metrics, log *slog.Logger) *engine {
	e := &engine{
		node: node, mapper: mapper, drivers: map[string]Driver{},
		inbox: newInbox(), out: out, metrics: m, log: log,
		devices: map[string]*wanted{}, foreign: map[string]bool{},
		held: map[topic.Topic]retains{}, targets: map[string]map[string]wantedTarget{},
		running: map[string]*worker{}, stopping: map[string]*worker{},
		stopped: make(chan string),
	}
	for _, d := range drivers {
		e.drivers[d.Protocol()] = d
	}
	return e
}

// filters are subscribed in this order, so that a bus that replays in order
// brings what a device needs before the device.
func (e *engine) filters() []topic.Filter {
	return []topic.Filter{
		topic.OfKind(e.node, topic.KindReportedTwin),
		topic.OfKind(e.node, topic.KindReportedDevice),
		topic.OfKind(e.node, topic.KindReportedTarget),
		topic.OfKind(e.node, topic.KindDesiredDevice),
	}
}

// run serves until ctx ends, then stops the workers and waits for them.
func (e *engine) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case key := <-e.stopped:
			e.forget(key)
			delete(e.stopping, key)
			e.reconcile(ctx, key)
		case <-e.inbox.wake:
			msgs, l := e.inbox.take()
			e.follow(l)
			for _, m := range msgs {
				e.take(ctx, m)
			}
			timer.Reset(e.tick(ctx, l))
		case <-timer.C:
			timer.Reset(e.tick(ctx, e.inbox.link()))
		}
	}
	for _, w := range e.running {
		w.stop()
	}
	for _, w := range e.running {
		<-w.done
	}
	for range e.stopping {
		<-e.stopped
	}
}

// follow takes over the state of the connection.
func (e *engine) follow(l link) {
	if e.up == l.up && e.conn == l.conn {
		return
	}
	e.up, e.conn = l.up, l.conn
	e.out.setLink(l.up, l.conn)
	if l.up {
		e.metrics.busUp.Set(1)
		e.log.Info("bus connected")
	} else {
		e.metrics.busUp.Set(0)
		e.log.Warn("bus lost; polling goes on and the newest values are kept")
	}
}

// tick does what waits for silence and gives the time until it is to be called
// again.
func (e *engine) tick(ctx context.Context, l link) time.Duration {
	const idle = time.Hour
	if !l.up || e.swept == l.conn {
		return idle
	}
	now := time.Now()
	since := l.upAt
	if l.lastMsg.After(since) {
		since = l.lastMsg
	}
	at := func(quiet, limit time.Duration) time.Time {
		a, b := since.Add(quiet), l.upAt.Add(limit)
		if a.After(b) {
			return b
		}
		return a
	}
	if t := at(settleQuiet, settleLimit); !e.settled && now.Before(t) {
		return t.Sub(now)
	}
	if !e.settled {
		e.settled = true
		e.ready.Store(true)
		e.log.Info("devices known", "devices", len(e.devices))
		for key := range e.devices {
			e.reconcile(ctx, key)
		}
	}
	if t := at(sweepQuiet, sweepLimit); now.Before(t) {
		return t.Sub(now)
	}
	e.sweep(ctx, l.conn)
	return idle
}

// sweep drops what the connection did not bring and publishes again what the
// bus lost.
func (e *engine) sweep(ctx context.Context, conn int) {
	e.swept = conn
	for key, ts := range e.targets {
		for name, t := range ts {
			if t.conn < conn {
				e.dropTarget(key, name)
			}
		}
	}
	for key, d := range e.devices {
		if d.conn < conn {
			delete(e.devices, key)
			e.reconcile(ctx, key)
		}
	}
	for t, h := range e.held {
		if h.conn < conn {
			delete(e.held, t)
		}
	}
	n := e.out.repair(func(t topic.Topic) []byte { return e.held[t].payload })
	if n > 0 {
		e.log.Info("the bus had lost readings; published again", "topics", n)
	}
}

// take handles one message.
func (e *engine) take(ctx context.Context, m incoming) {
	p, err := topic.Parse(string(m.topic))
	if err != nil || p.Node != e.node {
		e.malformed(m.topic, fmt.Errorf("not a topic of node %s", e.node))
		return
	}
	key := p.Namespace + "/" + p.Name
	switch p.Kind {
	case topic.KindReportedTwin, topic.KindReportedDevice:
		e.takeHeld(key, m)
	case topic.KindReportedTarget:
		e.takeTarget(key, p.Property, m)
	case topic.KindDesiredDevice:
		e.takeDevice(ctx, key, m)
	}
}

func (e *engine) malformed(t topic.Topic, err error) {
	e.metrics.malformed.Inc()
	e.log.Warn("message ignored", "topic", t, "error", err)
}

func (e *engine) takeHeld(key string, m incoming) {
	switch {
	case e.foreign[key]:
	case len(m.payload) == 0:
		delete(e.held, m.topic)
		e.out.lost(m.topic)
	default:
		e.held[m.topic] = retains{m.payload, m.conn}
	}
}

func (e *engine) takeTarget(key, property string, m incoming) {
	if len(m.payload) == 0 {
		e.dropTarget(key, property)
		return
	}
	var t payload.Target
	if err := payload.Decode(m.payload, &t); err != nil {
		e.malformed(m.topic, err)
		return
	}
	if e.foreign[key] {
		return
	}
	if e.targets[key] == nil {
		e.targets[key] = map[string]wantedTarget{}
	}
	e.targets[key][property] = wantedTarget{t, m.conn}
	if w := e.running[key]; w != nil {
		w.setTarget(property, t)
	}
}

func (e *engine) dropTarget(key, property string) {
	delete(e.targets[key], property)
	if len(e.targets[key]) == 0 {
		delete(e.targets, key)
	}
	if w := e.running[key]; w != nil {
		w.dropTarget(property)
	}
}

func (e *engine) takeDevice(ctx context.Context, key string, m incoming) {
	if len(m.payload) == 0 {
		delete(e.devices, key)
		delete(e.foreign, key)
		e.reconcile(ctx, key)
		return
	}
	d := new(device.Device)
	err := payload.Decode(m.payload, d)
	if err == nil && d.Key() != key {
		err = fmt.Errorf("the payload is of device %s", d.Key())
	}
	if err != nil {
		e.malformed(m.topic, err)
		if old := e.devices[key]; old != nil {
			old.conn = m.conn // served as it was last understood
		}
		return
	}
	if e.drivers[d.Protocol] == nil {
		delete(e.devices, key)
		e.foreign[key] = true
		delete(e.targets, key)
		for t := range e.held { // not ours to remember
			if p, err := topic.Parse(string(t)); err == nil && p.Namespace+"/"+p.Name == key {
				delete(e.held, t)
			}
		}
	} else {
		delete(e.foreign, key)
		if old := e.devices[key]; old != nil && old.dev.UID == d.UID && old.dev.Rev > d.Rev {
			old.conn = m.conn // never back to an older rev of the same uid
			return
		}
		e.devices[key] = &wanted{d, m.conn}
	}
	e.reconcile(ctx, key)
}

// reconcile makes what runs for a device what is wanted for it: the one place
// where workers are started and stopped.
func (e *engine) reconcile(ctx context.Context, key string) {
	want, w := e.devices[key], e.running[key]
	switch {
	case !e.settled || e.stopping[key] != nil:
		// Called again when settled, or when the old worker has ended.
	case want == nil && w == nil:
	case w != nil && want != nil && sameService(w.dev, want.dev):
		w.setRev(want.dev.Rev)
	case w != nil:
		e.stop(key, w)
		if want == nil {
			e.log.Info("device removed", "device", key)
		} else {
			e.log.Info("device changed", "device", key, "rev", want.dev.Rev)
		}
	default:
		e.log.Info("device added", "device", key, "rev", want.dev.Rev)
		e.start(ctx, key, want.dev)
	}
}

func (e *engine) start(ctx context.Context, key string, d *device.Device) {
	w := newWorker(e.node, e.mapper, d, e.drivers[d.Protocol], e.out, e.metrics, e.log, func(t topic.Topic) []byte {
		if b := e.out.latest(t); b != nil { // newer than what the bus brought, where both exist
			return b
		}
		return e.held[t].payload
	})
	for name, t := range e.targets[key] {
		w.setTarget(name, t.Target)
	}
	e.running[key] = w
	w.start(ctx)
}

func (e *engine) stop(key string, w *worker) {
	delete(e.running, key)
	e.stopping[key] = w
	w.stop()
	go func() { // joined by run, which waits for every key in stopping
		<-w.done
		e.stopped <- key
	}()
}

// forget drops what a stopped worker published and its successor will not, so
// that it is not brought back after the node has cleaned it away.
func (e *engine) forget(key string) {
	next := e.devices[key]
	var gone []topic.Topic
	for _, t := range e.stopping[key].topics() {
		if next == nil || !publishes(next.dev, e.node, t) {
			gone = append(gone, t)
			delete(e.held, t)
		}
	}
	e.out.forget(gone...)
}

// publishes tells whether a worker for the device would own the topic.
func publishes(d *device.Device, node string, t topic.Topic) bool {
	if t == topic.ReportedDevice(node, d.Namespace, d.Name) {
		return true
	}
	return slices.ContainsFunc(d.Properties, func(p device.Property) bool {
		return t == topic.ReportedTwin(node, d.Namespace, d.Name, p.Name)
	})
}

// sameService tells whether two descriptions of a device ask for the same
// service: words for people and the rev do not matter.
func sameService(a, b *device.Device) bool { return reflect.DeepEqual(essence(a), essence(b)) }

func essence(d *device.Device) device.Device {
	c := *d
	c.Rev, c.Model = 0, ""
	c.Properties = slices.Clone(c.Properties)
	for i := range c.Properties {
		p := &c.Properties[i]
		p.Description = ""
		p.Enum = slices.Clone(p.Enum)
		for j, v := range p.Enum { // however it was spaced
			if b, err := json.Marshal(v); err == nil {
				p.Enum[j] = b
			}
		}
	}
	return c
}
