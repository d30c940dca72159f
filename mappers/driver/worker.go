package driver

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// A silent device is asked again after its own shortest poll interval,
	// doubled with every failure up to silentLimit, so that its return is
	// noticed within seconds and its line is not held up by timeouts.
	silentLimit = 5 * time.Second
	silentFloor = time.Second
)

// worker serves one device: it polls in one goroutine and attends to targets
// and to aging values in another.
type worker struct {
	node, mapper string
	dev          *device.Device // never changes
	drv          Driver
	out          *outbox
	metrics      *metrics
	log          *slog.Logger

	cancel context.CancelFunc
	done   chan struct{} // closed when both goroutines have ended and the session is closed

	attendNow chan struct{} // one token: a target came, or writes may succeed again

	mu struct {
		sync.Mutex
		rev     int64 // the resolved device's, for the status
		props   map[string]*property
		order   []*property // as in the model
		targets map[string]*target
		silent  bool // nothing of the last poll was answered
		silence string
		fault   map[string]string // property → why it is bad, for a person
		status  payload.DeviceStatus
		gauge   string // the state under which the device is counted
	}
}

// newWorker describes a worker; restore gives what the bus holds for a topic.
func newWorker(node, mapper string, d *device.Device, drv Driver, out *outbox, m *metrics, log *slog.Logger, restore func(topic.Topic) []byte) *worker {
	w := &worker{
		node: node, mapper: mapper, dev: d, drv: drv, out: out, metrics: m,
		log:       log.With("device", d.Key()),
		done:      make(chan struct{}),
		attendNow: make(chan struct{}, 1),
	}
	w.mu.rev = d.Rev
	w.mu.props = map[string]*property{}
	w.mu.targets = map[string]*target{}
	w.mu.fault = map[string]string{}
	for i := range d.Properties {
		p := &d.Properties[i]
		if err := topic.CheckProperty(p.Name); err != nil || w.mu.props[p.Name] != nil {
			w.log.Warn("property ignored: its name is malformed or used twice", "property", p.Name)
			continue
		}
		s := newProperty(p, topic.ReportedTwin(node, d.Namespace, d.Name, p.Name))
		if b := restore(s.topic); s.restore(b) {
			out.adopt(s.topic, b)
		}
		w.mu.props[p.Name] = s
		w.mu.order = append(w.mu.order, s)
	}
	var st payload.DeviceStatus
	if b := restore(w.statusTopic()); len(b) > 0 && payload.Decode(b, &st) == nil && st.UID == d.UID {
		w.mu.status = st
		out.adopt(w.statusTopic(), payload.Encode(st))
	}
	return w
}

func (w *worker) statusTopic() topic.Topic {
	return topic.ReportedDevice(w.node, w.dev.Namespace, w.dev.Name)
}

// topics lists what the worker publishes.
func (w *worker) topics() []topic.Topic {
	out := []topic.Topic{w.statusTopic()}
	for _, p := range w.mu.order { // never changes
		out = append(out, p.topic)
	}
	return out
}

// start runs the worker until stop.
func (w *worker) start(ctx context.Context) {
	ctx, w.cancel = context.WithCancel(ctx)
	go func() {
		defer close(w.done)
		w.run(ctx)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.gaugeLocked("")
	}()
}

// stop ends the worker; it has ended when done is closed.
func (w *worker) stop() { w.cancel() }

func (w *worker) run(ctx context.Context) {
	sess, err := w.drv.Open(ctx, w.dev)
	if err != nil {
		if ctx.Err() != nil {
			return
		}
		w.log.Error("the device's description cannot work; it is not served until it changes", "error", err)
		f := ConfigFault("%w", err)
		sess = broken{f}
		w.mu.Lock()
		for _, p := range w.mu.order { // those that are only written too
			w.takeLocked(p, nil, f, time.Now())
		}
		w.statusLocked(time.Now())
		w.mu.Unlock()
	}
	var wg sync.WaitGroup
	wg.Go(func() { w.poll(ctx, sess) })
	w.attend(ctx, sess)
	wg.Wait()
	if err := sess.Close(); err != nil {
		w.log.Warn("closing the device failed", "error", err)
	}
}

// broken is the session of a device whose description cannot work.
type broken struct{ fault *Fault }

func (b broken) Read(_ context.Context, props []*device.Property) []Result {
	out := make([]Result, len(props))
	for i := range out {
		out[i].Err = b.fault
	}
	return out
}

func (b broken) Write(context.Context, *device.Property, any) (any, error) { return nil, b.fault }
func (b broken) Close() error                                              { return nil }

// setRev follows a change of the device that does not matter to its service.
func (w *worker) setRev(rev int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mu.rev = rev
	w.statusLocked(time.Now())
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// poll reads what is due until ctx ends.
func (w *worker) poll(ctx context.Context, sess Session) {
	w.mu.Lock()
	now := time.Now()
	shortest := time.Duration(0)
	for _, p := range w.mu.order {
		p.next = now
		if p.Access.Readable() && (shortest == 0 || p.interval < shortest) {
			shortest = p.interval
		}
	}
	w.mu.Unlock()
	if shortest == 0 {
		return // write only
	}
	limit := min(max(2*shortest, silentFloor), silentLimit)
	silences := 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		due, wait := w.due(time.Now())
		if len(due) == 0 {
			timer.Reset(wait)
			continue
		}
		if w.read(ctx, sess, due) {
			silences = 0
			timer.Reset(0)
			continue
		}
		if ctx.Err() != nil {
			return
		}
		pause := min(shortest<<min(silences, 10), limit)
		silences++
		timer.Reset(time.Duration(float64(pause) * (0.8 + 0.4*rand.Float64())))
	}
}

// dueRead is a property to read now and its count of writes at that time.
type dueRead struct {
	*property
	writtenThen uint64
}

func (w *worker) due(now time.Time) (due []dueRead, wait time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var next time.Time
	for _, p := range w.mu.order {
		if !p.Access.Readable() {
			continue
		}
		if !p.next.After(now) {
			if n := p.advance(now); n > 0 {
				w.metrics.skipped.Add(float64(n))
			}
			due = append(due, dueRead{p, p.written})
		}
		if next.IsZero() || p.next.Before(next) {
			next = p.next
		}
	}
	return due, max(next.Sub(now), 0)
}

// read reads the due properties and reports them; it is false where the device
// answered nothing at all.
func (w *worker) read(ctx context.Context, sess Session, due []dueRead) bool {
	props := make([]*device.Property, len(due))
	for i, d := range due {
		props[i] = d.Property
	}
	began := time.Now()
	results := sess.Read(ctx, props)
	if ctx.Err() != nil {
		return false
	}
	now := time.Now()
	w.metrics.duration.Observe(now.Sub(began).Seconds())
	if len(results) != len(due) {
		err := fmt.Errorf("the driver gave %d results for %d properties", len(results), len(due))
		results = make([]Result, len(due))
		for i := range results {
			results[i].Err = err
		}
	}

	w.mu.Lock()
	defer w.mu.Unlock()
	bad, silent := 0, 0
	for i, d := range due {
		r := results[i]
		at := r.Time
		if at.IsZero() {
			at = now
		}
		var f *Fault
		if r.Err != nil {
			f = faultOf(r.Err)
			bad++
			if f.silent() {
				silent++
			}
		}
		if d.written != d.writtenThen {
			continue // read before a write that has been reported meanwhile
		}
		w.takeLocked(d.property, r.Value, f, at)
	}
	answered := silent < len(due)
	switch {
	case !answered:
		w.metrics.polls.WithLabelValues("silent").Inc()
	case bad == len(due):
		w.metrics.polls.WithLabelValues("error").Inc()
	case bad > 0:
		w.metrics.polls.WithLabelValues("partial").Inc()
	default:
		w.metrics.polls.WithLabelValues("ok").Inc()
	}
	if answered && w.mu.silent {
		w.log.Info("the device answers again")
		for _, p := range w.mu.order {
			if p.q != "" && p.Access.Readable() && !slices.ContainsFunc(due, func(d dueRead) bool { return d.property == p }) {
				p.next = now // do not leave slow properties bad for another interval
			}
		}
		for _, t := range w.mu.targets {
			t.after = time.Time{}
		}
		signal(w.attendNow)
	}
	if !answered {
		f := faultOf(results[0].Err)
		if !w.mu.silent {
			w.log.Warn("the device does not answer; trying again", "quality", f.Quality, "error", f)
		}
		w.mu.silence = f.Error()
		for _, d := range due {
			d.next = now // again after the pause, however long the interval
		}
	}
	w.mu.silent = !answered
	w.statusLocked(now)
	return answered
}

// takeLocked reports a value or a fault.
func (w *worker) takeLocked(p *property, v any, f *Fault, at time.Time) {
	was, first := p.q, !p.tried
	var report bool
	if f != nil {
		report = p.bad(f.Quality, at)
		w.mu.fault[p.Name] = f.Error()
	} else {
		report = p.good(v, at)
		if p.q != "" {
			w.mu.fault[p.Name] = "the device's answer is not a finite number"
		}
	}
	if p.q == "" {
		delete(w.mu.fault, p.Name)
		if first || was != "" {
			signal(w.attendNow) // from now on it can grow old
		}
	}
	if report {
		if p.q != was && p.q != "" && (f == nil || !f.silent()) {
			w.log.Warn("property is bad", "property", p.Name, "quality", p.q, "error", w.mu.fault[p.Name])
		}
		w.publishLocked(p, false)
	}
}

func (w *worker) publishLocked(p *property, urgent bool) {
	q := "good"
	if len(p.q) > len("bad:") {
		q = p.q[len("bad:"):]
	}
	w.metrics.readings.WithLabelValues(q).Inc()
	w.out.put(p.topic, payload.Encode(p.reading()), urgent)
}

// statusLocked publishes the device's status if it changed.
func (w *worker) statusLocked(now time.Time) {
	tried, bad := 0, 0
	why := ""
	for _, p := range w.mu.order {
		if !p.tried {
			continue
		}
		tried++
		if p.q != "" {
			bad++
			if why == "" {
				why = p.Name + ": " + w.mu.fault[p.Name]
				if w.mu.fault[p.Name] == "" {
					why = p.Name + ": " + p.q
				}
			}
		}
	}
	if tried == 0 {
		return
	}
	st := payload.DeviceStatus{UID: w.dev.UID, Rev: w.mu.rev, State: payload.DeviceOnline, Mapper: w.mapper}
	switch {
	case w.mu.silent:
		st.State, st.Error = payload.DeviceOffline, w.mu.silence
	case bad > 0:
		st.State, st.Error = payload.DeviceError, why
	}
	old := w.mu.status
	if st.State == old.State {
		st.Since = old.Since
	} else {
		st.Since = payload.Millis(now)
	}
	w.gaugeLocked(st.State)
	if st == old {
		return
	}
	w.mu.status = st
	w.out.put(w.statusTopic(), payload.Encode(st), false)
}

// gaugeLocked counts the device under its state; empty is no longer at all.
func (w *worker) gaugeLocked(state string) {
	if w.mu.gauge == state {
		return
	}
	if w.mu.gauge != "" {
		w.metrics.devices.WithLabelValues(w.mu.gauge).Dec()
	}
	if state != "" {
		w.metrics.devices.WithLabelValues(state).Inc()
	}
	w.mu.gauge = state
}
