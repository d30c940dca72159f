package cloudbridge

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// quiet is how long no retained message may have come before the replay
	// counts as complete. MQTT has no end-of-replay; a marker published after
	// the SUBACK comes back behind it from most brokers, not from all.
	quiet = 200 * time.Millisecond
	// healDelay lets our own messages that are still on their way pass before
	// a strange one on a desired topic is overwritten.
	healDelay = time.Second
)

// session is what one connection to the broker has brought.
type session struct {
	// serving is held while a connection is being served, so that the next
	// one begins with a clean slate.
	serving sync.Mutex
	looked  bool // everything in Kubernetes was looked at; guarded by serving

	mu struct {
		sync.Mutex
		loading bool
		last    time.Time // when the last retained message came
		marker  topic.Topic
		marked  chan struct{}
		held    map[topic.Topic][]byte   // desired topics, digests among them
		foreign []topic.Topic            // below desired/, and no topic of ours
		seen    map[topic.Topic]struct{} // reported topics
		// strange holds what somebody else wrote to desired topics.
		strange map[topic.Topic]strange
	}
}

// strange is a payload on a desired topic that is not the truth.
type strange struct {
	payload []byte
	at      time.Time
}

func (b *Bridge) connectTo(c client.Config) error {
	dial := c.Dial
	if dial == nil {
		d, err := client.ParseURL(c.URL, nil)
		if err != nil {
			return err
		}
		dial = d.Dial
	}
	c.Dial = func(ctx context.Context) (net.Conn, error) {
		b.reset()
		return dial(ctx)
	}
	if c.ClientID == "" {
		c.ClientID = "fairlead-cloud"
	}
	// One marker for all connections, so that the subscriptions stand. It is a
	// topic of a node that does not exist: the broker's access rules for the
	// cloud cover it.
	b.session.mu.marker = topic.SyncRequest("marker-"+strings.ToLower(rand.Text()), topic.Reported)
	c.Subscriptions = []client.Subscription{
		{Filter: topic.Desired.AllNodes(), QoS: 1, RetainAsPublished: true},
		{Filter: topic.Reported.AllNodes(), QoS: 1, RetainAsPublished: true},
		{Filter: topic.OfKind("+", topic.KindSyncDesiredRequest), QoS: 1},
		{Filter: topic.OfKind("+", topic.KindSyncReportedManifest), QoS: 1},
		{Filter: topic.OfKind("+", topic.KindEventKubernetes), QoS: 1},
		{Filter: topic.Filter(b.session.mu.marker), QoS: 1},
	}
	c.OnMessage = b.message
	c.OnUp = func(ctx context.Context) { b.wg.Go(func() { b.serve(ctx) }) }
	c.OnDown = func(error) {
		b.ready.Store(false)
		b.mirror.lost()
	}
	c.Logger = b.log
	var err error
	b.client, err = client.New(c)
	return err
}

// reset forgets the connection before. It is called before a connection is
// made: the first retained messages come before OnUp.
func (b *Bridge) reset() {
	b.session.serving.Lock() // the one before has ended
	defer b.session.serving.Unlock()
	b.outbox.Reset()
	b.inbox.Reset()
	s := &b.session
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.loading, s.mu.last, s.mu.marked = true, time.Now(), make(chan struct{})
	s.mu.held, s.mu.seen = map[topic.Topic][]byte{}, map[topic.Topic]struct{}{}
	s.mu.foreign, s.mu.strange = nil, map[topic.Topic]strange{}
}

// serve does a connection's work: read what the broker holds, compare, and keep
// both directions in step until the connection ends.
func (b *Bridge) serve(ctx context.Context) {
	b.session.serving.Lock()
	defer b.session.serving.Unlock()
	err := b.synchronise(ctx)
	if err == nil {
		g, gctx := errgroup.WithContext(ctx)
		g.Go(func() error { return b.outbox.Run(gctx, b.client) })
		g.Go(func() error { return b.inbox.Run(gctx, b.client) })
		err = g.Wait()
	}
	if err != nil && ctx.Err() == nil {
		b.client.Drop(err)
	}
}

func (b *Bridge) synchronise(ctx context.Context) error {
	if err := b.replayed(ctx); err != nil {
		return err
	}
	if !b.waitSynced(ctx) {
		return ctx.Err()
	}
	s := &b.session
	if !s.looked {
		s.mu.Lock()
		held := make(map[topic.Topic][]byte, len(s.mu.held))
		for t, p := range s.mu.held {
			held[t] = p
		}
		s.mu.Unlock()
		if err := b.begin(ctx, held); err != nil {
			return err
		}
		s.looked = true
	}
	s.mu.Lock()
	s.mu.loading = false
	held, seen, foreign := s.mu.held, s.mu.seen, s.mu.foreign
	s.mu.held, s.mu.seen, s.mu.foreign = nil, nil, nil
	s.mu.Unlock()

	digests := b.assume(held)
	b.mirror.complete(seen)
	for _, n := range b.in.nodes.GetIndexer().ListKeys() {
		b.outbox.AddNode(n)
	}
	for _, n := range b.mirror.nodes() {
		b.outbox.AddNode(n)
	}
	b.outbox.Touch(b.truth.topics()...)
	if err := b.clear(ctx, append(foreign, b.orphans(digests)...)); err != nil {
		return err
	}
	b.startOnce.Do(func() { close(b.start) })
	b.status.everything()
	b.desired.renewTokens("") // those of links that came up meanwhile
	b.ready.Store(true)
	b.log.Info("in step with kubernetes and the broker", "held", len(held), "desired", b.truth.len())
	return nil
}

// assume tells the outbox what the broker holds, and marks what it must not.
// It gives the nodes that have a digest.
func (b *Bridge) assume(held map[topic.Topic][]byte) (digests []string) {
	for t, p := range held {
		parsed, err := topic.Parse(string(t))
		if err != nil {
			continue
		}
		if parsed.Kind == topic.KindDesiredDigest {
			digests = append(digests, parsed.Node)
			continue
		}
		b.outbox.Assume(t, p)
		b.outbox.Touch(t)
	}
	return digests
}

// orphans gives the digests of nodes that there is nothing to say about.
func (b *Bridge) orphans(digests []string) []topic.Topic {
	known := map[string]bool{}
	for _, n := range b.outbox.Nodes() {
		known[n] = true
	}
	var out []topic.Topic
	for _, n := range digests {
		if !known[n] {
			out = append(out, topic.DesiredDigest(n))
		}
	}
	return out
}

// clear removes retained messages that no digest covers.
func (b *Bridge) clear(ctx context.Context, topics []topic.Topic) error {
	for _, t := range topics {
		err := b.client.Publish(ctx, client.Message{Topic: t, QoS: 1, Retain: true})
		var refused *client.Refused
		switch {
		case errors.As(err, &refused):
			b.log.Warn("a foreign retained message cannot be cleared, remove it at the broker", "topic", t, "error", err)
		case err != nil:
			return fmt.Errorf("clear %q: %w", t, err)
		default:
			b.log.Info("cleared a retained message that nobody owns", "topic", t)
		}
	}
	return nil
}

// replayed waits until the broker has sent all retained messages.
func (b *Bridge) replayed(ctx context.Context) error {
	s := &b.session
	s.mu.Lock()
	marker, marked := s.mu.marker, s.mu.marked
	s.mu.Unlock()
	p, _ := topic.Parse(string(marker))
	err := b.client.Publish(ctx, client.Message{Topic: marker, Payload: payload.Encode(payload.SyncRequest{}), QoS: 1})
	if err != nil {
		return fmt.Errorf("publish as the cloud (does the broker give this user the cloud's rights, below fl/%s too?): %w", p.Node, err)
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-marked:
	}
	for {
		s.mu.Lock()
		wait := time.Until(s.mu.last.Add(quiet))
		s.mu.Unlock()
		if wait <= 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// message takes what the broker sends, in order.
func (b *Bridge) message(m client.Message) {
	p, err := topic.Parse(string(m.Topic))
	if err != nil {
		b.foreign(m)
		return
	}
	switch p.Kind {
	case topic.KindSyncReportedRequest:
		b.session.mu.Lock()
		if m.Topic == b.session.mu.marker && b.session.mu.marked != nil {
			select {
			case <-b.session.mu.marked:
			default:
				close(b.session.mu.marked)
			}
		}
		b.session.mu.Unlock()
	case topic.KindSyncDesiredRequest:
		var r payload.SyncRequest
		if b.decode(m, &r) {
			// The answer goes to the node's own manifest topic, wherever the
			// request asks for it: the cloud may publish to every node.
			b.outbox.Request(p.Node, r, string(topic.SyncManifest(p.Node, topic.Desired)), m.CorrelationData)
		}
	case topic.KindSyncReportedManifest:
		var sm payload.SyncManifest
		if b.decode(m, &sm) {
			b.inbox.Manifest(p.Node, sm, m.CorrelationData)
		}
	case topic.KindReportedDigest:
		var d payload.Digest
		if len(m.Payload) > 0 && b.decode(m, &d) {
			b.inbox.Digest(p.Node, d)
		}
	case topic.KindDesiredDigest:
		b.hold(m)
	case topic.KindEventKubernetes:
		b.events.put(p, m.Payload)
	default:
		if d, ok := p.Direction(); ok && d == topic.Desired {
			b.hold(m)
		} else if ok || p.Kind == topic.KindReportedLink {
			b.reported(p, m)
		}
	}
}

func (b *Bridge) decode(m client.Message, into any) bool {
	if err := payload.Decode(m.Payload, into); err != nil {
		b.metrics.malformed.Inc()
		b.log.Warn("message ignored: it cannot be read", "topic", m.Topic, "error", err)
		return false
	}
	return true
}

// foreign notes retained messages below desired/ that are no topic of ours.
func (b *Bridge) foreign(m client.Message) {
	if !topic.Desired.AllNodes().Match(m.Topic) || len(m.Payload) == 0 {
		b.log.Debug("message ignored: not a topic of ours", "topic", m.Topic)
		return
	}
	s := &b.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.loading {
		s.mu.last = time.Now()
		s.mu.foreign = append(s.mu.foreign, m.Topic)
	}
}

// hold takes a message on a desired topic: what the broker holds while the
// replay lasts, afterwards mostly our own echo.
func (b *Bridge) hold(m client.Message) {
	s := &b.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.loading {
		s.mu.last = time.Now()
		if len(m.Payload) == 0 {
			delete(s.mu.held, m.Topic)
		} else {
			s.mu.held[m.Topic] = m.Payload
		}
		return
	}
	if p, err := topic.Parse(string(m.Topic)); err != nil || p.Kind == topic.KindDesiredDigest {
		return
	}
	if want, _ := b.truth.get(m.Topic); bytes.Equal(want, m.Payload) {
		delete(s.mu.strange, m.Topic)
		return
	}
	s.mu.strange[m.Topic] = strange{m.Payload, time.Now()}
	b.desired.devices.AddAfter(key{kindHeal, string(m.Topic)}, healDelay)
}

// heal publishes a topic again if the last message on it was not ours.
func (b *Bridge) heal(t topic.Topic) {
	s := &b.session
	s.mu.Lock()
	is, ok := s.mu.strange[t]
	wait := time.Until(is.at.Add(healDelay))
	if wait <= 0 {
		delete(s.mu.strange, t)
	}
	s.mu.Unlock()
	if !ok {
		return
	}
	if wait > 0 { // a topic that changes all the time: its last echo decides
		b.desired.devices.AddAfter(key{kindHeal, string(t)}, wait)
		return
	}
	if want, _ := b.truth.get(t); bytes.Equal(want, is.payload) {
		return
	}
	b.log.Warn("somebody else wrote a desired topic, publishing it again", "topic", t)
	b.outbox.Assume(t, is.payload)
	b.outbox.Touch(t)
}

// reported takes a node's report.
func (b *Bridge) reported(p topic.Parsed, m client.Message) {
	s := &b.session
	s.mu.Lock()
	if s.mu.loading {
		s.mu.last = time.Now()
		if len(m.Payload) > 0 {
			s.mu.seen[m.Topic] = struct{}{}
		}
	}
	s.mu.Unlock()
	b.inbox.Put(m.Topic, m.Payload)
	if p.Kind == topic.KindReportedLink {
		b.linked(p.Node, m.Payload)
	}
	n := b.mirror.put(p, m.Payload)
	if n.malformed {
		b.metrics.malformed.Inc()
	}
	if n.linkChanged {
		b.outbox.AddNode(p.Node)
		b.desired.renewTokens(p.Node)
	}
	if n.rekeyed {
		b.desired.rekeyed(p.Node)
	}
	b.status.reported(n)
}
