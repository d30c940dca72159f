package broker

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
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
	// Version is the program's, for $SYS.
	Version string
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
	// EventBytes is the size of a node's event log, beyond which the oldest events
	// are dropped; 0 is no log.
	EventBytes int64
	// EventAge is when an event is dropped from the log; 0 is never.
	EventAge time.Duration
	// MaxPacket bounds one packet; 4 MiB where it is 0: a ConfigMap of 1 MiB
	// with every byte escaped still fits.
	MaxPacket uint32
	// MaxClients bounds each listener's connections; 1,024 where it is 0.
	MaxClients int
	// MaxSessions bounds the sessions that outlive their connection; 10,000
	// where it is 0.
	MaxSessions int
	// Queue bounds the messages that wait for one such session.
	Queue QueueLimits
	// ConnectDeadline bounds the time from accept to a complete CONNECT; 10 s
	// where it is 0.
	ConnectDeadline time.Duration
	// AllowedOrigins are the browser origins that may use the WebSocket listener
	// beside the listener's own address.
	AllowedOrigins []string
	// TLS has the certificate of the mqtts and wss listeners. Their protocols are
	// set for it, and TLS 1.2 at least.
	TLS *tls.Config
	// Store are the store's settings.
	Store store.Options
	// Metrics gets the broker's metrics; nil is none.
	Metrics prometheus.Registerer
	Logger  *slog.Logger
}

// QueueLimits bound what waits in the store for one session, delivered or not,
// until its client acknowledges it. When a limit is reached the oldest messages
// are dropped and counted, or, for publishers on a listener that says
// queue-full=refuse, the new message is refused with 0x97.
type QueueLimits struct {
	Messages int   // 100,000 where it is 0
	Bytes    int64 // 64 MiB where it is 0
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

// maxBatch bounds how many operations share one commit.
const maxBatch = 1024

// receiveMaximum bounds the publishes of a client that are not acknowledged yet.
const receiveMaximum = 1024

// ErrClosed says that the broker is closed or closing.
var ErrClosed = errors.New("broker closed")

// Broker is a running broker.
type Broker struct {
	opts     Options
	log      *slog.Logger
	mqtt     *mqtt.Server
	store    *store.Store
	aside    string
	retained retained
	metrics  *metrics
	stats    stats
	inbox    inbox
	events   *events
	denied   *limiter

	stopping chan struct{} // closed by Close: no new work
	quit     chan struct{} // closed by Close when every client is gone: the core ends
	coreDone chan struct{}
	wg       sync.WaitGroup // accept loops and connections

	// The core's own.
	seq      uint64                   // of the newest retained message
	dirty    map[topic.Topic]struct{} // checkpointed topics not yet on the disk
	wills    map[string]*store.Will   // Wills that the store could not take or, for nil, forget
	watches  []*watch
	sessions map[string]*session // by client id
	stored   int                 // of them in the store
	lastNum  uint64              // the newest session's
	subs     subscriptions
	levels   []*level // scratch of match
	hits     uint64   // messages matched
	tx       tx
	alarm    *time.Timer // for what happens by itself
	alarmAt  time.Time
	sys      sys

	orphans  []store.Will // of who was connected when a killed broker died
	inherit  sync.Once    // publishes them
	closing  sync.Once
	closeErr error

	mu struct {
		sync.Mutex
		closed    bool
		claims    map[string]*conn // by client id
		live      map[*conn]struct{}
		listeners []func()
	}
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
	if o.MaxSessions == 0 {
		o.MaxSessions = 10000
	}
	if o.Queue.Messages == 0 {
		o.Queue.Messages = 100000
	}
	if o.Queue.Bytes == 0 {
		o.Queue.Bytes = 64 << 20
	}
	if o.ConnectDeadline == 0 {
		o.ConnectDeadline = 10 * time.Second
	}
	o.Store.Logger = o.Logger
	b := &Broker{
		opts: o, log: o.Logger,
		stopping: make(chan struct{}),
		quit:     make(chan struct{}),
		coreDone: make(chan struct{}),
		dirty:    map[topic.Topic]struct{}{},
		wills:    map[string]*store.Will{},
		sessions: map[string]*session{},
		denied:   newLimiter(),
	}
	b.inbox.init()
	b.mu.claims = map[string]*conn{}
	b.mu.live = map[*conn]struct{}{}
	b.events = newEvents(b)
	if err := b.openStore(); err != nil {
		return nil, err
	}
	b.metrics = newMetrics(o.Metrics, b)
	b.events.register(o.Metrics)
	b.mqtt = mqtt.New(&mqtt.Options{
		// mochi reads, checks and decodes what clients send. It is not served:
		// connections, routing, sessions and acknowledgements are ours.
		Capabilities: &mqtt.Capabilities{
			MaximumClientWritesPending:   1,
			MaximumSessionExpiryInterval: store.NeverExpires,
			MaximumPacketSize:            0, // frameConn answers an over-long packet before mochi hangs up
			ReceiveMaximum:               receiveMaximum,
			MaximumInflight:              1<<16 - 1,
			SharedSubAvailable:           1,
			MinimumProtocolVersion:       3,
			MaximumQos:                   2,
			RetainAvailable:              1,
			WildcardSubAvailable:         1,
			SubIDAvailable:               1,
		},
		SysTopicResendInterval:  1,
		ClientNetReadBufferSize: readBuffer,
		Logger:                  slog.New(slog.DiscardHandler), // it logs payloads; ours says what matters
	})
	b.alarm = time.NewTimer(time.Hour)
	b.alarm.Stop()
	b.sys.began = time.Now()
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
	b.retained, b.orphans, b.sessions, b.subs = retained{}, nil, map[string]*session{}, subscriptions{}
	b.events = newEvents(b)
	b.store, _, err = store.Open(b.opts.Dir, b.opts.Store)
	return err
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
	o := op{intercept: true}
	for i := range msgs {
		m := msgs[i]
		o.msgs = append(o.msgs, &m)
	}
	return b.do(ctx, o)
}

// Do runs fn on the core, between two publishes, and publishes what it returns,
// past the interceptors.
func (b *Broker) Do(ctx context.Context, fn func() []Message) error {
	return b.do(ctx, op{fn: func(t *tx, r *result) { t.add(r, fn()) }})
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
	b.seq++
	m.seq = b.seq
	b.retained.put(m)
	d := b.durability(m.Topic)
	if d == memory {
		return false, false
	}
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
	if len(b.dirty) > 0 {
		rs := make([]store.Retained, 0, len(b.dirty))
		for t := range b.dirty {
			if m, ok := b.retained.get(t); ok {
				rs = append(rs, record(m))
			}
		}
		began := time.Now()
		if err := b.store.Checkpoint(rs); err != nil {
			b.metrics.storeErrors.Inc()
			b.log.Warn("readings not checkpointed, will try again", "topics", len(b.dirty), "error", err)
		} else {
			b.metrics.syncs.Observe(time.Since(began).Seconds())
			clear(b.dirty)
		}
	}
	if len(b.wills) > 0 {
		sb := b.store.NewBatch()
		b.putWills(sb)
		if err := b.write(sb, true); err != nil {
			b.log.Warn("wills not stored, will try again", "clients", len(b.wills), "error", err)
			return
		}
		clear(b.wills)
	}
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
	return b.store.Close()
}
