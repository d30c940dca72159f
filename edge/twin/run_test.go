package twin

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// core stands in for the broker's core where only time matters: one topic, and
// a store that may refuse.
type core struct {
	engine *Engine
	topic  topic.Topic

	mu    sync.Mutex // Do holds it
	p     []byte
	full  bool
	calls int
}

func (c *core) Retained(t topic.Topic) ([]byte, bool) { return c.p, t == c.topic && len(c.p) > 0 }

func (c *core) RetainedMatch(f topic.Filter) []broker.Message {
	if len(c.p) == 0 || !f.Match(c.topic) {
		return nil
	}
	return []broker.Message{retained(c.topic, c.p)}
}

func (c *core) Do(_ context.Context, fn func() []broker.Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls++
	out := fn()
	if c.full && len(out) > 0 {
		c.engine.Undone()
		return store.ErrDiskFull
	}
	for _, m := range out {
		c.p = m.Payload
	}
	return nil
}

// after lets time go by, then looks.
func (c *core) after(d time.Duration, look func()) {
	time.Sleep(d) // in a synctest bubble
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	look()
}

// runFor runs an engine whose only target ends at exp, with time going by as
// fast as it can.
func runFor(t *testing.T, exp int64, do func(*core)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		e := New(Config{Node: node})
		c := &core{engine: e, topic: targetTopic("speed")}
		if exp == 0 {
			exp = payload.Millis(time.Now().Add(10 * time.Second))
		}
		c.p = payload.Encode(payload.Target{V: json.RawMessage("1"), Rev: 1, UID: uid, By: payload.ByLocal, Exp: exp})
		e.state = c
		e.load()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- e.Run(ctx, c) }()
		do(c)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestRunEndsATargetInTime(t *testing.T) {
	runFor(t, 0, func(c *core) {
		calls := 0
		c.after(10*time.Second-time.Millisecond, func() {
			if len(c.p) == 0 {
				t.Error("the target ended early")
			}
		})
		c.after(time.Millisecond, func() {
			if len(c.p) != 0 {
				t.Error("the target did not end")
			}
			calls = c.calls
		})
		c.after(30*time.Minute, func() {
			if c.calls != calls {
				t.Errorf("with nothing to end, the engine ran %d times in half an hour", c.calls-calls)
			}
		})
	})
}

// A wish that ends in 292 million years is as good as one for ever.
func TestRunWithAFarEnd(t *testing.T) {
	runFor(t, math.MaxInt64, func(c *core) {
		c.after(10*time.Minute, func() {
			if c.calls > 12 {
				t.Errorf("the engine ran %d times in ten minutes", c.calls)
			}
		})
	})
}

// A store that refuses is asked again at leisure, however often it refuses.
func TestRunWithAFullStore(t *testing.T) {
	runFor(t, 0, func(c *core) {
		c.after(time.Second, func() { c.full = true })
		c.after(70*time.Second, func() {
			if c.calls > 65 {
				t.Errorf("the engine ran %d times in a minute of a full disk", c.calls)
			}
			if len(c.p) == 0 {
				t.Error("the target ended though the store did not take it")
			}
			c.full = false
		})
		c.after(2*time.Second, func() {
			if len(c.p) != 0 {
				t.Error("the target did not end when there was room again")
			}
		})
	})
}

// What the store does not take did not happen, and the engine knows. When there
// is room again, what was due is done.
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
	b := open(t, filepath.Join(dir, "store"), began, func(o *broker.Options) { o.Store.ReserveBytes = 32 << 20 })
	if err := b.engine.Start(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	b.run()
	b.cloud(deviceTopic, pump())
	b.wish("speed", "40", 5)
	b.mustSet("mode", `{"v":1,"exp":`+ms(60)+`}`)
	m, leave := b.mapper("1", 1)
	if err := m.Publish(t.Context(), client.Message{Topic: statusTopic, Payload: []byte(modbusStatus), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	leave()
	b.mappers(0)

	big := filepath.Join(dir, "big")
	if err := os.WriteFile(big, make([]byte, 40<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the store is full", func() bool { return errors.Is(b.StoreErr(), store.ErrDiskFull) })
	if err := b.set("speed", "35"); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("a wish that cannot be stored: %v", err)
	}
	wantTarget(t, b, "speed", target("40", 5, 0, payload.ByCloud))
	// Neither a device that is gone nor one that is new came to be.
	for x, v := range map[topic.Topic]any{deviceTopic: nil, wishTopic("speed"): nil} {
		if err := b.tryCloud(x, v); !errors.Is(err, store.ErrDiskFull) {
			t.Errorf("%s: %v", x, err)
		}
	}
	other := pump()
	other.Name = "pump-2"
	if err := b.tryCloud(topic.DesiredDevice(node, "default", "pump-2"), other); !errors.Is(err, store.ErrDiskFull) {
		t.Error(err)
	}
	// Readings do not need the disk.
	if err := b.report(twinTopic("speed"), `{"v":12,"t":1790000000001}`); err != nil {
		t.Error(err)
	}
	wantRefused(t, b.report(topic.ReportedTwin(node, "default", "pump-2", "speed"), `{"v":12,"t":1790000000001}`), 0x90, "device")
	b.at(60)
	eventually(t, "the trouble is logged", func() bool { return strings.Contains(b.log.String(), "expired targets not removed") })
	if b.target("mode") == nil {
		t.Error("the target is gone, but not from the disk")
	}
	b.clock.Store(began + 10_000) // the mapper has been away for long
	eventually(t, "the store refused that as well", func() bool {
		awaited := int64(0)
		err := b.Do(t.Context(), func() []broker.Message { awaited = b.engine.absent["modbus"]; return nil })
		return err == nil && awaited == began+20_000
	})

	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	awaitTarget(t, b, "mode", nil)
	b.mustSet("speed", "35")
	wantTarget(t, b, "speed", target("35", 10_000, 10_000, payload.ByLocal))
	b.pass(20_000)
	if b.stored(statusTopic, modbusStatus) {
		t.Error("the mapper has been away for long, and its device looks alive")
	}
	if n := strings.Count(b.log.String(), "expired targets not removed"); n != 1 {
		t.Errorf("the trouble was logged %d times", n)
	}
	b.stop()
}
