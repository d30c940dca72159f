package repair_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const plant = "plant-7"

// latency is the way from one side to the other and back, in the bubble's time.
const latency = 20 * time.Millisecond

// faults are the odds of what may happen to a message, in percent.
type faults struct {
	lose      int // acknowledged and gone: a broker that dropped it
	refuse    int // refused by the broker
	duplicate int
	reorder   int // delayed by up to three seconds
}

// wire carries messages both ways between a writer and a receiver, in the
// bubble's time. Without faults it keeps their order.
type wire struct {
	rng     *rand.Rand
	deliver func(client.Message)
	done    chan struct{}
	wg      sync.WaitGroup

	mu     sync.Mutex
	up     bool
	faults faults
	last   time.Time
	queue  []parcel
	wake   chan struct{}
	sent   []client.Message
	drop   func(client.Message) bool // which to lose, beside the faults
	budget *budget                   // nil is no bound
}

// budget is what a proxy lets through both ways before it cuts the connection.
type budget struct {
	mu   sync.Mutex
	left int
	cut  chan struct{} // closed when it is spent
}

func newBudget(bytes int) *budget { return &budget{left: bytes, cut: make(chan struct{})} }

func (b *budget) take(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < 0 {
		return false
	}
	if b.left -= n; b.left < 0 {
		close(b.cut)
	}
	return b.left >= 0
}

type parcel struct {
	at  time.Time
	m   client.Message
	ack chan error
	err error // refused
}

func newWire(seed uint64, deliver func(client.Message)) *wire {
	w := &wire{rng: rand.New(rand.NewPCG(seed, 2)), deliver: deliver, done: make(chan struct{}), wake: make(chan struct{}, 1)}
	w.wg.Go(w.pump)
	return w
}

func (w *wire) stop() {
	close(w.done)
	w.wg.Wait()
}

// Send implements repair.Sender.
func (w *wire) Send(_ context.Context, m client.Message) (<-chan error, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.up {
		return nil, client.ErrOffline
	}
	// A packet has some 20 bytes beside topic and payload, and an answer of 4.
	if w.budget != nil && !w.budget.take(len(m.Topic)+len(m.Payload)+24) {
		w.up = false // what is under way, and the answers to it, are lost
		w.dropLocked()
		return nil, client.ErrOffline
	}
	w.sent = append(w.sent, m)
	p := parcel{m: m, ack: make(chan error, 1)}
	if w.chance(w.faults.refuse) {
		p.err = &client.Refused{Code: 0x97, Reason: "test"}
	}
	if w.chance(w.faults.lose) || w.drop != nil && w.drop(m) {
		p.ack <- p.err
		return p.ack, nil
	}
	w.enqueue(p)
	if w.chance(w.faults.duplicate) {
		w.enqueue(parcel{m: m, ack: make(chan error, 1), err: p.err})
	}
	return p.ack, nil
}

func (w *wire) chance(percent int) bool { return w.rng.IntN(100) < percent }

func (w *wire) enqueue(p parcel) {
	p.at = time.Now().Add(latency)
	if w.chance(w.faults.reorder) {
		p.at = p.at.Add(time.Duration(w.rng.IntN(3000)) * time.Millisecond)
	} else {
		if p.at.Before(w.last) {
			p.at = w.last
		}
		w.last = p.at
	}
	i := len(w.queue)
	for i > 0 && w.queue[i-1].at.After(p.at) {
		i--
	}
	w.queue = slices.Insert(w.queue, i, p)
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *wire) pump() {
	for {
		wait := time.Hour
		w.mu.Lock()
		if len(w.queue) > 0 {
			p := w.queue[0]
			if wait = time.Until(p.at); wait <= 0 {
				w.queue = w.queue[1:]
				w.mu.Unlock()
				if p.err == nil {
					w.deliver(p.m)
				}
				p.ack <- p.err
				continue
			}
		}
		w.mu.Unlock()
		timer := time.NewTimer(wait)
		select {
		case <-w.done:
			timer.Stop()
			return
		case <-w.wake:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// set brings the wire up or down; what is under way when it goes down is lost.
func (w *wire) set(up bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.up = up
	if !up {
		w.dropLocked()
	}
}

func (w *wire) dropLocked() {
	for _, p := range w.queue {
		p.ack <- client.ErrLost
	}
	w.queue = nil
}

func (w *wire) disturb(f faults) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = f
}

// losing says which messages get lost from now on.
func (w *wire) losing(drop func(client.Message) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.drop = drop
}

// take gives what was sent since it was asked last.
func (w *wire) take() []client.Message {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.sent
	w.sent = nil
	return s
}

// world is a writer and a receiver of the desired direction with a wire
// between them.
type world struct {
	t    *testing.T
	out  *repair.Outbox
	in   *repair.Inbox
	down *wire // writer to receiver
	back *wire // receiver to writer
	keep bool  // the receiver leaves it to the writer to clear what is absent

	// mu guards what follows, and out and in against the wires: a message that is
	// on its way when a side restarts reaches the old one or the new one.
	mu      sync.Mutex
	truth   map[topic.Topic]string
	held    map[topic.Topic]string
	epoch   string
	clock   time.Duration // how far the writer's clock is off
	broken  bool          // the receiver's store
	failing func(topic.Topic) bool
	absent  []topic.Topic

	hangUp func()
}

func newWorld(t *testing.T, seed uint64, keep bool) *world {
	w := &world{t: t, keep: keep, truth: map[topic.Topic]string{}, held: map[topic.Topic]string{}, hangUp: func() {}}
	w.down = newWire(seed, w.receive)
	w.back = newWire(seed+1, w.answer)
	w.newOutbox()
	w.newInbox()
	return w
}

// close ends the world. It is no Cleanup: a bubble wants it before it ends.
func (w *world) close() {
	w.hangUp()
	w.down.stop()
	w.back.stop()
}

func (w *world) newOutbox() {
	epoch := repair.NewEpoch()
	out := repair.NewOutbox(repair.OutboxConfig{
		Direction: topic.Desired, Epoch: epoch, Logger: slog.New(slog.DiscardHandler),
		Get: func(t topic.Topic) ([]byte, bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			p, ok := w.truth[t]
			return []byte(p), ok
		},
	})
	out.AddNode(plant)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.out, w.epoch = out, epoch
}

// ends gives both sides to the wires' goroutines.
func (w *world) ends() (*repair.Outbox, *repair.Inbox) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.out, w.in
}

func (w *world) newInbox() {
	c := repair.InboxConfig{Direction: topic.Desired, Logger: slog.New(slog.DiscardHandler)}
	if !w.keep {
		c.Absent = func(ts []topic.Topic) {
			w.mu.Lock()
			w.absent = append(w.absent, ts...)
			w.mu.Unlock()
			for _, t := range ts {
				w.store(t, nil)
			}
		}
	}
	in := repair.NewInbox(c)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.in = in
}

// receive is the receiver's message handler.
func (w *world) receive(m client.Message) {
	p, err := topic.Parse(string(m.Topic))
	if err != nil {
		w.t.Errorf("sent to %q: %v", m.Topic, err)
		return
	}
	_, in := w.ends()
	switch p.Kind {
	case topic.KindDesiredDigest:
		var d payload.Digest
		if err := payload.Decode(m.Payload, &d); err != nil {
			w.t.Error(err)
		}
		in.Digest(p.Node, d)
	case topic.KindSyncDesiredManifest:
		var sm payload.SyncManifest
		if err := payload.Decode(m.Payload, &sm); err != nil {
			w.t.Error(err)
		}
		in.Manifest(p.Node, sm, m.CorrelationData)
	default:
		if !m.Retain || m.QoS != 1 {
			w.t.Errorf("%s: retain %v, QoS %d", m.Topic, m.Retain, m.QoS)
		}
		w.mu.Lock()
		held, ok := w.held[m.Topic]
		w.mu.Unlock()
		if ok && !in.Accepts(m.Topic, []byte(held), m.Payload) {
			return
		}
		w.store(m.Topic, m.Payload)
	}
}

func (w *world) store(t topic.Topic, p []byte) {
	w.mu.Lock()
	if w.broken || w.failing != nil && w.failing(t) {
		w.mu.Unlock()
		return
	}
	if len(p) == 0 {
		delete(w.held, t)
	} else {
		w.held[t] = string(p)
	}
	in := w.in
	w.mu.Unlock()
	in.Put(t, p)
}

// answer is the writer's message handler.
func (w *world) answer(m client.Message) {
	p, err := topic.Parse(string(m.Topic))
	if err != nil || p.Kind != topic.KindSyncDesiredRequest || m.Retain {
		w.t.Errorf("request on %q: %v", m.Topic, err)
		return
	}
	var r payload.SyncRequest
	if err := payload.Decode(m.Payload, &r); err != nil {
		w.t.Error(err)
	}
	out, _ := w.ends()
	out.Request(p.Node, r, m.ResponseTopic, m.CorrelationData)
}

// connect brings the wires up and runs both ends until hangUp.
func (w *world) connect() {
	w.hangUp()
	w.down.set(true)
	w.back.set(true)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	out, in := w.out, w.in
	wg.Go(func() { _ = out.Run(ctx, w.down) })
	wg.Go(func() { _ = in.Run(ctx, w.back) })
	w.hangUp = func() {
		cancel()
		w.down.set(false)
		w.back.set(false)
		wg.Wait()
		w.hangUp = func() {}
	}
}

// listen brings the wire from the receiver up and runs the receiver alone.
func (w *world) listen() (stop func()) {
	w.back.set(true)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = w.in.Run(ctx, w.back) }()
	return func() { cancel(); <-done }
}

// put changes the truth; an empty payload deletes.
func (w *world) put(t topic.Topic, p string) {
	w.mu.Lock()
	if p == "" {
		delete(w.truth, t)
	} else {
		w.truth[t] = p
	}
	w.mu.Unlock()
	w.out.Touch(t)
}

// write gives a topic another value, under the rev that follows.
func (w *world) write(t topic.Topic, uid string, v int) {
	w.mu.Lock()
	var was struct {
		Rev int64 `json:"rev"`
	}
	_ = json.Unmarshal([]byte(w.truth[t]), &was) // nothing is rev 0
	rev := payload.NextRev(was.Rev, time.Now().Add(w.clock))
	w.mu.Unlock()
	w.put(t, fmt.Sprintf(`{"uid":%q,"rev":%d,"v":%d}`, uid, rev, v))
}

// restoreWriter begins a writer anew with what it had at some time. assume: it
// reads that from its broker, which was restored as well; otherwise its broker
// is empty.
func (w *world) restoreWriter(truth map[topic.Topic]string, assume bool) {
	w.mu.Lock()
	w.truth = maps.Clone(truth)
	w.mu.Unlock()
	w.newOutbox()
	for tp, p := range truth {
		if assume {
			w.out.Assume(tp, []byte(p))
		}
		w.out.Touch(tp)
	}
}

// restoreReceiver begins a receiver anew with what it held at some time.
func (w *world) restoreReceiver(held map[topic.Topic]string) {
	w.newInbox()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held = maps.Clone(held)
	for tp, p := range w.held {
		w.in.Put(tp, []byte(p))
	}
}

func (w *world) snapshot() (truth, held map[topic.Topic]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.truth), maps.Clone(w.held)
}

// equal tells whether the receiver holds just the truth.
func (w *world) equal() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Equal(w.truth, w.held)
}

func (w *world) holds() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.held)
}

func (w *world) inSync() bool { return w.equal() && w.in.InSync(plant) }

// settle lets time pass until both sides agree; it tells how long it took.
func (w *world) settle(within time.Duration) time.Duration {
	w.t.Helper()
	began := time.Now()
	for !w.inSync() || w.out.Pending() > 0 {
		if time.Since(began) > within {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.t.Fatalf("not equal after %s: %d topics of %d, in sync %v", within, len(w.held), len(w.truth), w.in.InSync(plant))
		}
		time.Sleep(10 * time.Millisecond) // the bubble's time
	}
	return time.Since(began)
}

// quiet lets everything that is under way arrive.
func (w *world) quiet() { time.Sleep(time.Minute) }

func device(i int) topic.Topic {
	return topic.DesiredDevice(plant, "default", fmt.Sprintf("pump-%05d", i))
}

// count counts the messages by kind.
func count(ms []client.Message) map[topic.Kind]int {
	n := map[topic.Kind]int{}
	for _, m := range ms {
		p, _ := topic.Parse(string(m.Topic))
		n[p.Kind]++
	}
	return n
}
