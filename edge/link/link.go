// Package link joins a node's own bus to the cloud broker. It dials out, mirrors
// fl/<node>/desired/# down and fl/<node>/reported/# up, and repairs both with
// digests. Equal digests at a reconnect mean that nothing is sent at all.
//
//	l, err := link.New(link.Config{Node: "plant-7", URL: "mqtt://cloud:1883", Token: tok}, b)
//	err = l.Run(ctx)
//
// One connection carries both directions: our broker and any conforming one keep
// the packet ids of the directions apart, and one keepalive is half the traffic
// of two.
package link

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/repair"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Config configures the link.
type Config struct {
	Node string
	// URL is the cloud broker's address, as client.ParseURL reads it, and TLS for
	// mqtts and wss; nil trusts the system's roots. Over TLS and WebSocket the
	// link is compressed, where the broker knows how.
	URL string
	TLS *tls.Config
	// Token is the node's credential.
	Token string
	// KeepAlive is the client's; 30 s where it is 0.
	KeepAlive time.Duration
	// Agent is the version that reported/link carries.
	Agent string
	// Host says there on which machine the agent runs, for a person who has to
	// tell two agents of one name apart.
	Host    string
	Metrics prometheus.Registerer // nil is none
	Logger  *slog.Logger

	minBackoff, maxBackoff time.Duration // the client's, in tests
}

// Link is the connection to the cloud.
type Link struct {
	cfg Config
	log *slog.Logger
	bus *broker.Broker
	c   *client.Client
	out *repair.Outbox
	in  *repair.Inbox
	ev  *replay

	// epoch names the numbering of the node's digests, and this agent among all
	// that have the node's name.
	epoch     string
	taken     atomic.Bool   // the last connection was taken over
	takeovers atomic.Uint64 // of our connections by another agent
	waiting   atomic.Bool   // on standby

	since atomic.Int64   // when the present connection was begun
	wg    sync.WaitGroup // the goroutines of the present connection

	// shown orders what the bus is told of the link: "online" comes from a
	// goroutine that may be late.
	shown  sync.Mutex
	online bool // guarded by shown
}

// New checks the configuration. It does not dial.
func New(cfg Config, bus *broker.Broker) (*Link, error) {
	l := &Link{cfg: cfg, log: cfg.Logger, bus: bus, epoch: repair.NewEpoch()}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	l.out = repair.NewOutbox(repair.OutboxConfig{
		Direction: topic.Reported, Epoch: l.epoch, Get: bus.Retained, Logger: l.log,
	})
	l.out.AddNode(cfg.Node)
	l.in = repair.NewInbox(repair.InboxConfig{Direction: topic.Desired, Absent: l.absent, Logger: l.log})
	n := cfg.Node
	d, err := client.ParseURL(cfg.URL, cfg.TLS)
	if err != nil {
		return nil, err
	}
	l.c, err = client.New(client.Config{
		URL: d.String(), Dial: d.DialCompressed, ClientID: "fairlead-edge", Username: n, Password: cfg.Token, KeepAlive: cfg.KeepAlive,
		Will: func() *client.Message {
			l.since.Store(payload.Millis(time.Now()))
			return &client.Message{Topic: topic.ReportedLink(n), QoS: 1, Retain: true, Payload: l.status(false)}
		},
		Subscriptions: []client.Subscription{
			// Live changes only; what was missed shows in the digest, which alone
			// is wanted at once.
			{Filter: topic.Desired.All(n), QoS: 1, RetainHandling: 2},
			{Filter: topic.Filter(topic.DesiredDigest(n)), QoS: 1},
			{Filter: topic.OfKind(n, topic.KindSyncDesiredManifest), QoS: 1},
			{Filter: topic.OfKind(n, topic.KindSyncReportedRequest), QoS: 1},
			{Filter: topic.OfKind(n, topic.KindReportedLink), QoS: 1, RetainHandling: 2},
		},
		OnMessages: l.messages,
		Hold:       l.standby,
		OnUp:       l.up,
		OnDown:     l.down,
		MinBackoff: cfg.minBackoff, MaxBackoff: cfg.maxBackoff,
		Logger: l.log,
	})
	if err != nil {
		return nil, err
	}
	l.ev = newReplay(l)
	if cfg.Metrics != nil {
		cfg.Metrics.MustRegister(
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fairlead_link_up", Help: "1 while the cloud broker is connected."}, func() float64 {
				if l.c.Connected() {
					return 1
				}
				return 0
			}),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fairlead_link_outbox_topics", Help: "Reported topics that wait to be sent."}, func() float64 {
				return float64(l.out.Pending())
			}),
			prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "fairlead_link_repairs_total", Help: "Repairs of the desired state begun."}, func() float64 {
				return float64(l.in.Repairs())
			}),
			prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "fairlead_link_requests_dropped_total", Help: "Topics and pages that the cloud asked for beyond the bound of what may wait."}, func() float64 {
				return float64(l.out.Dropped())
			}),
			prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "fairlead_link_takeovers_total", Help: "Connections that another agent with this node's name took over."}, func() float64 {
				return float64(l.takeovers.Load())
			}),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "fairlead_link_standby", Help: "1 while another agent with this node's name has the link."}, func() float64 {
				if l.waiting.Load() {
					return 1
				}
				return 0
			}),
		)
	}
	return l, nil
}

// Connected tells whether the link is up.
func (l *Link) Connected() bool { return l.c.Connected() }

// InSync tells whether the node holds what the cloud's digest says.
func (l *Link) InSync() bool { return l.in.InSync(l.cfg.Node) }

func (l *Link) status(online bool) []byte {
	return payload.Encode(payload.Link{Online: online, Since: l.since.Load(), Agent: l.cfg.Agent, Epoch: l.epoch, Host: l.cfg.Host})
}

// Run keeps the link until ctx ends, then says goodbye.
func (l *Link) Run(ctx context.Context) error {
	for _, m := range l.bus.RetainedMatch(topic.Desired.All(l.cfg.Node)) {
		l.in.Put(m.Topic, m.Payload)
	}
	// Killed, we left word that we are online.
	if b, ok := l.bus.Retained(topic.ReportedLink(l.cfg.Node)); ok {
		var s payload.Link
		if payload.Decode(b, &s) == nil && s.Online {
			l.since.Store(s.Since)
			l.local(false)
		}
	}
	// What the cloud has of us is not known; the digest finds out. Assuming
	// that it has everything makes an equal set cost nothing. Every topic is looked
	// at once more when its turn comes: one that is dropped before the watch
	// begins does not show there.
	for _, m := range l.bus.RetainedMatch(topic.Reported.All(l.cfg.Node)) {
		if reported(m.Topic) {
			l.out.Assume(m.Topic, m.Payload)
			l.out.Touch(m.Topic)
		}
	}
	stop, err := l.bus.Watch(ctx, topic.Reported.All(l.cfg.Node), func(m broker.Message) {
		if reported(m.Topic) {
			l.out.Touch(m.Topic)
		}
	})
	if err != nil {
		if ctx.Err() != nil {
			return nil // ended before it began
		}
		return err
	}
	defer stop()
	err = l.c.Run(ctx)
	l.wg.Wait()
	return err
}

// reported tells whether the topic is part of the node's reported set.
func reported(t topic.Topic) bool {
	p, err := topic.Parse(string(t))
	if err != nil {
		return false
	}
	d, ok := p.Direction()
	return ok && d == topic.Reported
}

func (l *Link) up(ctx context.Context) {
	l.shown.Lock()
	l.online = true
	l.shown.Unlock()
	l.wg.Add(4)
	go func() {
		defer l.wg.Done()
		if err := l.ev.run(ctx); err != nil && ctx.Err() == nil {
			l.c.Drop(err)
		}
	}()
	go func() {
		defer l.wg.Done()
		l.announce(ctx)
	}()
	go func() {
		defer l.wg.Done()
		if err := l.out.Run(ctx, l.c); err != nil && ctx.Err() == nil {
			l.c.Drop(err)
		}
	}()
	go func() {
		defer l.wg.Done()
		if err := l.in.Run(ctx, l.c); err != nil && ctx.Err() == nil {
			l.c.Drop(err)
		}
	}()
}

func (l *Link) announce(ctx context.Context) {
	m := client.Message{Topic: topic.ReportedLink(l.cfg.Node), Payload: l.status(true), QoS: 1, Retain: true}
	if err := l.c.Publish(ctx, m); err != nil && ctx.Err() == nil {
		l.c.Drop(err)
		return
	}
	l.shown.Lock()
	defer l.shown.Unlock()
	if l.online { // else it ended meanwhile, and the bus knows
		l.local(true)
	}
}

// local shows the link's state on the node's own bus.
func (l *Link) local(online bool) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	err := l.bus.Publish(ctx, broker.Message{Topic: topic.ReportedLink(l.cfg.Node), Payload: l.status(online), QoS: 1, Retain: true})
	if err != nil && !errors.Is(err, broker.ErrClosed) {
		l.log.Warn("link state not shown on the bus", "error", err)
	}
}

func (l *Link) down(reason error) {
	l.lost(reason)
	l.shown.Lock()
	defer l.shown.Unlock()
	l.online = false
	l.local(false)
}

// messages takes what the cloud sends, in order. It returns when all of it is in
// the node's store, so that its acknowledgement means just that.
func (l *Link) messages(ms []client.Message) {
	var desired []broker.Message
	for _, m := range ms {
		p, err := topic.Parse(string(m.Topic))
		if err != nil || p.Node != l.cfg.Node {
			l.log.Warn("message ignored: foreign topic", "topic", m.Topic)
			continue
		}
		if d, ok := p.Direction(); ok && d == topic.Desired {
			desired = append(desired, retained(m.Topic, m.Payload))
			continue
		}
		l.desired(desired) // what follows may be about it
		desired = nil
		l.message(p, m)
	}
	l.desired(desired)
}

// message takes what is no state.
func (l *Link) message(p topic.Parsed, m client.Message) {
	switch p.Kind {
	case topic.KindDesiredDigest:
		var d payload.Digest
		if err := payload.Decode(m.Payload, &d); err != nil {
			l.log.Warn("digest ignored", "error", err)
			return
		}
		l.in.Digest(p.Node, d)
	case topic.KindSyncDesiredManifest:
		var sm payload.SyncManifest
		if err := payload.Decode(m.Payload, &sm); err != nil {
			l.log.Warn("manifest ignored", "error", err)
			return
		}
		l.in.Manifest(p.Node, sm, m.CorrelationData)
	case topic.KindSyncReportedRequest:
		var r payload.SyncRequest
		if err := payload.Decode(m.Payload, &r); err != nil {
			l.log.Warn("request ignored", "error", err)
			return
		}
		l.out.Request(p.Node, r, "", m.CorrelationData)
	case topic.KindReportedLink:
		var s payload.Link
		if payload.Decode(m.Payload, &s) == nil && !s.Online {
			// The Will of the connection that we took over came after our own
			// message: say again that we are here.
			l.wg.Add(1)
			go func() {
				defer l.wg.Done()
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				defer cancel()
				l.announce(ctx)
			}()
		}
	default:
		l.log.Warn("message ignored: not the cloud's to write", "topic", m.Topic)
	}
}
