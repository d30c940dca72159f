package repair_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

var seed = flag.Uint64("seed", 0, "of the randomised test; 0 is a new one")

// Whatever the link does to messages, connections, writer and receiver: once it
// stops, both sides come to agree, deletions included.
func TestConverges(t *testing.T) {
	seeds := []uint64{rand.Uint64()}
	if *seed != 0 {
		seeds[0] = *seed
	} else {
		for s := range uint64(150) {
			seeds = append(seeds, s+1)
		}
	}
	for _, s := range seeds {
		for _, keep := range []bool{false, true} {
			t.Run(fmt.Sprintf("seed=%d/keep=%v", s, keep), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { disturbed(t, s, keep) })
				if t.Failed() {
					t.Logf("again with: go test ./broker/repair -run TestConverges -seed %d", s)
				}
			})
		}
	}
}

func disturbed(t *testing.T, seed uint64, keep bool) {
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, seed, keep)
	defer w.close()
	some := func() topic.Topic { return device(rng.IntN(60)) }
	write := func() { w.write(some(), []string{"a", "a", "a", "a", "b"}[rng.IntN(5)], rng.IntN(1000)) }
	truth, held := w.snapshot() // old copies
	// The other one of two agents with one name, of either side.
	type clone struct {
		out         *repair.Outbox
		in          *repair.Inbox
		truth, held map[topic.Topic]string
	}
	var writer, receiver *clone
	w.connect()
	for range 300 {
		switch n := rng.IntN(100); {
		case n < 50:
			write()
		case n < 65:
			w.put(some(), "")
		case n < 70: // the link breaks; things change meanwhile
			w.hangUp()
			for range rng.IntN(20) {
				write()
			}
			w.connect()
		case n < 75:
			f := faults{lose: rng.IntN(30), refuse: rng.IntN(10), duplicate: rng.IntN(30), reorder: rng.IntN(30)}
			w.down.disturb(f)
			w.back.disturb(f)
		case n < 77: // the receiver's store fails for a while
			w.mu.Lock()
			w.broken = !w.broken
			w.mu.Unlock()
		case n < 79: // the writer restarts, and takes for granted that all arrived
			w.hangUp()
			truth, _ := w.snapshot()
			w.restoreWriter(truth, true)
			w.connect()
		case n < 81: // the receiver restarts, with what it holds or with nothing
			w.hangUp()
			_, held := w.snapshot()
			if rng.IntN(2) == 0 {
				clear(held)
			}
			w.restoreReceiver(held)
			w.connect()
		case n < 82: // the receiver gets hold of something that is nobody's
			w.store(device(1000+rng.IntN(10)), []byte("stray"))
		case n < 83:
			truth, held = w.snapshot()
		case n < 85: // an old copy of the writer's memory is restored
			w.hangUp()
			w.restoreWriter(truth, rng.IntN(2) == 0)
			w.connect()
		case n < 86: // and of the receiver's
			w.hangUp()
			w.restoreReceiver(held)
			w.connect()
		case n < 88: // clocks are set
			w.mu.Lock()
			w.clock = time.Duration(rng.IntN(7200)-3600) * time.Second
			w.mu.Unlock()
		case n < 90: // a clone of the writer takes the connection over, or gives it back
			w.hangUp()
			now := &clone{out: w.out, truth: w.truth}
			if writer == nil {
				w.restoreWriter(truth, true)
			} else {
				w.mu.Lock()
				w.out, w.truth = writer.out, writer.truth
				w.mu.Unlock()
			}
			writer = now
			w.connect()
		case n < 92: // and of the receiver
			w.hangUp()
			now := &clone{in: w.in, held: w.held}
			if receiver == nil {
				w.restoreReceiver(held)
			} else {
				w.mu.Lock()
				w.in, w.held = receiver.in, receiver.held
				w.mu.Unlock()
			}
			receiver = now
			w.connect()
		default:
			time.Sleep(time.Duration(rng.IntN(5000)) * time.Millisecond)
		}
	}
	w.down.disturb(faults{})
	w.back.disturb(faults{})
	w.mu.Lock()
	w.broken = false
	w.mu.Unlock()
	time.Sleep(5 * time.Second) // the last delayed ones
	w.settle(time.Hour)
	// And it stays so, without another message but the digest's now and then.
	w.down.take()
	w.back.take()
	repairs := w.in.Repairs()
	time.Sleep(time.Hour)
	if n := count(w.down.take()); n[topic.KindDesiredDevice] > 0 || n[topic.KindDesiredDigest] > 10 || len(w.back.take()) > 0 || w.in.Repairs() != repairs {
		t.Errorf("seed %d: sent in sync: %v", seed, n)
	}
	if !w.inSync() {
		t.Errorf("seed %d: fell apart again", seed)
	}
}

// A reconnect in sync costs the digest, and no word from the receiver.
func TestReconnectInSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 500 {
			w.put(device(i), "x")
		}
		w.connect()
		w.settle(time.Minute)
		if n := count(w.down.take()); n[topic.KindDesiredDevice] != 500 || n[topic.KindDesiredDigest] != 1 || len(n) != 2 {
			t.Errorf("at first: %v", n)
		}
		for range 3 {
			w.hangUp()
			w.connect()
			w.quiet()
			if n := count(w.down.take()); len(n) != 1 || n[topic.KindDesiredDigest] != 1 {
				t.Errorf("reconnect: %v", n)
			}
			if n := w.back.take(); len(n) > 0 {
				t.Errorf("reconnect: the receiver sent %v", n)
			}
		}
		// A topic that was touched and did not change is nothing either.
		w.put(device(3), "x")
		w.put(device(1000), "")
		w.quiet()
		if n := w.down.take(); len(n) > 0 {
			t.Errorf("touched: %v", n)
		}
	})
}

// A topic that changes a thousand times without a link is sent once, as it is.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		w.put(device(1), "before")
		w.settle(time.Minute)
		w.hangUp()
		w.down.take()
		for i := range 1000 {
			w.put(device(1), fmt.Sprint(i))
		}
		w.put(device(2), "came and went")
		w.put(device(2), "")
		if n := w.out.Pending(); n != 2 {
			t.Errorf("%d topics wait", n)
		}
		w.connect()
		w.settle(time.Minute)
		var got []string
		for _, m := range w.down.take() {
			if m.Topic != topic.DesiredDigest(plant) {
				got = append(got, string(m.Topic)+"="+string(m.Payload))
			}
		}
		if want := []string{string(device(1)) + "=999"}; !slices.Equal(got, want) {
			t.Errorf("sent %v", got)
		}
	})
}

// What was under way when the link broke is sent again, whatever became of it.
func TestLostInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		w.settle(time.Minute)
		w.put(device(1), "a")
		w.put(device(2), "b")
		synctest.Wait() // sent, not delivered
		w.hangUp()
		if w.equal() || w.out.Pending() != 2 {
			t.Fatalf("%d wait", w.out.Pending())
		}
		w.connect()
		w.settle(time.Minute)
		if w.in.Repairs() != 0 {
			t.Error("it took a repair")
		}
		// What was acknowledged by then is not.
		w.put(device(3), "c")
		synctest.Wait()
		time.Sleep(2 * latency)
		w.hangUp()
		if n := w.out.Pending(); n != 0 {
			t.Errorf("%d wait", n)
		}
	})
}

// A set beyond one page is repaired in both ways: what is missing comes, what
// is too many goes, and what is right stays untouched.
func TestPaging(t *testing.T) {
	for _, keep := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 1, keep)
			defer w.close()
			const n = 3*repair.PageSize + 50
			missing := map[topic.Topic]bool{}
			for i := range n {
				w.mu.Lock()
				switch {
				case i%1000 == 0 || i == n-1: // also the first, the last and those at the borders
					w.truth[device(i)] = "missing"
					missing[device(i)] = true
				case i%1000 == 1:
					w.truth[device(i)], w.held[device(i)] = "new", "old"
					missing[device(i)] = true
				case i%1000 == 2:
					w.held[device(i)] = "too many"
				default:
					w.truth[device(i)], w.held[device(i)] = "same", "same"
				}
				w.mu.Unlock()
			}
			w.held[device(n+5)] = "behind the last"
			w.held[topic.DesiredConfigMap(plant, "default", "a")] = "before the first"
			surplus := map[topic.Topic]bool{}
			for tp, p := range w.truth {
				w.out.Assume(tp, []byte(p))
			}
			for tp, p := range w.held {
				w.in.Put(tp, []byte(p))
				if _, ok := w.truth[tp]; !ok {
					surplus[tp] = true
				}
			}
			w.connect()
			took := w.settle(time.Minute)
			if took > 3*time.Second {
				t.Errorf("took %s", took)
			}
			again := map[topic.Topic]bool{}
			pages := 0
			for _, m := range w.down.take() {
				switch p, _ := topic.Parse(string(m.Topic)); p.Kind {
				case topic.KindDesiredDevice, topic.KindDesiredConfigMap:
					again[m.Topic] = true
				case topic.KindSyncDesiredManifest:
					pages++
				}
			}
			want := maps.Clone(missing)
			if keep {
				maps.Copy(want, surplus)
			}
			if !maps.Equal(again, want) || pages != 11 || w.in.Repairs() != 1 {
				t.Errorf("keep %v: %d topics for %d in %d pages and %d repairs", keep, len(again), len(want), pages, w.in.Repairs())
			}
			if !keep && len(w.absent) != len(surplus) {
				t.Errorf("%d absent, want %d", len(w.absent), len(surplus))
			}
			if keep && len(w.absent) != 0 {
				t.Error("Absent was called")
			}
		})
	}
}

// The set may change between two pages.
func TestChangeBetweenPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 3 * repair.PageSize {
			w.truth[device(i)] = "x"
			w.out.Assume(device(i), []byte("x"))
		}
		w.connect()
		stop := make(chan struct{})
		go func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(7 * time.Millisecond):
					w.put(device(i*37%(4*repair.PageSize)), []string{"", "y", "z"}[i%3])
				}
			}
		}()
		time.Sleep(30 * time.Second)
		close(stop)
		synctest.Wait()
		w.settle(time.Minute)
	})
}

// A writer that believes wrongly that the other side has what it has.
func TestWrongAssumptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 10 {
			w.truth[device(i)] = "x"
			w.out.Assume(device(i), []byte("x"))
		}
		w.out.Assume(device(20), []byte("gone here"))
		w.out.Touch(device(20)) // it is the writer's to say
		w.in.Put(device(21), []byte("never heard of"))
		w.held[device(21)] = "never heard of"
		// Topics that no digest covers are in nobody's set.
		for _, tp := range []topic.Topic{topic.DesiredDigest(plant), topic.ReportedNode(plant), topic.ReportedLink(plant), "users/own"} {
			w.out.Assume(tp, []byte("x"))
			w.out.Touch(tp)
			w.in.Put(tp, []byte("x"))
		}
		w.connect()
		w.settle(time.Minute)
		if got := w.out.Assumed(plant); len(got) != 10 {
			t.Errorf("assumed %v", got)
		}
		if got := w.out.Nodes(); !slices.Equal(got, []string{plant}) {
			t.Errorf("nodes %v", got)
		}
		w.out.Reset()
		if got := w.out.Assumed(plant); len(got) != 0 {
			t.Errorf("after Reset: %v", got)
		}
		if w.out.Assumed("other") != nil {
			t.Error("topics of a node that nobody knows")
		}
	})
}

// The digest is what a repair begins with, so it must not be lost for good.
func TestDigestLost(t *testing.T) {
	isDigest := func(m client.Message) bool { return m.Topic == topic.DesiredDigest(plant) }
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		w.settle(time.Minute)
		w.down.losing(func(client.Message) bool { return true })
		w.put(device(1), "x")
		w.quiet()
		w.down.losing(nil)
		if w.equal() || !w.in.InSync(plant) {
			t.Fatal("nothing was lost")
		}
		w.settle(13 * time.Minute) // the next one comes unasked
	})
	// Refused, it is published again soon.
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.down.disturb(faults{refuse: 100})
		w.connect()
		time.Sleep(time.Minute)
		if n := count(w.down.take()); n[topic.KindDesiredDigest] < 10 || n[topic.KindDesiredDigest] > 14 {
			t.Errorf("while refused: %v", n)
		}
		w.down.disturb(faults{})
		w.settle(6 * time.Second)
		w.quiet()
		if n := w.down.take(); len(n) != 1 || !isDigest(n[0]) {
			t.Errorf("afterwards: %v", count(n))
		}
	})
}

// State that the broker refuses is not sent over and over; it comes once the
// receiver asks for it and the broker takes it.
func TestRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		w.settle(time.Minute)
		w.down.disturb(faults{refuse: 100})
		w.put(device(1), "x")
		time.Sleep(300 * time.Millisecond)
		w.down.disturb(faults{})
		if n := count(w.down.take()); n[topic.KindDesiredDevice] != 1 {
			t.Errorf("sent %v", n)
		}
		w.settle(3 * time.Second)
	})
}

// A receiver that cannot store is not hammered, and has everything soon after
// it can again.
func TestStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 20 {
			w.held[device(100+i)] = "surplus"
			w.in.Put(device(100+i), []byte("surplus"))
		}
		w.broken = true
		w.connect()
		for i := range 20 {
			w.put(device(i), "x")
		}
		time.Sleep(10 * time.Minute)
		if n := w.in.Repairs(); n < 4 || n > 12 {
			t.Errorf("%d repairs", n)
		}
		if w.holds() != 20 || w.in.InSync(plant) {
			t.Errorf("holds %d", w.holds())
		}
		w.mu.Lock()
		w.broken = false
		w.failing = func(tp topic.Topic) bool { return tp == device(7) } // not quite yet
		w.mu.Unlock()
		time.Sleep(2*time.Minute + 5*time.Second)
		if w.holds() != 19 {
			t.Errorf("holds %d", w.holds())
		}
		w.mu.Lock()
		w.failing = nil
		w.mu.Unlock()
		w.settle(2*time.Minute + 5*time.Second)
	})
}

// One that failed for a moment need not wait long: the digest behind the answer
// says that the answer is complete and that the sets still differ.
func TestStoreFailsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		w.settle(time.Minute)
		w.mu.Lock()
		w.broken = true
		w.mu.Unlock()
		w.put(device(1), "x")
		time.Sleep(2 * time.Second)
		if n := w.in.Repairs(); n != 1 {
			t.Errorf("%d repairs", n)
		}
		w.mu.Lock()
		w.broken = false
		w.mu.Unlock()
		w.settle(6 * time.Second)
		if n := w.in.Repairs(); n != 2 {
			t.Errorf("%d repairs", n)
		}
	})
}

// What a repair asked for comes, and what nobody has goes, on either side.
func TestRepairsBothWays(t *testing.T) {
	for _, keep := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, 1, keep)
			defer w.close()
			a, b, c := device(1), device(2), device(3)
			w.truth[a], w.truth[b] = "1", "2"
			w.out.Assume(a, []byte("1"))
			w.out.Assume(b, []byte("2"))
			w.held[b], w.held[c] = "2", "3"
			w.in.Put(b, []byte("2"))
			w.in.Put(c, []byte("3"))
			if w.in.Has(a) || !w.in.Has(b) || w.in.Has("x") {
				t.Error("before a repair")
			}
			w.mu.Lock()
			w.failing = func(tp topic.Topic) bool { return tp == a }
			w.mu.Unlock()
			w.connect()
			time.Sleep(time.Second)
			if w.in.Has(c) || len(w.absent) == 1 == keep {
				t.Errorf("keep %v: absent %v", keep, w.absent)
			}
			w.mu.Lock()
			w.failing = nil
			w.mu.Unlock()
			w.store(a, []byte("1"))
			if !w.inSync() {
				t.Error("after it came")
			}
			w.in.Reset()
			if w.in.Has(a) || w.in.InSync(plant) {
				t.Error("after Reset")
			}
		})
	}
}

// What a connection wanted is not wanted on the next one, and nothing is asked
// for on the word of an old digest before it had time to be replaced.
func TestNewConnectionBeginsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.truth[device(1)] = "x"
		w.out.Assume(device(1), []byte("x"))
		w.down.losing(func(m client.Message) bool { return m.Topic == device(1) })
		w.connect()
		time.Sleep(time.Second)
		if n := count(w.back.take()); n[topic.KindSyncDesiredRequest] != 2 {
			t.Fatal("not wanted")
		}
		w.down.losing(nil)
		w.hangUp()
		w.put(device(1), "") // the sets are equal by now
		w.back.take()
		w.connect()
		if w.quiet(); len(w.back.take()) > 0 || !w.inSync() {
			t.Error("a repair of the connection before went on")
		}
	})
}

// A request that nobody answered is made again when the writer shows up,
// without waiting for the end of a long pause.
func TestWriterComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.truth[device(1)] = "x"
		w.out.Assume(device(1), []byte("x"))
		d := payload.Digest{Epoch: w.epoch, Count: 1, Sum: digest.Of(string(device(1)), []byte("x"))}
		// The broker is there, the writer is not.
		w.back.losing(func(client.Message) bool { return true })
		defer w.listen()()
		w.in.Digest(plant, d)
		time.Sleep(time.Hour)
		if n := len(w.back.take()); n < 20 || n > 40 { // every two minutes at the end
			t.Errorf("asked %d times in an hour", n)
		}
		w.back.losing(nil)
		w.down.set(true)
		ctx, cancel := context.WithCancel(t.Context())
		went := make(chan error, 1)
		go func() { went <- w.out.Run(ctx, w.down) }()
		w.settle(8 * time.Second)
		cancel()
		if err := <-went; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// Equal sets need no answer: what came by itself ends a repair.
func TestRepairedByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.back.losing(func(client.Message) bool { return true })
		defer w.listen()()
		w.in.Digest(plant, payload.Digest{Count: 1, Sum: digest.Of(string(device(1)), []byte("x"))})
		time.Sleep(time.Second)
		if n := len(w.back.take()); n != 1 {
			t.Fatalf("asked %d times", n)
		}
		w.store(device(1), []byte("x"))
		time.Sleep(5 * time.Minute)
		if n := len(w.back.take()); n != 0 {
			t.Errorf("asked %d times more", n)
		}
	})
}

// Requests: what is wanted comes again as it is, what the writer does not have
// is cleared, and what is not the writer's is nobody's business.
func TestRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.put(device(1), "x")
		w.connect()
		w.settle(time.Minute)
		w.down.take()
		w.out.Request(plant, payload.SyncRequest{Want: []string{
			"desired/device/default/pump-00001", "desired/device/default/none",
			"desired/digest", "reported/node", "reported/link", "set/default/pump-1/speed", "", "#", "../other/desired/device/a/b",
		}}, "", nil)
		w.quiet()
		var got []string
		for _, m := range w.down.take() {
			if m.Topic != topic.DesiredDigest(plant) {
				got = append(got, string(m.Topic)+"="+string(m.Payload))
			}
		}
		if want := []string{string(device(1)) + "=x", "fl/plant-7/desired/device/default/none="}; !slices.Equal(got, want) {
			t.Errorf("sent %q", got)
		}
		// The answer goes to the manifest's topic alone.
		w.out.Request(plant, payload.SyncRequest{Manifest: true}, "fl/other/desired/device/a/b", []byte("1"))
		w.out.Request(plant, payload.SyncRequest{Manifest: true}, string(topic.SyncManifest(plant, topic.Reported)), []byte("2"))
		w.out.Request(plant, payload.SyncRequest{Manifest: true}, string(topic.SyncManifest(plant, topic.Desired)), []byte("3"))
		w.out.Request(plant, payload.SyncRequest{Manifest: true, After: "desired/device/default/pump-00001"}, "", []byte("4"))
		w.quiet()
		got = nil
		for _, m := range w.down.take() {
			got = append(got, string(m.Topic)+"="+string(m.CorrelationData)+" "+string(m.Payload))
			if m.Retain {
				t.Error("a manifest is retained")
			}
		}
		sum := digest.Of(string(device(1)), []byte("x")).String()
		d := `{"digest":{"epoch":"` + w.epoch + `","count":1,"sum":"` + sum + `"}`
		if want := []string{
			`fl/plant-7/sync/desired/manifest=3 ` + d + `,"topics":{"desired/device/default/pump-00001":"` + sum + `"}}`,
			`fl/plant-7/sync/desired/manifest=4 ` + d + `,"after":"desired/device/default/pump-00001","topics":{}}`,
		}; !slices.Equal(got, want) {
			t.Errorf("sent %q", got)
		}
	})
}

// Manifests that are not the answer to our request change nothing.
func TestForeignManifest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.held[device(1)] = "x"
		w.in.Put(device(1), []byte("x"))
		empty := payload.SyncManifest{Topics: map[string]digest.Hash{}}
		w.in.Manifest(plant, empty, nil)
		w.in.Manifest("other", empty, nil)
		w.back.losing(func(client.Message) bool { return true })
		defer w.listen()()
		w.in.Digest(plant, payload.Digest{Count: 5})
		time.Sleep(time.Second)
		asked := w.back.take()
		if len(asked) != 1 {
			t.Fatalf("asked %v", asked)
		}
		id := asked[0].CorrelationData
		other := repair.NewInbox(repair.InboxConfig{Direction: topic.Desired})
		w.in.Manifest(plant, empty, nil)
		w.in.Manifest(plant, empty, []byte("ask:1"))
		w.in.Manifest(plant, payload.SyncManifest{After: "desired/a"}, id)                    // another page
		w.in.Manifest(plant, payload.SyncManifest{Next: "desired/b", After: "desired/b"}, id) // for ever
		if len(w.absent) != 0 || !w.in.Has(device(1)) {
			t.Errorf("dropped %v", w.absent)
		}
		// The right one, with topics that are none of ours.
		w.in.Manifest(plant, payload.SyncManifest{Topics: map[string]digest.Hash{
			"reported/node": {1}, "desired/digest": {1}, "nonsense": {1}, "desired/device/default/a": {1},
		}, Digest: payload.Digest{Count: 4}}, id)
		time.Sleep(time.Second)
		asked = w.back.take()
		if len(asked) != 1 || string(asked[0].Payload) != `{"want":["desired/device/default/a"]}` {
			t.Errorf("asked %v", asked)
		}
		w.in.Manifest(plant, empty, id) // once more
		if len(w.absent) != 1 || w.absent[0] != device(1) {
			t.Errorf("dropped %v", w.absent)
		}
		// Two receivers do not take each other's manifests.
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- other.Run(ctx, w.back) }()
		other.Digest(plant, payload.Digest{Count: 5})
		time.Sleep(time.Second)
		if asked = w.back.take(); len(asked) != 1 || string(asked[0].CorrelationData) == string(id) {
			t.Errorf("asked %v", asked)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// busy takes everything at once, and touches a topic with every message.
type busy struct {
	*wire
	touch func()
}

func (b busy) Send(ctx context.Context, m client.Message) (<-chan error, error) {
	time.Sleep(time.Millisecond)
	b.touch()
	return b.wire.Send(ctx, m)
}

// A writer that always has something to send still tells its digest, answers
// requests, and ends with its connection.
func TestBusyWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.down.set(true)
		n := 0
		s := busy{w.down, func() {
			n++
			w.put(device(n%50), fmt.Sprint(n))
		}}
		w.put(device(0), "x")
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.out.Run(ctx, s) }()
		time.Sleep(5 * time.Second)
		w.out.Request(plant, payload.SyncRequest{Manifest: true}, "", nil)
		time.Sleep(40 * time.Second)
		got := count(w.down.take())
		if got[topic.KindDesiredDigest] < 4 || got[topic.KindDesiredDigest] > 7 || got[topic.KindSyncDesiredManifest] != 1 {
			t.Errorf("sent %v", got)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// A changing set is not taken for a different one: what is under way, or newer
// than the digest, is no reason to repair.
func TestMovingSetNeedsNoRepair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.connect()
		for i := range 2000 {
			w.put(device(i%20), fmt.Sprint(i))
			time.Sleep(50 * time.Millisecond)
		}
		w.settle(time.Minute)
		if n := w.in.Repairs(); n != 0 {
			t.Errorf("%d repairs", n)
		}
		// One that is needed is made once.
		w.down.losing(func(m client.Message) bool { return m.Topic == device(500) })
		w.put(device(500), "x")
		time.Sleep(50 * time.Millisecond)
		w.down.losing(nil)
		for i := range 2000 {
			w.put(device(i%20), fmt.Sprint(-i))
			time.Sleep(50 * time.Millisecond)
		}
		w.settle(time.Minute)
		if n := w.in.Repairs(); n != 1 {
			t.Errorf("%d repairs", n)
		}
	})
}

// The Run of a connection that ended sends nothing on the next one.
func TestOneRunAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		for i := range 1000 {
			w.put(device(i), "x")
		}
		w.down.set(true)
		first, end := context.WithCancel(t.Context())
		done := make(chan error, 2)
		go func() { done <- w.out.Run(first, busy{w.down, func() {}}) }()
		time.Sleep(10*time.Millisecond + time.Microsecond) // in the middle of a Send
		end()
		second, endSecond := context.WithCancel(t.Context())
		go func() { done <- w.out.Run(second, w.down) }()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		if n := count(w.down.take()); n[topic.KindDesiredDigest] != 1 || n[topic.KindDesiredDevice] > 1050 {
			t.Errorf("sent %v", n)
		}
		// One that waits for its turn ends with its connection.
		third, endThird := context.WithCancel(t.Context())
		go func() { done <- w.out.Run(third, w.down) }()
		endThird()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		endSecond()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}

// Sending fails: Run ends, and nothing is forgotten.
func TestSendFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, false)
		defer w.close()
		w.put(device(1), "x")
		if err := w.out.Run(t.Context(), w.down); !errors.Is(err, client.ErrOffline) {
			t.Errorf("with a topic: %v", err)
		}
		w.out.Request(plant, payload.SyncRequest{Manifest: true}, "", nil)
		if err := w.out.Run(t.Context(), w.down); !errors.Is(err, client.ErrOffline) {
			t.Errorf("with a page: %v", err)
		}
		w.in.Digest(plant, payload.Digest{Count: 1})
		if err := w.in.Run(t.Context(), w.back); !errors.Is(err, client.ErrOffline) {
			t.Errorf("with a request: %v", err)
		}
		w.connect()
		w.settle(time.Minute)
		w.hangUp()
		w.down.set(false)
		if err := w.out.Run(t.Context(), w.down); !errors.Is(err, client.ErrOffline) {
			t.Errorf("with a digest: %v", err)
		}
	})
}
