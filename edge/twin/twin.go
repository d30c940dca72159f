// Package twin drives devices: it turns the cloud's wishes and local ones into
// targets, and guards what mappers and local clients write about devices.
//
// It sits on the broker's publish path as an interceptor: a wish and the target
// that follows from it are stored in the same batch, so that an acknowledged
// wish is a stored target. The retained topics are its only state.
//
//	engine := twin.New(twin.Config{Node: "plant-7", Logger: log})
//	b, err := broker.Open(broker.Options{Interceptors: []broker.Interceptor{engine}, …})
//	err = engine.Start(ctx, b) // before the first listener
package twin

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Config configures the engine.
type Config struct {
	Node    string
	Metrics prometheus.Registerer // nil is none
	Logger  *slog.Logger
	// Now is time.Now where it is nil.
	Now func() time.Time
}

// Engine is the twin engine. Everything but Start and Run happens on the
// broker's core, so there is no lock.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	state   State
	devices map[string]*device.Device // by namespace/name

	expiries map[topic.Topic]int64 // targets that end, by topic
	present  map[string]int        // connections of each mapper
	absent   map[string]int64      // when a mapper that is away counts as gone
	wake     chan struct{}

	refused *prometheus.CounterVec
	targets *prometheus.CounterVec
}

// State is the retained state that the engine reads; *broker.Broker is one.
type State interface {
	Retained(topic.Topic) ([]byte, bool)
	RetainedMatch(topic.Filter) []broker.Message
}

// New makes an engine.
func New(cfg Config) *Engine {
	e := &Engine{
		cfg: cfg, log: cfg.Logger, now: cfg.Now,
		devices: map[string]*device.Device{}, expiries: map[topic.Topic]int64{},
		present: map[string]int{}, absent: map[string]int64{}, wake: make(chan struct{}, 1),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_twin_wishes_refused_total", Help: "Local wishes and readings refused, by reason."}, []string{"reason"}),
		targets: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "fairlead_twin_targets_total", Help: "Targets set, by who wished."}, []string{"by"}),
	}
	if e.log == nil {
		e.log = slog.New(slog.DiscardHandler)
	}
	if e.now == nil {
		e.now = time.Now
	}
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(e.refused, e.targets)
	}
	return e
}

// Doer is the part of the broker that runs work on its core.
type Doer interface {
	State
	Do(context.Context, func() []broker.Message) error
}

// Start loads the devices from the retained topics and puts right what time
// made wrong. It belongs before the broker's first listener, so that nobody
// writes to an engine without devices or reads a target that expired.
func (e *Engine) Start(ctx context.Context, b Doer) error {
	return b.Do(ctx, func() []broker.Message {
		e.state = b
		e.load()
		var out []broker.Message
		for _, d := range e.devices {
			out = append(out, e.clear(d.Namespace, d.Name, d)...)
			out = append(out, e.retarget(d)...)
		}
		// What was left behind by a device that is gone, had we died in between.
		out = append(out, e.orphans(b)...)
		out = append(out, e.expire()...)
		e.awaitMappers()
		e.signal()
		return out
	})
}

// load reads what is kept in memory from the retained topics.
func (e *Engine) load() {
	clear(e.devices)
	clear(e.expiries)
	for _, m := range e.state.RetainedMatch(topic.OfKind(e.cfg.Node, topic.KindDesiredDevice)) {
		d, err := decodeDevice(m.Payload)
		if err != nil {
			e.log.Error("stored device cannot be read; the next repair brings it again", "topic", m.Topic, "error", err)
			continue
		}
		e.devices[d.Key()] = d
	}
	for _, m := range e.state.RetainedMatch(topic.OfKind(e.cfg.Node, topic.KindReportedTarget)) {
		if t, ok := e.target(m.Topic); ok && t.Exp != 0 {
			e.expiries[m.Topic] = t.Exp
		}
	}
}

// Undone implements broker.Undoer: what the engine remembers of messages that
// the store did not take is void.
func (e *Engine) Undone() {
	if e.state != nil {
		e.load()
		e.awaitMappers() // that one is away may not have been written down
		e.signal()
	}
}

// Run ends targets, and the patience with absent mappers, when their time is
// over, until ctx ends.
func (e *Engine) Run(ctx context.Context, b Doer) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	failing := false
	for {
		var wait time.Duration
		err := b.Do(ctx, func() []broker.Message {
			out := append(e.expire(), e.abandon()...)
			wait = e.nextExpiry()
			return out
		})
		wake := e.wake
		switch {
		case err == nil:
			failing = false
		case ctx.Err() != nil || errors.Is(err, broker.ErrClosed):
			return nil
		default:
			if !failing {
				e.log.Warn("expired targets not removed, trying again every second", "error", err)
			}
			// Undone has woken us as well: a store that refuses must not be asked
			// without a pause.
			failing, wait, wake = true, time.Second, nil
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case <-wake:
		case <-timer.C:
		}
	}
}

// nextExpiry is how long to wait for the next target to end: a minute at most,
// as the clock may be set meanwhile.
func (e *Engine) nextExpiry() time.Duration {
	if len(e.expiries)+len(e.absent) == 0 {
		return time.Hour
	}
	now := payload.Millis(e.now())
	wait := time.Minute
	sooner := func(at int64) {
		if in := at - now; in < wait.Milliseconds() { // a far one would overflow a Duration
			wait = time.Duration(in) * time.Millisecond
		}
	}
	for _, at := range e.expiries {
		sooner(at)
	}
	for _, at := range e.absent {
		sooner(at)
	}
	return max(wait, time.Millisecond)
}

func (e *Engine) signal() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// Intercept implements broker.Interceptor.
func (e *Engine) Intercept(m *broker.Message) ([]broker.Message, error) {
	if !topic.Owned(string(m.Topic)) {
		return nil, nil
	}
	p, err := topic.Parse(string(m.Topic))
	if err != nil || p.Node != e.cfg.Node {
		return nil, nil //nolint:nilerr // the broker's access rules say no to those
	}
	switch p.Kind {
	case topic.KindDesiredDevice:
		return e.device(p, m)
	case topic.KindDesiredTwin:
		return e.wish(p, m.Payload), nil
	case topic.KindSet:
		return e.set(p, m)
	case topic.KindReportedTwin:
		return nil, e.count(e.reading(p, m))
	case topic.KindReportedDevice:
		return nil, e.count(e.deviceStatus(p, m))
	}
	return nil, nil
}

func (e *Engine) count(err error) error {
	var r *broker.Refusal
	if errors.As(err, &r) {
		e.refused.WithLabelValues(r.Kind).Inc()
	}
	return err
}

func decodeDevice(b []byte) (*device.Device, error) {
	var d device.Device
	if err := payload.Decode(b, &d); err != nil {
		return nil, err
	}
	if d.UID == "" || d.Name == "" || d.Namespace == "" {
		return nil, errors.New("the device has no uid, namespace or name")
	}
	return &d, nil
}

// device takes a new, changed or removed device.
func (e *Engine) device(p topic.Parsed, m *broker.Message) ([]broker.Message, error) {
	key := p.Namespace + "/" + p.Name
	old := e.devices[key]
	if len(m.Payload) == 0 {
		delete(e.devices, key)
		return e.clear(p.Namespace, p.Name, nil), nil
	}
	d, err := decodeDevice(m.Payload)
	if err != nil || d.Key() != key {
		if err == nil {
			err = errors.New("it names another device than its topic")
		}
		e.log.Error("device refused", "topic", m.Topic, "error", err)
		return nil, &broker.Refusal{Code: broker.CodePayloadFormat, Kind: string(device.ReasonPayload), Reason: err.Error()}
	}
	e.devices[key] = d
	var out []broker.Message
	if old != nil && old.UID != d.UID {
		out = e.clear(p.Namespace, p.Name, nil) // another device took the name
	} else {
		out = e.clear(p.Namespace, p.Name, d)
	}
	return append(out, e.retarget(d)...), nil
}

// clear removes what was reported of a device: all of it for keep == nil, else
// what belongs to properties that the device no longer has, or to another uid.
func (e *Engine) clear(ns, name string, keep *device.Device) []broker.Message {
	var out []broker.Message
	for _, k := range []topic.Kind{topic.KindReportedTarget, topic.KindReportedTwin} {
		for _, m := range e.state.RetainedMatch(topic.OfDevice(e.cfg.Node, k, ns, name)) {
			p, err := topic.Parse(string(m.Topic))
			if err != nil {
				continue
			}
			if keep != nil {
				prop, ok := keep.Property(p.Property)
				if ok && (k != topic.KindReportedTarget || prop.Access.Writable() && e.sameUID(m.Payload, keep.UID)) {
					continue
				}
			}
			delete(e.expiries, m.Topic)
			out = append(out, retained(m.Topic, nil))
		}
	}
	if keep == nil {
		t := topic.ReportedDevice(e.cfg.Node, ns, name)
		if _, ok := e.state.Retained(t); ok {
			out = append(out, retained(t, nil))
		}
	}
	return out
}

func (e *Engine) sameUID(target []byte, uid string) bool {
	var t payload.Target
	return json.Unmarshal(target, &t) == nil && t.UID == uid
}

// orphans removes what was reported of devices that are not there.
func (e *Engine) orphans(b State) []broker.Message {
	var out []broker.Message
	for _, k := range []topic.Kind{topic.KindReportedTarget, topic.KindReportedTwin, topic.KindReportedDevice} {
		for _, m := range b.RetainedMatch(topic.OfKind(e.cfg.Node, k)) {
			p, err := topic.Parse(string(m.Topic))
			if err != nil || e.devices[p.Namespace+"/"+p.Name] == nil {
				delete(e.expiries, m.Topic)
				out = append(out, retained(m.Topic, nil))
			}
		}
	}
	return out
}

func retained(t topic.Topic, p []byte) broker.Message {
	return broker.Message{Topic: t, Payload: p, QoS: 1, Retain: true}
}

// reading lets a mapper's value pass if there is such a property: a late value
// must not bring a deleted device back.
func (e *Engine) reading(p topic.Parsed, m *broker.Message) error {
	if len(m.Payload) == 0 {
		return nil // clearing is harmless
	}
	prop, err := e.property(p)
	if err != nil {
		return err
	}
	var r payload.Reading
	if err := payload.Decode(m.Payload, &r); err != nil {
		return refuse(device.Refuse(device.ReasonPayload, "%v; want {\"v\":…,\"t\":…}", err))
	}
	if r.T <= 0 {
		return refuse(device.Refuse(device.ReasonPayload, "a reading needs its time \"t\" in milliseconds since 1970"))
	}
	if len(r.V) == 0 {
		return refuse(device.Refuse(device.ReasonPayload, "a reading needs its value \"v\"; null with a quality \"q\" if there is none"))
	}
	if !r.Good() && !strings.HasPrefix(r.Q, "bad:") {
		return refuse(device.Refuse(device.ReasonPayload, "%.40q is no quality: want \"bad:\" and a reason, or none for a good value", r.Q))
	}
	if string(r.V) == "null" {
		if r.Good() && r.Ack == 0 && prop.Type != device.JSON {
			return refuse(device.Refuse(device.ReasonPayload, "a null value needs a quality \"q\" that says why"))
		}
		return nil
	}
	if !r.Good() {
		return refuse(device.Refuse(device.ReasonPayload, "with the quality %.40q the value is null; the last good one goes into \"lv\"", r.Q))
	}
	// The range is for wishes; a measured value outside it is still the truth.
	plain := device.Property{Name: prop.Name, Type: prop.Type}
	if _, err := plain.Decode(r.V); err != nil {
		return refuse(err)
	}
	return nil
}

func (e *Engine) deviceStatus(p topic.Parsed, m *broker.Message) error {
	if len(m.Payload) == 0 {
		return nil
	}
	d := e.devices[p.Namespace+"/"+p.Name]
	if d == nil {
		return refuse(device.Refuse(device.ReasonDevice, "no device %s/%s on node %s", p.Namespace, p.Name, p.Node))
	}
	var s payload.DeviceStatus
	if err := payload.Decode(m.Payload, &s); err != nil {
		return refuse(device.Refuse(device.ReasonPayload, "%v", err))
	}
	if s.UID != d.UID {
		return refuse(device.Refuse(device.ReasonDevice, "device %s has uid %s, the status is about %q", d.Key(), d.UID, s.UID))
	}
	switch s.State {
	case payload.DeviceOnline, payload.DeviceOffline, payload.DeviceError:
		return nil
	}
	return refuse(device.Refuse(device.ReasonPayload, "%.40q is no state: want %s, %s or %s", s.State, payload.DeviceOnline, payload.DeviceOffline, payload.DeviceError))
}

func (e *Engine) property(p topic.Parsed) (*device.Property, error) {
	d := e.devices[p.Namespace+"/"+p.Name]
	if d == nil {
		return nil, refuse(device.Refuse(device.ReasonDevice, "no device %s/%s on node %s", p.Namespace, p.Name, p.Node))
	}
	prop, ok := d.Property(p.Property)
	if !ok {
		return nil, refuse(device.Refuse(device.ReasonProperty, "device %s has no property %q; model %s has %s", d.Key(), p.Property, d.Model, names(d)))
	}
	return prop, nil
}

func names(d *device.Device) string {
	var out string
	for i, p := range d.Properties {
		if i == 10 {
			return out + ", …"
		}
		if i > 0 {
			out += ", "
		}
		out += p.Name
	}
	return out
}

// refuse makes a negative acknowledgement of a value error.
func refuse(err error) error {
	var v *device.ValueError
	if !errors.As(err, &v) {
		return err
	}
	code := byte(broker.CodePayloadFormat)
	switch v.Reason {
	case device.ReasonAccess:
		code = broker.CodeNotAuthorized
	case device.ReasonProperty, device.ReasonDevice:
		code = broker.CodeTopicInvalid
	case device.ReasonRange, device.ReasonEnum:
		code = broker.CodeImplementation // "the packet is valid, the receiver does not accept it"
	}
	return &broker.Refusal{Code: code, Kind: string(v.Reason), Reason: v.Detail}
}
