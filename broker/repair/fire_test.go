package repair_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// 10,000 topics, each changed several times while there is no link, cross it as
// 10,000 messages, each the latest.
func TestOutageConflates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		const topics = 10_000
		for i := range topics {
			w.put(device(i), "before")
		}
		w.connect()
		w.settle(time.Minute)
		w.hangUp()
		w.down.take()
		for v := range 5 {
			for i := range topics {
				w.put(device(i), fmt.Sprint(v))
			}
		}
		w.connect()
		w.settle(time.Minute)
		sent := w.down.take()
		if n := count(sent); n[topic.KindDesiredDevice] != topics || n[topic.KindDesiredDigest] != 1 || len(n) != 2 {
			t.Errorf("sent %v", n)
		}
		for _, m := range sent {
			if m.Topic != topic.DesiredDigest(plant) && string(m.Payload) != "4" {
				t.Fatalf("%s: %s is history", m.Topic, m.Payload)
			}
		}
		if n := w.in.Repairs(); n != 0 {
			t.Errorf("%d repairs", n)
		}
	})
}

// A writer whose memory and clock went back writes smaller revs than the
// receiver holds. They are taken also where they change faster than a repair can
// name them.
func TestRestoredWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		const topics = 5
		write := func(round int) {
			for i := range topics {
				w.write(device(i), "a", round)
			}
		}
		write(1)
		w.settle(time.Minute)
		old, _ := w.snapshot()
		w.clock = 2 * time.Hour
		write(2)
		w.settle(time.Minute)

		w.hangUp()
		w.clock = 0
		w.restoreWriter(old, true)
		w.connect()
		round := 1000
		for range 2000 { // 20 s of changes without a pause
			write(round)
			round++
			time.Sleep(10 * time.Millisecond)
		}
		_, held := w.snapshot()
		for i := range topics {
			var got struct{ V int }
			if err := payload.Decode([]byte(held[device(i)]), &got); err != nil || got.V < round-10 {
				t.Errorf("%s: %s after change %d", device(i), held[device(i)], round)
			}
		}
		w.settle(time.Minute)
	})
}

// A smaller rev in the same epoch: one that comes late is ignored, whatever
// repair goes on; the writer's present state is not.
func TestLateMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		at := func(rev int) string { return fmt.Sprintf(`{"uid":"a","rev":%d}`, rev) }
		late := client.Message{Topic: device(1), Payload: []byte(at(40)), QoS: 1, Retain: true}
		other := client.Message{Topic: device(1), Payload: []byte(`{"uid":"b","rev":1}`), QoS: 1, Retain: true}
		holds := func() string { _, held := w.snapshot(); return held[device(1)] }

		w.put(device(1), at(50))
		w.connect()
		w.settle(time.Minute)
		if w.receive(late); holds() != at(50) {
			t.Errorf("a late message made it %s", holds())
		}
		// A repair wants the topic: the late message is none of the answer.
		w.down.losing(func(m client.Message) bool { return m.Topic == device(1) })
		w.put(device(1), at(60))
		time.Sleep(2 * time.Second)
		if w.in.Repairs() != 1 {
			t.Fatal("no repair")
		}
		if w.receive(late); holds() != at(50) {
			t.Errorf("during a repair a late message made it %s", holds())
		}
		w.down.losing(nil)
		w.settle(time.Minute)
		// What the writer has is what counts, even if it should not have gone back.
		w.put(device(1), at(45))
		w.settle(time.Minute)
		if holds() != at(45) {
			t.Errorf("repaired, it is %s", holds())
		}
		if w.receive(other); holds() != string(other.Payload) {
			t.Errorf("with another uid it is %s", holds())
		}
		// Not even before the first digest that a new receiver hears.
		w.settle(time.Minute)
		w.hangUp()
		_, held := w.snapshot()
		w.restoreReceiver(held)
		if w.receive(late); holds() != at(45) {
			t.Errorf("after a restart a late message made it %s", holds())
		}
	})
}

// A page that was asked for while the writer was away, as it is by a node that
// sees the old digest of a restored broker, is answered when the writer has sent
// what it wants the node to have: nothing is dropped that would come back.
func TestPageWaitsForBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 3000 {
			w.put(device(i), "x")
		}
		w.connect()
		w.settle(time.Minute)
		w.hangUp()
		truth, _ := w.snapshot()
		w.restoreWriter(truth, false) // the broker is empty
		stop := w.listen()
		w.in.Digest(plant, payload.Digest{Epoch: "old", Count: 1})
		time.Sleep(time.Second)
		if n := count(w.back.take()); n[topic.KindSyncDesiredRequest] != 1 {
			t.Fatalf("asked %v", n)
		}
		w.down.set(true)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.out.Run(ctx, w.down) }()
		w.settle(time.Minute)
		if n := len(w.absent); n > 0 {
			t.Errorf("%d topics were dropped for a while", n)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		stop()
	})
}

// A proxy that cuts after so many bytes: every connection gets further than the
// one before, whether it repairs or sends what changed.
func TestCut(t *testing.T) {
	const topics = 600
	for _, tc := range []struct {
		name  string
		setUp func(*world)
	}{
		{"everything is missing", func(w *world) {
			for i := range topics {
				w.truth[device(i)] = "x"
				w.out.Assume(device(i), []byte("x"))
			}
		}},
		{"one in 200 differs", func(w *world) {
			for i := range topics {
				p := "same"
				w.truth[device(i)] = p
				w.out.Assume(device(i), []byte(p))
				if i%200 == 199 {
					p = "other"
				}
				w.held[device(i)] = p
				w.in.Put(device(i), []byte(p))
			}
		}},
		{"one that is never taken", func(w *world) {
			for i := range topics {
				w.truth[device(i)] = "x"
				w.out.Assume(device(i), []byte("x"))
			}
			w.failing = func(t topic.Topic) bool { return t == device(3) }
		}},
		{"everything changed", func(w *world) {
			for i := range topics {
				w.put(device(i), "x")
			}
		}},
		{"everything is gone", func(w *world) {
			for i := range topics {
				w.out.Assume(device(i), []byte("x"))
				w.out.Touch(device(i))
				w.held[device(i)] = "x"
				w.in.Put(device(i), []byte("x"))
			}
		}},
	} {
		for n := 3000; n < 40_000; n += n / 3 {
			for _, keep := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/bytes=%d/keep=%v", tc.name, n, keep), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						w := newWorld(t, uint64(n), keep)
						defer w.close()
						tc.setUp(w)
						done := func() bool {
							if w.failing != nil {
								return w.holds() == topics-1
							}
							return w.inSync() && w.out.Pending() == 0
						}
						cuts := 0
						for !done() {
							if cuts++; cuts > 300 {
								t.Fatalf("after %d connections %d topics of %d are there, %d wait", cuts, w.holds(), len(w.truth), w.out.Pending())
							}
							b := newBudget(n)
							w.down.budget, w.back.budget = b, b
							w.connect()
							deadline := time.Now().Add(5 * time.Minute)
							for cut := false; !cut && !done() && time.Now().Before(deadline); {
								select {
								case <-b.cut:
									cut = true
								case <-time.After(50 * time.Millisecond):
								}
							}
							w.hangUp()
						}
						t.Logf("%d connections", cuts)
					})
				})
			}
		}
	}
}

// What receivers ask for is bounded, and what is beyond counted.
func TestRequestsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		var want []string
		for i := range 30_000 {
			want = append(want, fmt.Sprintf("desired/device/default/none-%d", i))
		}
		for range 3 {
			w.out.Request(plant, payload.SyncRequest{Want: want}, "", nil)
		}
		for range 20_000 {
			w.out.Request(plant, payload.SyncRequest{Manifest: true}, "", nil)
		}
		if got, want := w.out.Dropped(), uint64(90_000-65_536+20_000-16_384); got != want {
			t.Errorf("%d were dropped, want %d", got, want)
		}
	})
}

// A page comes behind what its request wants, and is no larger than asked for.
func TestWantsComeFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 3000 {
			w.put(device(i), "x")
		}
		w.connect()
		w.settle(time.Minute)
		w.hangUp()
		w.down.take()
		for i := range 50 { // not before what is wanted
			w.put(device(i), "y")
		}
		w.out.Request(plant, payload.SyncRequest{Want: []string{"desired/device/default/pump-02000", "desired/device/default/pump-02001"}, Manifest: true, Max: 7}, "", []byte("1"))
		w.connect()
		w.quiet()
		wanted, pages := 0, 0
		for i, m := range w.down.take() {
			switch m.Topic {
			case device(2000), device(2001):
				if wanted++; i > 1 {
					t.Errorf("%s is number %d", m.Topic, i)
				}
			case topic.SyncManifest(plant, topic.Desired):
				var sm payload.SyncManifest
				if err := payload.Decode(m.Payload, &sm); err != nil || len(sm.Topics) != 7 || sm.Next != "desired/device/default/pump-00006" {
					t.Errorf("a page of %d up to %s: %v", len(sm.Topics), sm.Next, err)
				}
				if pages++; wanted != 2 {
					t.Error("the page came first")
				}
			}
		}
		if pages != 1 {
			t.Errorf("%d pages", pages)
		}
		// Nor larger than 128 KiB, whoever asks.
		w.out.Request(plant, payload.SyncRequest{Manifest: true, Max: 1 << 30}, "", nil)
		w.quiet()
		for _, m := range w.down.take() {
			if len(m.Payload) > 130<<10 {
				t.Errorf("%s: %d bytes", m.Topic, len(m.Payload))
			}
		}
	})
}

func TestNewEpoch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := repair.NewEpoch(), repair.NewEpoch()
		time.Sleep(time.Millisecond)
		c := repair.NewEpoch()
		if len(a) != 13 || a == b || a >= c || b >= c {
			t.Errorf("%s %s %s", a, b, c)
		}
	})
}

// BenchmarkWake is one change of one node among 10,000, with its digest: what a
// wake costs must not depend on how many nodes there are.
func BenchmarkWake(b *testing.B) {
	for _, nodes := range []int{10, 10_000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			in := repair.NewInbox(repair.InboxConfig{Direction: topic.Reported})
			value := 0
			out := repair.NewOutbox(repair.OutboxConfig{Direction: topic.Reported, Get: func(topic.Topic) ([]byte, bool) {
				return fmt.Appendf(nil, "%d", value), true
			}})
			names := make([]string, nodes)
			for i := range names {
				names[i] = fmt.Sprintf("node-%d", i)
				out.AddNode(names[i])
				in.Digest(names[i], payload.Digest{Count: 1, Sum: digest.Hash{1}})
			}
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			sent := make(chan client.Message, 2*nodes)
			go func() { _ = out.Run(ctx, instant{sent}) }()
			go func() { _ = in.Run(ctx, instant{sent}) }()
			for range 2 * nodes { // the first digests, the first requests
				<-sent
			}
			for b.Loop() {
				value++
				name := names[value%nodes]
				out.Touch(topic.ReportedNode(name))
				<-sent
				in.Digest(name, payload.Digest{Count: 1, Sum: digest.Hash{1}})
			}
		})
	}
}

// instant takes everything and acknowledges it at once.
type instant struct{ sent chan client.Message }

func (s instant) Send(_ context.Context, m client.Message) (<-chan error, error) {
	ack := make(chan error, 1)
	ack <- nil
	s.sent <- m
	return ack, nil
}
