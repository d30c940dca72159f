package driver_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const node = "plant-7"

// fakeBus is a broker in memory: retained topics, one subscriber that does not
// get its own messages. The real one is tested in bus_test.go.
type fakeBus struct {
	mu struct {
		sync.Mutex
		retained map[topic.Topic][]byte
		filters  []topic.Filter
		recv     driver.Receiver
		up       bool
		log      []string // what the mapper published
		refuse   topic.Topic
		slow     chan struct{} // publishes wait for it, if not nil
	}
}

func newFakeBus() *fakeBus {
	b := &fakeBus{}
	b.mu.retained = map[topic.Topic][]byte{}
	return b
}

func (b *fakeBus) Run(ctx context.Context, filters []topic.Filter, r driver.Receiver) error {
	b.mu.Lock()
	b.mu.filters, b.mu.recv = filters, r
	b.mu.Unlock()
	b.connect()
	<-ctx.Done()
	b.cut()
	return ctx.Err()
}

func (b *fakeBus) connect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range b.mu.filters {
		for _, t := range slices.Sorted(maps.Keys(b.mu.retained)) {
			if f.Match(t) {
				b.mu.recv.Message(t, b.mu.retained[t])
			}
		}
	}
	b.mu.up = true
	b.mu.recv.Up()
}

func (b *fakeBus) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.mu.up {
		b.mu.up = false
		b.mu.recv.Down(io.EOF)
	}
}

func (b *fakeBus) Publish(ctx context.Context, t topic.Topic, p []byte) error {
	b.mu.Lock()
	slow := b.mu.slow
	b.mu.Unlock()
	if slow != nil {
		select {
		case <-slow:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case !b.mu.up:
		return errors.New("offline")
	case t == b.mu.refuse:
		return fmt.Errorf("%w: 0x99", driver.ErrRefused)
	}
	b.mu.retained[t] = slices.Clone(p)
	b.mu.log = append(b.mu.log, string(t)[strings.LastIndex(string(t), "/")+1:]+" "+string(p))
	return nil
}

// put is another client's retained message; v nil clears the topic.
func (b *fakeBus) put(t topic.Topic, v any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var p []byte
	switch v := v.(type) {
	case nil:
		delete(b.mu.retained, t)
	case string:
		p = []byte(v)
	default:
		p = payload.Encode(v)
	}
	if len(p) > 0 {
		b.mu.retained[t] = p
	}
	if b.mu.up {
		b.mu.recv.Message(t, p)
	}
}

// published gives what the mapper published since the last call, without times.
func (b *fakeBus) published() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.mu.log
	b.mu.log = nil
	for i, s := range out {
		out[i] = timeless(s)
	}
	slices.Sort(out) // senders run side by side: topics have no order among them
	return out
}

// timeless takes the fields away that hold times.
func timeless(s string) string {
	for _, field := range []string{`"t":`, `"since":`} {
		if i := strings.Index(s, field); i >= 0 {
			j := i + len(field)
			for j < len(s) && s[j] >= '0' && s[j] <= '9' {
				j++
			}
			if j < len(s) && s[j] == ',' {
				j++
			} else if s[i-1] == ',' {
				i--
			}
			s = s[:i] + s[j:]
		}
	}
	return s
}

func (b *fakeBus) get(t topic.Topic) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.mu.retained[t])
}

// fakeDriver serves devices of protocol "fake" from memory.
type fakeDriver struct {
	mu struct {
		sync.Mutex
		values  map[string]any   // by property, all devices alike
		faults  map[string]error // of reads, by property; "*" is all
		refuse  map[string]error // of writes
		delay   time.Duration    // of a read
		actual  any              // what a write leaves in the device, if not nil
		openErr error
		opens   int
		closes  int
		reads   []string // property names of each Read
		writes  []string
	}
}

func newFakeDriver() *fakeDriver {
	d := &fakeDriver{}
	d.mu.values, d.mu.faults, d.mu.refuse = map[string]any{}, map[string]error{}, map[string]error{}
	return d
}

func (d *fakeDriver) do(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

func (*fakeDriver) Protocol() string { return "fake" }

func (d *fakeDriver) Open(context.Context, *device.Device) (driver.Session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.opens++
	if d.mu.openErr != nil {
		return nil, d.mu.openErr
	}
	return fakeSession{d}, nil
}

type fakeSession struct{ d *fakeDriver }

func (s fakeSession) Read(ctx context.Context, props []*device.Property) []driver.Result {
	d := s.d
	d.mu.Lock()
	out := make([]driver.Result, len(props))
	var names []string
	for i, p := range props {
		names = append(names, p.Name)
		out[i].Value = d.mu.values[p.Name]
		if err := d.mu.faults["*"]; err != nil {
			out[i].Err = err
		} else if err := d.mu.faults[p.Name]; err != nil {
			out[i].Err = err
		}
	}
	d.mu.reads = append(d.mu.reads, strings.Join(names, "+"))
	delay := d.mu.delay
	d.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
	}
	return out
}

func (s fakeSession) Write(_ context.Context, p *device.Property, v any) (any, error) {
	d := s.d
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mu.writes = append(d.mu.writes, fmt.Sprint(p.Name, "=", v))
	if err := d.mu.faults["*"]; err != nil {
		return nil, err
	}
	if err := d.mu.refuse[p.Name]; err != nil {
		return nil, err
	}
	if d.mu.actual != nil {
		return d.mu.actual, &driver.Fault{Quality: payload.QualityDevice, Reason: driver.ReasonReadback, Err: errors.New("other")}
	}
	d.mu.values[p.Name] = v
	return v, nil
}

func (s fakeSession) Close() error {
	s.d.do(func() { s.d.mu.closes++ })
	return nil
}

// house is a mapper with its bus and driver, inside a synctest bubble.
type house struct {
	*testing.T
	bus  *fakeBus
	drv  *fakeDriver
	stop func()
}

// inHouse runs a test in a bubble of its own.
func inHouse(t *testing.T, f func(h *house)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := &house{T: t, bus: newFakeBus(), drv: newFakeDriver()}
		f(h)
		if h.stop != nil {
			h.stop()
		}
	})
}

// start runs the mapper until stop; it may be called again after that.
func (h *house) start() {
	ctx, cancel := context.WithCancel(h.Context())
	done := make(chan error, 1)
	go func() {
		done <- driver.Run(ctx, driver.Config{Node: node, Transport: h.bus,
			Logger: slog.New(slog.NewTextHandler(h.Output(), nil))}, h.drv)
	}()
	h.stop = func() {
		h.stop = nil
		cancel()
		if err := <-done; err != nil {
			h.Errorf("Run: %v", err)
		}
	}
}

func (h *house) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// expect compares what was published since the last call.
func (h *house) expect(when string, want ...string) {
	h.Helper()
	got := h.bus.published()
	slices.Sort(want)
	if !slices.Equal(got, want) {
		h.Errorf("%s:\ngot  %s\nwant %s", when, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

// reads gives the Reads since the last call.
func (h *house) reads() []string {
	h.drv.mu.Lock()
	defer h.drv.mu.Unlock()
	out := h.drv.mu.reads
	h.drv.mu.reads = nil
	return out
}

func (h *house) writes() string {
	h.drv.mu.Lock()
	defer h.drv.mu.Unlock()
	out := strings.Join(h.drv.mu.writes, " ")
	h.drv.mu.writes = nil
	return out
}

func (h *house) set(name string, v any) { h.drv.do(func() { h.drv.mu.values[name] = v }) }

func (h *house) fault(name string, err error) {
	h.drv.do(func() {
		if err == nil {
			delete(h.drv.mu.faults, name)
		} else {
			h.drv.mu.faults[name] = err
		}
	})
}

// device publishes a device with the properties, JSON objects by comma.
func (h *house) device(name string, rev int64, properties string) {
	d := device.Device{UID: "u-" + name, Rev: rev, Namespace: "default", Name: name, Model: "m", Protocol: "fake"}
	if err := json.Unmarshal([]byte("["+properties+"]"), &d.Properties); err != nil {
		h.Fatal(err)
	}
	h.bus.put(topic.DesiredDevice(node, "default", name), d)
}

func (h *house) target(dev, prop string, rev int64, v string) {
	h.bus.put(topic.ReportedTarget(node, "default", dev, prop),
		payload.Target{V: json.RawMessage(v), Rev: rev, UID: "u-" + dev, By: payload.ByLocal, T: rev})
}

func twin(dev, prop string) topic.Topic { return topic.ReportedTwin(node, "default", dev, prop) }

var errTimeout = &driver.Fault{Quality: payload.QualityTimeout, Err: errors.New("no reply in time")}
