package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Options configure a broker. Dir and Authenticate are required.
type Options struct {
	// Dir is the folder of the store; it is created.
	Dir string
	// Node is the node that the broker belongs to, empty in the cloud.
	Node string
	// Authenticate decides who a client is. It is called before CONNACK, on the
	// client's goroutine.
	Authenticate func(ConnectInfo) (access.Identity, error)
	// Interceptors are asked in order.
	Interceptors []Interceptor
	// Presence is told on the core of every client that connected or left; nil
	// for nobody. It must not block.
	Presence func(id access.Identity, up bool)
	// Durability is [EdgeDurability] where it is nil.
	Durability func(topic.Topic) Durability
	// Checkpoint is how often checkpointed messages are written; 60 s where it is 0.
	Checkpoint time.Duration
	// MaxPacket bounds one packet; 4 MiB where it is 0: a ConfigMap of 1 MiB
	// with every byte escaped still fits.
	MaxPacket uint32
	// MaxClients bounds each listener's connections; 1,024 where it is 0.
	MaxClients int
	// ConnectDeadline bounds the time from accept to a complete CONNECT; 10 s
	// where it is 0.
	ConnectDeadline time.Duration
	// AllowedOrigins are the browser origins that may use the WebSocket listener
	// beside the listener's own address.
	AllowedOrigins []string
	// Store are the store's settings.
	Store store.Options
	// Metrics gets the broker's metrics; nil is none.
	Metrics prometheus.Registerer
	Logger  *slog.Logger
}

// ConnectInfo is what a client says of itself when it connects.
type ConnectInfo struct {
	Listener string // as given to Listen
	Remote   string
	Loopback bool // from this host, or in-process
	ClientID string
	Username string
	Password []byte
}

// maxBatch bounds how many publishes share one commit.
const maxBatch = 256

// receiveMaximum bounds the publishes of a client that are not acknowledged yet.
const receiveMaximum = 1024

// ErrClosed says that the broker is closed or closing.
var ErrClosed = errors.New("broker closed")

// Broker is a running broker.
type Broker struct {
	opts     Options
	log      *slog.Logger
	mqtt     *mqtt.Server
	hook     *hook
	store    *store.Store
	aside    string
	retained retained
	metrics  *metrics
	ops      chan op
	seq      atomic.Uint64 // of the newest retained message
	denied   *limiter

	stopping chan struct{} // closed by Close: no new work
	quit     chan struct{} // closed by Close when every client is gone: the core ends
	coreDone chan struct{}
	wg       sync.WaitGroup // accept loops and connections

	// The core's own.
	dirty   map[topic.Topic]struct{} // checkpointed topics not yet on the disk
	wills   map[string]*store.Will   // Wills that the store could not take or, for nil, forget
	watches []*watch

	orphans  []store.Will // of who was connected when a killed broker died
	inherit  sync.Once    // publishes them
	closing  sync.Once
	closeErr error

	mu struct {
		sync.Mutex
		closed    bool
		conns     map[string]*conn   // with CONNACK out, by client id
		claims    map[string]*client // by client id
		live      map[*client]struct{}
		listeners []func()
	}
}

// op is work for the core.
type op struct {
	msgs      []Message
	intercept bool
	// fn runs on the core and may add messages.
	fn func() []Message
	// wills to store or forget, by client id.
	putWill *store.Will
	delWill string
	// done gets the outcome once everything is durable; it must not block.
	done func(error)
}

// watch is an in-process subscription.
type watch struct {
	filter topic.Filter
	fn     func(Message)
}

// Open opens the store and starts the broker, without listeners.
func Open(o Options) (*Broker, error) {
	if o.Authenticate == nil {
		return nil, errors.New("broker: Authenticate is required")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Durability == nil {
		o.Durability = EdgeDurability
	}
	if o.Checkpoint == 0 {
		o.Checkpoint = time.Minute
	}
	if o.MaxPacket == 0 {
		o.MaxPacket = 4 << 20
	}
	if o.MaxClients == 0 {
		o.MaxClients = 1024
	}
	if o.ConnectDeadline == 0 {
		o.ConnectDeadline = 10 * time.Second
	}
	o.Store.Logger = o.Logger
	b := &Broker{
		opts: o, log: o.Logger,
		ops:      make(chan op, 1024),
		stopping: make(chan struct{}),
		quit:     make(chan struct{}),
		coreDone: make(chan struct{}),
		dirty:    map[topic.Topic]struct{}{},
		wills:    map[string]*store.Will{},
		denied:   newLimiter(),
	}
	b.mu.conns = map[string]*conn{}
	b.mu.claims = map[string]*client{}
	b.mu.live = map[*client]struct{}{}
	if err := b.openStore(); err != nil {
		return nil, err
	}
	b.metrics = newMetrics(o.Metrics, b)
	b.mqtt = mqtt.New(&mqtt.Options{
		// Routing, retained messages, sessions and acknowledgements are ours;
		// what is left to mochi is the protocol and $SYS.
		Capabilities: &mqtt.Capabilities{
			MaximumClients:               1 << 30, // each listener has its own bound
			MaximumClientWritesPending:   64,      // $SYS alone goes through mochi's queue
			MaximumSessionExpiryInterval: 0,
			MaximumPacketSize:            0, // frameConn answers an over-long packet before mochi hangs up
			ReceiveMaximum:               receiveMaximum,
			MaximumInflight:              1024,
			SharedSubAvailable:           1,
			MinimumProtocolVersion:       3,
			MaximumQos:                   2,
			RetainAvailable:              1,
			WildcardSubAvailable:         1,
			SubIDAvailable:               1,
			Compatibilities:              mqtt.Compatibilities{NoInheritedPropertiesOnAck: true},
		},
		SysTopicResendInterval: 30,
		// 1 turns mochi's write buffer off: it keeps our packets back while $SYS waits.
		ClientNetWriteBufferSize: 1,
		Logger:                   slog.New(slog.DiscardHandler), // it logs payloads; ours says what matters
	})
	b.hook = &hook{b: b}
	if err := b.mqtt.AddHook(b.hook, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("broker: %w", err), b.store.Close())
	}
	if err := b.mqtt.Serve(); err != nil {
		return nil, errors.Join(fmt.Errorf("broker: %w", err), b.store.Close())
	}
	go b.core()
	return b, nil
}

// openStore opens the store and reads it. Damage that shows only while it is
// read sets the store aside just as damage that shows when it is opened.
func (b *Broker) openStore() error {
	s, aside, err := store.Open(b.opts.Dir, b.opts.Store)
	if err != nil {
		return err
	}
	b.store, b.aside = s, aside
	b.orphans, err = b.load()
	if err == nil {
		return nil
	}
	err = errors.Join(err, s.Close())
	if !store.Corrupt(err) || b.opts.Store.FS != nil {
		return err
	}
	b.aside, err = store.SetAside(b.opts.Dir, err, b.log)
	if err != nil {
		return err
	}
	b.retained, b.orphans = retained{}, nil
	b.store, _, err = store.Open(b.opts.Dir, b.opts.Store)
	return err
}

// inheritWills publishes the Wills of those who were connected when a killed
// broker died: they are not connected now. It waits for the first way in, so
// that the interceptors are ready, and whoever comes sees the outcome.
func (b *Broker) inheritWills() {
	b.inherit.Do(func() {
		for i := range b.orphans {
			w := &b.orphans[i]
			b.enqueue(op{msgs: []Message{fromWill(w)}, intercept: true, delWill: w.ClientID, done: b.willDone(w)})
		}
		b.orphans = nil
	})
}

func (b *Broker) load() ([]store.Will, error) {
	err := b.store.EachRetained(func(r store.Retained) error {
		b.retained.put(&Message{Topic: topic.Topic(r.Topic), Payload: r.Payload, QoS: r.QoS, Retain: true, Expires: r.Expires, Props: r.Props})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b.store.Wills()
}

// SetAside names the folder that a corrupt store was renamed to, or is empty.
func (b *Broker) SetAside() string { return b.aside }

// StoreErr tells why nothing can be stored at the moment, or nil.
func (b *Broker) StoreErr() error { return b.store.Err() }

// Retained gives the retained message of a topic. The payload is not to be changed.
func (b *Broker) Retained(t topic.Topic) ([]byte, bool) {
	m, ok := b.retained.get(t)
	if !ok || m.expired(time.Now()) {
		return nil, false
	}
	return m.Payload, true
}

// RetainedMatch lists the retained messages that the filter selects, sorted by topic.
func (b *Broker) RetainedMatch(f topic.Filter) []Message {
	now := time.Now()
	var out []Message
	for _, m := range b.retained.match(f) {
		if !m.expired(now) {
			out = append(out, *m)
		}
	}
	return out
}

// Publish stores and publishes messages of the process itself, all in one
// batch, and returns when they are as durable as their topics ask for. The
// interceptors see them; access rules do not apply. Not to be called on the core.
func (b *Broker) Publish(ctx context.Context, msgs ...Message) error {
	return b.do(ctx, op{msgs: slices.Clone(msgs), intercept: true})
}

// Do runs fn on the core, between two publishes, and publishes what it returns,
// past the interceptors.
func (b *Broker) Do(ctx context.Context, fn func() []Message) error {
	return b.do(ctx, op{fn: fn})
}

// Watch calls fn on the core for every retained message that the filter
// selects, and then for every message published to it, until the returned
// function is called. A retained message that expired shows as one without
// payload. fn must not block; neither it nor whoever else is on the core may
// call Watch, Publish, Do or the returned function.
func (b *Broker) Watch(ctx context.Context, f topic.Filter, fn func(Message)) (stop func(), err error) {
	w := &watch{filter: f, fn: fn}
	err = b.Do(ctx, func() []Message {
		b.watches = append(b.watches, w)
		for _, m := range b.RetainedMatch(f) {
			fn(m)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return func() {
		_ = b.Do(context.Background(), func() []Message {
			for i, x := range b.watches {
				if x == w {
					b.watches = append(b.watches[:i:i], b.watches[i+1:]...)
					break
				}
			}
			return nil
		})
	}, nil
}

func (b *Broker) do(ctx context.Context, o op) error {
	done := make(chan error, 1)
	o.done = func(err error) { done <- err }
	select {
	case b.ops <- o:
	case <-b.stopping:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-b.coreDone:
		select {
		case err := <-done: // the core's last deed
			return err
		default:
			return ErrClosed
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enqueue hands work to the core and blocks while its queue is full: a client
// whose packets cannot be taken is simply not read from.
func (b *Broker) enqueue(o op) {
	select {
	case b.ops <- o:
	case <-b.coreDone:
	}
}

// core is the one goroutine that changes state.
func (b *Broker) core() {
	defer close(b.coreDone)
	tick := time.NewTicker(b.opts.Checkpoint)
	defer tick.Stop()
	batch := make([]op, 0, maxBatch)
	for {
		select {
		case o := <-b.ops:
			batch = b.fill(append(batch[:0], o))
			b.commit(batch)
			clear(batch)
		case <-tick.C:
			b.expire()
			b.checkpoint()
		case <-b.quit:
			for {
				if batch = b.fill(batch[:0]); len(batch) == 0 {
					b.checkpoint()
					return
				}
				b.commit(batch)
			}
		}
	}
}

// fill adds what waits already, up to a batch.
func (b *Broker) fill(batch []op) []op {
	for len(batch) < maxBatch {
		select {
		case o := <-b.ops:
			batch = append(batch, o)
		default:
			return batch
		}
	}
	return batch
}

// outcome is what became of one op.
type outcome struct {
	err    error
	out    []*Message
	stored bool // it depends on the batch
}

// before is what a batch replaced, for the case that the store refuses it.
type before struct {
	m     *Message // nil for none
	dirty bool
}

// commit runs a batch of work: intercept, store, wait for the disk, then
// acknowledge and publish.
func (b *Broker) commit(ops []op) {
	sb := b.store.NewBatch()
	sync := false
	results := make([]outcome, len(ops))
	undo := map[topic.Topic]before{}
	for i, o := range ops {
		r := &results[i]
		var also []Message
		if o.intercept {
			also, r.err = b.intercept(o.msgs)
		}
		msgs := o.msgs
		if r.err != nil {
			msgs = nil
		}
		if o.fn != nil {
			also = append(also, o.fn()...)
		}
		for _, ms := range [][]Message{msgs, also} {
			for j := range ms {
				m := &ms[j]
				if len(ms) > 1 { // the index must not keep its neighbours in memory
					m = new(Message)
					*m = ms[j]
				}
				if m.Retain {
					stored, synced := b.keep(sb, m, undo)
					r.stored, sync = r.stored || stored, sync || synced
				}
				r.out = append(r.out, m)
			}
		}
		// Unsynced, a Will would stay in the process's own memory.
		if o.putWill != nil {
			b.wills[o.putWill.ClientID], sync = o.putWill, true
		}
		if o.delWill != "" {
			b.wills[o.delWill], sync = nil, true
		}
	}
	b.putWills(sb)
	if err := b.write(sb, sync); err != nil {
		b.undo(undo)
		for i := range results {
			r := &results[i]
			if r.stored {
				if r.err == nil {
					r.err = err
				}
				r.out = nil
				continue
			}
			for _, m := range r.out { // readings do not need the disk
				if m.Retain && len(m.Payload) > 0 {
					b.retained.put(m)
					b.dirty[m.Topic] = struct{}{}
				}
			}
		}
		b.undone()
	} else {
		clear(b.wills)
	}
	for i, o := range ops {
		if o.done != nil {
			o.done(results[i].err)
		}
		for _, m := range results[i].out {
			b.route(m)
		}
	}
}

// intercept asks the interceptors about the messages of one op. When one is
// refused none is published, and what they added goes with them; only what was
// added to the refused one, its answer, remains.
func (b *Broker) intercept(msgs []Message) (also []Message, err error) {
	for i := range msgs {
		before := len(also)
		for _, ic := range b.opts.Interceptors {
			more, err := ic.Intercept(&msgs[i])
			also = append(also, more...)
			if err != nil {
				if i > 0 {
					b.undone()
				}
				return also[before:], err
			}
		}
	}
	return also, nil
}

func (b *Broker) undone() {
	for _, ic := range b.opts.Interceptors {
		if u, ok := ic.(Undoer); ok {
			u.Undone()
		}
	}
}

// write commits a batch and keeps the accounts.
func (b *Broker) write(sb *store.Batch, sync bool) error {
	empty, began := sb.Empty(), time.Now()
	err := sb.Commit(sync)
	switch {
	case err != nil:
		b.metrics.storeErrors.Inc()
	case sync && !empty:
		b.metrics.syncs.Observe(time.Since(began).Seconds())
	}
	return err
}

// putWills adds the Wills that changed; they stay noted until a commit took them.
func (b *Broker) putWills(sb *store.Batch) {
	for id, w := range b.wills {
		if w == nil {
			sb.DeleteWill(id)
		} else if err := sb.PutWill(*w); err != nil {
			b.log.Error("will not stored", "client", id, "error", err)
		}
	}
}

// keep puts a retained message into the index and, by its durability, into the
// batch. It tells whether it did the latter, and whether the batch needs a sync
// for it.
func (b *Broker) keep(sb *store.Batch, m *Message, undo map[topic.Topic]before) (stored, sync bool) {
	old, had := b.retained.get(m.Topic)
	if !had && len(m.Payload) == 0 {
		return false, false // nothing to clear
	}
	_, dirty := b.dirty[m.Topic]
	if _, seen := undo[m.Topic]; !seen {
		undo[m.Topic] = before{old, dirty}
	}
	m.seq = b.seq.Add(1)
	b.retained.put(m)
	d := b.opts.Durability(m.Topic)
	if d == Checkpoint && len(m.Payload) > 0 {
		b.dirty[m.Topic] = struct{}{}
		return false, false // a reading does not depend on the batch
	}
	delete(b.dirty, m.Topic)
	sb.PutRetained(record(m))
	return true, d == Sync
}

func record(m *Message) store.Retained {
	return store.Retained{Topic: string(m.Topic), Payload: m.Payload, QoS: m.QoS, Expires: m.Expires, Props: m.Props}
}

func (b *Broker) undo(undo map[topic.Topic]before) {
	for t, old := range undo {
		if old.m == nil {
			old.m = &Message{Topic: t} // an empty payload removes it
		}
		b.retained.put(old.m)
		if old.dirty {
			b.dirty[t] = struct{}{}
		} else {
			delete(b.dirty, t)
		}
	}
}

// checkpoint writes the readings that changed since the last one, and Wills
// that could not be written before.
func (b *Broker) checkpoint() {
	if len(b.dirty) == 0 && len(b.wills) == 0 {
		return
	}
	sb := b.store.NewBatch()
	for t := range b.dirty {
		if m, ok := b.retained.get(t); ok {
			sb.PutRetained(record(m))
		}
	}
	b.putWills(sb)
	if err := b.write(sb, true); err != nil {
		b.log.Warn("readings not checkpointed, will try again", "topics", len(b.dirty), "error", err)
		return
	}
	clear(b.dirty)
	clear(b.wills)
}

// expire removes retained messages whose time is over. Nobody is told but the
// process's own watches: for MQTT, an expiry is no message.
func (b *Broker) expire() {
	for {
		dead := b.retained.expired(time.Now(), 1024)
		if len(dead) == 0 {
			return
		}
		sb := b.store.NewBatch()
		for _, t := range dead {
			sb.PutRetained(store.Retained{Topic: string(t)})
		}
		if err := b.write(sb, false); err != nil {
			b.log.Warn("expired messages not removed from the store, will try again", "topics", len(dead), "error", err)
			return
		}
		for _, t := range dead {
			m := &Message{Topic: t, Retain: true}
			b.retained.put(m)
			delete(b.dirty, t)
			b.watched(m)
		}
	}
}

func (b *Broker) watched(m *Message) {
	for _, w := range b.watches {
		if w.filter.Match(m.Topic) {
			w.fn(*m)
		}
	}
}

// route hands a message to whoever subscribed to it. It never blocks.
func (b *Broker) route(m *Message) {
	b.watched(m)
	subs := b.mqtt.Topics.Subscribers(string(m.Topic))
	if len(subs.Shared) > 0 {
		subs.SelectShared()
		subs.MergeSharedSelected()
	}
	for id, sub := range subs.Subscriptions {
		b.mu.Lock()
		c := b.mu.conns[id]
		b.mu.Unlock()
		if c == nil || sub.NoLocal && id == m.ClientID && !c.wantsOwn(m.Topic) { // [MQTT-3.8.3-3]
			continue
		}
		c.deliver(delivery{
			m:      m,
			qos:    min(m.QoS, sub.Qos),
			retain: m.Retain && sub.RetainAsPublished, // [MQTT-3.3.1-12] [MQTT-3.3.1-13]
			subIDs: subscriptionIDs(sub.Identifiers),
		})
	}
}

// Close disconnects everybody, writes what is checkpointed and closes the store.
// It returns when all of the broker's goroutines have ended; a client that does
// not read holds it up for a second. Calling it again waits for the first call
// and gives its result.
func (b *Broker) Close() error {
	b.closing.Do(func() { b.closeErr = b.close() })
	return b.closeErr
}

func (b *Broker) close() error {
	b.mu.Lock()
	b.mu.closed = true // from here on, no listener and no connection is added
	listeners := b.mu.listeners
	live := slices.Collect(maps.Keys(b.mu.live))
	b.mu.Unlock()

	close(b.stopping)
	for _, c := range live {
		b.hangUp(c, packets.ErrServerShuttingDown)
	}
	for _, closeListener := range listeners {
		closeListener()
	}
	b.wg.Wait()
	close(b.quit)
	<-b.coreDone
	err := b.mqtt.Close()
	return errors.Join(err, b.store.Close())
}
