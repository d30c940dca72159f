package broker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
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
	// Durability is [EdgeDurability] where it is nil.
	Durability func(topic.Topic) Durability
	// Checkpoint is how often checkpointed messages are written; 60 s where it is 0.
	Checkpoint time.Duration
	// MaxPacket bounds one packet; 4 MiB where it is 0: a ConfigMap of 1 MiB
	// with every byte escaped still fits.
	MaxPacket uint32
	// MaxClients bounds each listener's connections; 1,024 where it is 0.
	MaxClients int
	// AllowedOrigins are the browser origins that may use the WebSocket listener
	// beside the listener's own host.
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
	denied   *limiter

	stopping chan struct{} // closed by Close: no new work
	quit     chan struct{} // closed by Close when every client is gone: the core ends
	coreDone chan struct{}
	wg       sync.WaitGroup // accept loops and connections

	// The core's own.
	dirty   map[topic.Topic]struct{} // checkpointed topics not yet on the disk
	watches []*watch

	mu struct {
		sync.Mutex
		closed    bool
		conns     map[string]*conn // by client id
		listeners []interface{ Close() error }
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
	o.Store.Logger = o.Logger
	s, aside, err := store.Open(o.Dir, o.Store)
	if err != nil {
		return nil, err
	}
	b := &Broker{
		opts: o, log: o.Logger, store: s, aside: aside,
		ops:      make(chan op, 1024),
		stopping: make(chan struct{}),
		quit:     make(chan struct{}),
		coreDone: make(chan struct{}),
		dirty:    map[topic.Topic]struct{}{},
		denied:   newLimiter(),
	}
	b.mu.conns = map[string]*conn{}
	b.metrics = newMetrics(o.Metrics, b)
	wills, err := b.load()
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	b.mqtt = mqtt.New(&mqtt.Options{
		// Routing, retained messages, sessions and acknowledgements are ours;
		// what is left to mochi is the protocol and $SYS.
		Capabilities: &mqtt.Capabilities{
			MaximumClients:               1 << 30, // each listener has its own bound
			MaximumClientWritesPending:   64,      // $SYS alone goes through mochi's queue
			MaximumSessionExpiryInterval: 0,
			MaximumPacketSize:            0, // frameConn answers an over-long packet before mochi hangs up
			ReceiveMaximum:               1024,
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
		Logger:                 slog.New(slog.DiscardHandler), // it logs payloads; ours says what matters
	})
	b.hook = &hook{b: b}
	if err := b.mqtt.AddHook(b.hook, nil); err != nil {
		return nil, errors.Join(fmt.Errorf("broker: %w", err), s.Close())
	}
	if err := b.mqtt.Serve(); err != nil {
		return nil, errors.Join(fmt.Errorf("broker: %w", err), s.Close())
	}
	go b.core()
	// Whoever was connected when a killed broker died is not connected now.
	for _, w := range wills {
		b.enqueue(op{
			msgs:    []Message{{Topic: topic.Topic(w.Topic), Payload: w.Payload, QoS: w.QoS, Retain: w.Retain, ClientID: w.ClientID}},
			delWill: w.ClientID,
		})
	}
	return b, nil
}

func (b *Broker) load() ([]store.Will, error) {
	now := time.Now()
	err := b.store.EachRetained(func(r store.Retained) error {
		m := &Message{Topic: topic.Topic(r.Topic), Payload: r.Payload, QoS: r.QoS, Retain: true, Expires: r.Expires, Props: r.Props}
		if !m.expired(now) {
			b.retained.put(m)
		}
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
	if !ok {
		return nil, false
	}
	return m.Payload, true
}

// RetainedMatch lists the retained messages that the filter selects, sorted by topic.
func (b *Broker) RetainedMatch(f topic.Filter) []Message {
	ms := b.retained.match(f)
	out := make([]Message, len(ms))
	for i, m := range ms {
		out[i] = *m
	}
	return out
}

// Publish stores and publishes messages of the process itself, all in one
// batch, and returns when they are as durable as their topics ask for. The
// interceptors see them; access rules do not apply. Not to be called on the core.
func (b *Broker) Publish(ctx context.Context, msgs ...Message) error {
	return b.do(ctx, op{msgs: msgs, intercept: true})
}

// Do runs fn on the core, between two publishes, and publishes what it returns,
// past the interceptors.
func (b *Broker) Do(ctx context.Context, fn func() []Message) error {
	return b.do(ctx, op{fn: fn})
}

// Watch calls fn on the core for every retained message that the filter
// selects, and then for every message published to it, until the returned
// function is called. fn must not block.
func (b *Broker) Watch(ctx context.Context, f topic.Filter, fn func(Message)) (stop func(), err error) {
	w := &watch{filter: f, fn: fn}
	err = b.Do(ctx, func() []Message {
		b.watches = append(b.watches, w)
		for _, m := range b.retained.match(f) {
			fn(*m)
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
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enqueue hands work to the core and blocks while its queue is full: a client
// whose packets cannot be taken is simply not read from.
func (b *Broker) enqueue(o op) bool {
	select {
	case b.ops <- o:
		return true
	case <-b.coreDone:
		return false
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

// commit runs a batch of work: intercept, store, wait for the disk, then
// acknowledge and publish.
func (b *Broker) commit(ops []op) {
	sb := b.store.NewBatch()
	sync := false
	results := make([]struct {
		err error
		out []*Message
	}, len(ops))
	undo := map[topic.Topic]*Message{} // what the batch replaced, for a failed commit
	for i, o := range ops {
		r := &results[i]
		var also []Message
		msgs := o.msgs
		for j := range msgs {
			if !o.intercept || r.err != nil {
				continue
			}
			for _, ic := range b.opts.Interceptors {
				more, err := ic.Intercept(&msgs[j])
				also = append(also, more...)
				if err != nil {
					r.err = err
					break
				}
			}
		}
		if r.err != nil {
			msgs = nil
		}
		if o.fn != nil {
			also = append(also, o.fn()...)
		}
		for _, ms := range [][]Message{msgs, also} {
			for j := range ms {
				m := &ms[j]
				if m.Retain && b.keep(sb, m, undo) {
					sync = true
				}
				r.out = append(r.out, m)
			}
		}
		if o.putWill != nil {
			if err := sb.PutWill(*o.putWill); err != nil {
				b.log.Error("will not stored", "client", o.putWill.ClientID, "error", err)
			}
		}
		if o.delWill != "" {
			sb.DeleteWill(o.delWill)
		}
	}
	var failed error
	if !sb.Empty() {
		began := time.Now()
		failed = sb.Commit(sync)
		if sync {
			b.metrics.syncs.Observe(time.Since(began).Seconds())
		}
	} else {
		_ = sb.Commit(false)
	}
	if failed != nil {
		b.metrics.storeErrors.Inc()
		b.rollback(undo)
	}
	for i, o := range ops {
		r := results[i]
		if failed != nil && needsStore(r.out) {
			if r.err == nil {
				r.err = failed
			}
			r.out = nil
		}
		if o.done != nil {
			o.done(r.err)
		}
		for _, m := range r.out {
			b.route(m)
		}
	}
}

func needsStore(out []*Message) bool {
	for _, m := range out {
		if m.Retain {
			return true
		}
	}
	return false
}

// keep puts a retained message into the index and, by its durability, into the
// batch. It tells whether the batch needs a sync for it.
func (b *Broker) keep(sb *store.Batch, m *Message, undo map[topic.Topic]*Message) (sync bool) {
	old, had := b.retained.get(m.Topic)
	if !had && len(m.Payload) == 0 {
		return false // nothing to clear
	}
	if _, seen := undo[m.Topic]; !seen {
		undo[m.Topic] = old
	}
	b.retained.put(m)
	d := b.opts.Durability(m.Topic)
	if d == Checkpoint && len(m.Payload) > 0 {
		b.dirty[m.Topic] = struct{}{}
		delete(undo, m.Topic) // a reading does not depend on the batch
		return false
	}
	delete(b.dirty, m.Topic)
	sb.PutRetained(stored(m))
	return d == Sync
}

func stored(m *Message) store.Retained {
	return store.Retained{Topic: string(m.Topic), Payload: m.Payload, QoS: m.QoS, Expires: m.Expires, Props: m.Props}
}

func (b *Broker) rollback(undo map[topic.Topic]*Message) {
	for t, old := range undo {
		if old == nil {
			old = &Message{Topic: t} // an empty payload removes it
		}
		b.retained.put(old)
	}
}

// checkpoint writes the readings that changed since the last one.
func (b *Broker) checkpoint() {
	if len(b.dirty) == 0 {
		return
	}
	sb := b.store.NewBatch()
	for t := range b.dirty {
		if m, ok := b.retained.get(t); ok {
			sb.PutRetained(stored(m))
		}
	}
	if err := sb.Commit(true); err != nil {
		b.metrics.storeErrors.Inc()
		b.log.Warn("readings not checkpointed, will try again", "topics", len(b.dirty), "error", err)
		return
	}
	clear(b.dirty)
}

// expire removes retained messages whose time is over.
func (b *Broker) expire() {
	now := time.Now()
	var dead []Message
	for _, m := range b.retained.match("#") {
		if m.expired(now) {
			dead = append(dead, Message{Topic: m.Topic, Retain: true})
		}
	}
	if len(dead) > 0 {
		sb := b.store.NewBatch()
		for i := range dead {
			b.keep(sb, &dead[i], map[topic.Topic]*Message{})
		}
		if err := sb.Commit(false); err != nil {
			b.log.Warn("expired messages not removed from the store", "error", err)
		}
	}
}

// route hands a message to whoever subscribed to it. It never blocks.
func (b *Broker) route(m *Message) {
	for _, w := range b.watches {
		if w.filter.Match(m.Topic) {
			w.fn(*m)
		}
	}
	subs := b.mqtt.Topics.Subscribers(string(m.Topic))
	if len(subs.Shared) > 0 {
		subs.SelectShared()
		subs.MergeSharedSelected()
	}
	for id, sub := range subs.Subscriptions {
		if sub.NoLocal && id == m.ClientID { // [MQTT-3.8.3-3]
			continue
		}
		b.mu.Lock()
		c := b.mu.conns[id]
		b.mu.Unlock()
		if c == nil {
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
func (b *Broker) Close() error {
	b.mu.Lock()
	if b.mu.closed {
		b.mu.Unlock()
		return nil
	}
	b.mu.closed = true
	listeners := b.mu.listeners
	b.mu.Unlock()

	close(b.stopping)
	for _, l := range listeners {
		_ = l.Close()
	}
	for _, cl := range b.mqtt.Clients.GetAll() {
		if !cl.Net.Inline {
			go b.goodbye(cl)
		}
	}
	b.wg.Wait()
	close(b.quit)
	<-b.coreDone
	err := b.mqtt.Close()
	return errors.Join(err, b.store.Close())
}
