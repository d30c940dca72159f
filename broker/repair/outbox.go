// Package repair keeps both ends of a direction of a node's state the same: the
// writer's [Outbox] sends what changed, keyed by topic, and a digest after it;
// the receiver's [Inbox] compares, asks for the manifest where it differs, and
// wants again what it lacks. Losing any message, either broker's memory or any
// session costs a repair, never the truth.
//
// The writer is the only one to publish to its topics, in repair too: what the
// receiver wants is published again as the retained message it is, and what the
// writer does not have is cleared.
//
//	out := repair.NewOutbox(repair.OutboxConfig{Direction: topic.Reported, Epoch: epoch, Get: store.Get})
//	out.Touch(topic.ReportedNode("plant-7"))
//	err := out.Run(connCtx, client) // once per connection
package repair

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// PageSize bounds the topics in one page of a manifest, pageBytes its size.
const (
	PageSize  = 2000
	pageBytes = 128 << 10
)

// maxPages bounds the pages and maxWants the topics asked for that wait to be
// sent. What is beyond is dropped and counted; the receiver asks again.
const (
	maxPages = 16384
	maxWants = 65536
)

// firstWindow is how many bytes of topics may be under way unacknowledged when a
// connection begins; each acknowledgement adds what it acknowledged, up to
// maxWindow. A link that breaks after every few thousand bytes would otherwise
// take the acknowledgements of all of them with it, each time.
const (
	firstWindow = 2 << 10
	maxWindow   = 4 << 20
	overhead    = 24 // of a message and its acknowledgement, about
)

// digestDelay coalesces digests: one follows the last change by this much, at
// the latest digestMax after the first. A digest costs as much as a reading, so
// values that change all the time get one every ten seconds; it is there for
// what was lost, which is rare.
const (
	digestDelay = 500 * time.Millisecond
	digestMax   = 10 * time.Second
	// digestRetry is when a digest that the broker refused is published again.
	digestRetry = 5 * time.Second
	// digestRefresh is when a digest is published again though nothing changed,
	// give or take a quarter: a broker may drop messages for a slow subscriber,
	// and what was dropped may have been the digest. It costs some 30 bytes a
	// minute.
	digestRefresh = 10 * time.Minute
)

// Sender sends messages in order and tells their fate; *client.Client is one.
type Sender interface {
	Send(context.Context, client.Message) (<-chan error, error)
}

// OutboxConfig configures an outbox.
type OutboxConfig struct {
	Direction topic.Direction
	// Epoch names the numbering of the revs, see [NewEpoch].
	Epoch string
	// Get gives the writer's present payload of a topic; false or an empty one
	// says that there is none. It is called on Run's goroutine and must not block.
	Get    func(topic.Topic) ([]byte, bool)
	Logger *slog.Logger
}

// Outbox holds what the other side is believed to have, per node, and the
// topics that differ from it. It is bounded by the number of the writer's
// topics: a topic that changes a thousand times while there is no link is
// in it once.
type Outbox struct {
	cfg  OutboxConfig
	log  *slog.Logger
	wake chan struct{}
	turn chan struct{} // held by Run: the one of the connection before ends first

	mu struct {
		sync.Mutex
		nodes   map[string]*outNode
		agenda  agenda[*outNode]     // of digests
		urgent  []topic.Topic        // dirty topics that a receiver wants
		queue   []topic.Topic        // dirty topics, oldest first
		dirty   map[topic.Topic]bool // true: send even what the other side is believed to have
		backlog int                  // how much of the queue goes before the first digests and pages
		pages   []page               // manifests asked for
		wanted  uint64               // topics put into urgent so far
		sent    uint64               // topics taken from it
		dropped uint64               // wants and pages
	}
}

type outNode struct {
	slot
	name      string
	sent      *digest.Set
	published payload.Digest
	known     bool      // a digest was published on this connection
	force     bool      // publish the digest even if it did not change
	first     time.Time // of the changes that no digest covers yet
	last      time.Time
	retry     time.Time // not before
	refresh   time.Time // when it is published again unchanged
}

type page struct {
	node, after string
	max         int
	behind      uint64 // topics wanted that go first
	correlation []byte
}

// NewOutbox makes an empty outbox.
func NewOutbox(cfg OutboxConfig) *Outbox {
	o := &Outbox{cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
	if o.log == nil {
		o.log = slog.New(slog.DiscardHandler)
	}
	o.mu.nodes = map[string]*outNode{}
	o.mu.dirty = map[topic.Topic]bool{}
	return o
}

func (o *Outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *Outbox) nodeLocked(name string) *outNode {
	n := o.mu.nodes[name]
	if n == nil {
		n = &outNode{name: name, sent: digest.NewSet()}
		o.mu.nodes[name] = n
		o.planLocked(n)
	}
	return n
}

// planLocked follows a change of what the node's digest depends on.
func (o *Outbox) planLocked(n *outNode) { o.mu.agenda.set(n, n.due(time.Now())) }

// node gives the topic's node. ok is false for a topic that the direction's
// digest does not cover: in the set, it would make the digests differ for ever.
func node(t topic.Topic, d topic.Direction) (name string, ok bool) {
	p, err := topic.Parse(string(t))
	if err != nil {
		return "", false
	}
	is, ok := p.Direction()
	return p.Node, ok && is == d
}

// Assume records that the other side has the payload already; an empty one
// that it does not have the topic. A topic of another direction is ignored.
func (o *Outbox) Assume(t topic.Topic, p []byte) {
	name, ok := node(t, o.cfg.Direction)
	if !ok {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.nodeLocked(name).sent.Put(string(t), p)
}

// Reset forgets what the other side is believed to have.
func (o *Outbox) Reset() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, n := range o.mu.nodes {
		n.sent = digest.NewSet()
	}
}

// Nodes lists the nodes that the outbox knows.
func (o *Outbox) Nodes() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]string, 0, len(o.mu.nodes))
	for n := range o.mu.nodes {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// Assumed lists the topics that the other side is believed to have of a node.
func (o *Outbox) Assumed(node string) []topic.Topic {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := o.mu.nodes[node]
	if n == nil {
		return nil
	}
	var out []topic.Topic
	for _, t := range n.sent.Topics("", 0) {
		out = append(out, topic.Topic(t))
	}
	return out
}

// AddNode makes sure that a digest is published for the node even if it has no topics.
func (o *Outbox) AddNode(node string) {
	o.mu.Lock()
	o.nodeLocked(node)
	o.mu.Unlock()
	o.signal()
}

// Touch marks topics as changed; Get tells to what when their turn comes. A
// topic of another direction is ignored then.
func (o *Outbox) Touch(topics ...topic.Topic) {
	o.mu.Lock()
	for _, t := range topics {
		o.touchLocked(t, false)
	}
	o.mu.Unlock()
	o.signal()
}

func (o *Outbox) touchLocked(t topic.Topic, must bool) {
	before, ok := o.mu.dirty[t]
	o.mu.dirty[t] = before || must
	if !ok {
		o.mu.queue = append(o.mu.queue, t)
	}
}

// again queues a topic of which it is not known whether it arrived.
func (o *Outbox) again(t topic.Topic) {
	o.mu.Lock()
	o.touchLocked(t, true)
	o.mu.Unlock()
	o.signal()
}

// Pending is the number of topics that wait to be sent.
func (o *Outbox) Pending() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.mu.dirty)
}

// Dropped counts the topics and pages that receivers asked for and that were
// beyond the bound of what may wait.
func (o *Outbox) Dropped() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.mu.dropped
}

// Request takes a receiver's request. to and correlation are the request's
// response topic and correlation data. The answer goes to the manifest's topic
// and nowhere else: a receiver must not choose what the writer writes to.
func (o *Outbox) Request(name string, r payload.SyncRequest, to string, correlation []byte) {
	prefix := topic.Root + "/" + name + "/"
	foreign := to != "" && to != string(topic.SyncManifest(name, o.cfg.Direction))
	o.mu.Lock()
	n := o.nodeLocked(name)
	dropped := o.mu.dropped
	for _, w := range r.Want {
		t := topic.Topic(prefix + w)
		if _, ok := node(t, o.cfg.Direction); !ok {
			continue
		}
		if len(o.mu.urgent) >= maxWants {
			o.mu.dropped++
			continue
		}
		o.mu.dirty[t] = true
		o.mu.urgent = append(o.mu.urgent, t)
		o.mu.wanted++
		n.force = true
	}
	if len(r.Want) > 0 {
		o.planLocked(n)
	}
	switch {
	case !r.Manifest || foreign:
	case len(o.mu.pages) >= maxPages:
		o.mu.dropped++
	default:
		o.mu.pages = append(o.mu.pages, page{node: name, after: r.After, max: r.Max, behind: o.mu.wanted, correlation: correlation})
	}
	dropped = o.mu.dropped - dropped
	o.mu.Unlock()
	if dropped > 0 {
		o.log.Warn("repair: too much is asked for, dropped what is beyond the bound", "node", name, "direction", o.cfg.Direction.String(), "dropped", dropped)
	}
	if r.Manifest && foreign {
		o.log.Warn("request for the manifest ignored: it names a foreign response topic", "node", name)
	}
	if len(r.Want) > 0 {
		o.log.Info("repair: publishing again", "node", name, "direction", o.cfg.Direction.String(), "topics", len(r.Want))
	}
	o.signal()
}

type sentItem struct {
	t      topic.Topic
	size   int
	digest string // the node, where it is a digest
	ack    <-chan error
}

// flight is what a connection's Run has sent and not seen acknowledged.
type flight struct {
	items  []sentItem // oldest first
	bytes  int
	window int
}

func (f *flight) add(it sentItem) {
	f.items = append(f.items, it)
	f.bytes += it.size
}

func (f *flight) full() bool { return len(f.items) > 0 && f.bytes >= f.window }

// Run sends until ctx, which is one connection's, ends or sending fails. It
// begins with the topics that wait, then publishes every node's digest. What
// was not acknowledged when it returns waits again.
func (o *Outbox) Run(ctx context.Context, s Sender) error {
	select {
	case o.turn <- struct{}{}:
		defer func() { <-o.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	o.mu.Lock()
	for _, n := range o.mu.nodes {
		n.known = false
		o.planLocked(n)
	}
	o.mu.backlog = len(o.mu.queue)
	o.mu.Unlock()
	f := &flight{window: firstWindow}
	defer func() {
		_ = o.reap(f)
		for _, it := range f.items {
			if it.digest == "" {
				o.again(it.t)
			}
		}
	}()
	var looked time.Time // for digests that are due
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		// A sender that takes everything must not keep a connection's Run alive
		// into the next connection.
		if err := ctx.Err(); err != nil {
			return err
		}
		// What was sent so far is what a manifest and a digest tell, so both are
		// right at any time, also while there is always something to send; but not
		// before all is sent that waited when the connection began, as a receiver
		// drops what they do not name.
		if err := o.manifests(ctx, s); err != nil {
			return err
		}
		if err := o.reap(f); err != nil {
			return err
		}
		if t, must, ok := o.nextDirty(f.full()); ok {
			it, err := o.send(ctx, s, t, must)
			if err != nil {
				o.again(t)
				return err
			}
			if it.ack != nil {
				f.add(it)
			}
			if now := time.Now(); now.Sub(looked) > digestDelay {
				looked = now
				if _, err = o.digests(ctx, s, f); err != nil {
					return err
				}
			}
			continue
		}
		wait, err := o.digests(ctx, s, f)
		if err != nil {
			return err
		}
		timer.Reset(wait)
		var head <-chan error
		if len(f.items) > 0 {
			head = f.items[0].ack
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-o.wake:
		case <-timer.C:
		case err := <-head:
			if err := o.settle(f, err); err != nil {
				return err
			}
		}
	}
}

// reap takes the acknowledgements that are there already.
func (o *Outbox) reap(f *flight) error {
	for len(f.items) > 0 {
		select {
		case err := <-f.items[0].ack:
			if err := o.settle(f, err); err != nil {
				return err
			}
		default:
			return nil
		}
	}
	f.items = nil
	return nil
}

// settle takes the answer to the oldest of what is in flight.
func (o *Outbox) settle(f *flight, answer error) error {
	it := f.items[0]
	f.items = f.items[1:]
	f.bytes -= it.size
	f.window = min(f.window+it.size, maxWindow)
	return o.finish(it, answer)
}

// finish settles what was sent. It gives an error where the connection is no
// good any more.
func (o *Outbox) finish(it sentItem, err error) error {
	var refused *client.Refused
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &refused):
		if it.digest == "" { // every connection begins with the digests
			o.again(it.t)
		}
		return err
	case it.digest != "":
		o.log.Warn("digest refused by the broker, will try again", "topic", it.t, "error", err)
		o.mu.Lock()
		n := o.nodeLocked(it.digest)
		n.force, n.retry = true, time.Now().Add(digestRetry)
		o.planLocked(n)
		o.mu.Unlock()
	default:
		// Sending it again would be refused again. The digest shows that it is
		// missing, and the receiver asks for it when it can take it.
		o.log.Error("state refused by the broker", "topic", it.t, "error", err)
	}
	return nil
}

// nextDirty takes the next topic to send, unless no more may be in flight.
func (o *Outbox) nextDirty(full bool) (t topic.Topic, must, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !full {
		switch {
		case len(o.mu.urgent) > 0:
			t, o.mu.urgent = o.mu.urgent[0], o.mu.urgent[1:]
			o.mu.sent++
		case len(o.mu.queue) > 0:
			t, o.mu.queue = o.mu.queue[0], o.mu.queue[1:]
			o.mu.backlog--
		default:
			o.mu.urgent, o.mu.queue, o.mu.backlog = nil, nil, 0
			return "", false, false
		}
		if must, ok = o.mu.dirty[t]; ok { // else it went as the other kind already
			delete(o.mu.dirty, t)
			return t, must, true
		}
	}
	return "", false, false
}

func (o *Outbox) send(ctx context.Context, s Sender, t topic.Topic, must bool) (sentItem, error) {
	name, mine := node(t, o.cfg.Direction)
	if !mine {
		return sentItem{}, nil
	}
	p, ok := o.cfg.Get(t)
	if !ok || len(p) == 0 {
		p, ok = nil, false
	}
	o.mu.Lock()
	n := o.nodeLocked(name)
	h, known := n.sent.Get(string(t))
	if !must && (ok && known && h == digest.Of(string(t), p) || !ok && !known) {
		o.mu.Unlock()
		return sentItem{}, nil // the other side has it already
	}
	n.sent.Put(string(t), p)
	now := time.Now()
	if n.first.IsZero() {
		n.first = now
	}
	n.last = now
	o.planLocked(n)
	o.mu.Unlock()
	ack, err := s.Send(ctx, client.Message{Topic: t, Payload: p, QoS: 1, Retain: true})
	if err != nil {
		return sentItem{}, err
	}
	return sentItem{t: t, size: len(t) + len(p) + overhead, ack: ack}, nil
}

// due tells when the node's digest is to be published.
func (n *outNode) due(now time.Time) time.Time {
	var at time.Time
	switch {
	case !n.known:
		return now
	case !n.first.IsZero():
		at = n.last.Add(digestDelay)
		if m := n.first.Add(digestMax); m.Before(at) {
			at = m
		}
	case n.force:
		at = now
	default:
		at = n.refresh
	}
	if n.retry.After(at) {
		at = n.retry
	}
	return at
}

// digests publishes the digests that are due, adds them to what is in flight
// and tells how long to wait for the next one.
func (o *Outbox) digests(ctx context.Context, s Sender, f *flight) (time.Duration, error) {
	type out struct {
		node string
		d    payload.Digest
	}
	var due []out
	var wait time.Duration
	now := time.Now()
	o.mu.Lock()
	if o.mu.backlog > 0 {
		o.mu.Unlock()
		return time.Hour, nil // what is in flight goes on
	}
	for {
		n, next, ok := o.mu.agenda.due(now)
		if !ok {
			wait = next
			break
		}
		n.first, n.retry = time.Time{}, time.Time{}
		d := payload.Digest{Epoch: o.cfg.Epoch, Count: n.sent.Count(), Sum: n.sent.Sum()}
		if !n.known || n.force || d != n.published || !now.Before(n.refresh) {
			n.known, n.force, n.published = true, false, d
			n.refresh = now.Add(digestRefresh*3/4 + rand.N(digestRefresh/2))
			due = append(due, out{n.name, d})
		}
		o.mu.agenda.set(n, n.refresh)
	}
	o.mu.Unlock()
	for _, d := range due {
		t := o.cfg.Direction.Digest(d.node)
		p := payload.Encode(d.d)
		ack, err := s.Send(ctx, client.Message{Topic: t, Payload: p, QoS: 1, Retain: true})
		if err != nil {
			return 0, err
		}
		f.add(sentItem{t: t, size: len(t) + len(p) + overhead, digest: d.node, ack: ack})
	}
	return wait, nil
}

// manifests sends the pages that were asked for, as far as what was wanted
// before them has been sent.
func (o *Outbox) manifests(ctx context.Context, s Sender) error {
	for {
		o.mu.Lock()
		if len(o.mu.pages) == 0 || o.mu.backlog > 0 || o.mu.pages[0].behind > o.mu.sent {
			o.mu.Unlock()
			return nil
		}
		pg := o.mu.pages[0]
		o.mu.pages = o.mu.pages[1:]
		m := o.pageLocked(pg)
		o.mu.Unlock()
		_, err := s.Send(ctx, client.Message{Topic: topic.SyncManifest(pg.node, o.cfg.Direction), Payload: payload.Encode(m), QoS: 1, CorrelationData: pg.correlation})
		if err != nil {
			return err
		}
	}
}

func (o *Outbox) pageLocked(pg page) payload.SyncManifest {
	n := o.nodeLocked(pg.node)
	prefix := topic.Root + "/" + pg.node + "/"
	m := payload.SyncManifest{
		Digest: payload.Digest{Epoch: o.cfg.Epoch, Count: n.sent.Count(), Sum: n.sent.Sum()},
		After:  pg.after, Topics: map[string]digest.Hash{},
	}
	after := ""
	if pg.after != "" {
		after = prefix + pg.after
	}
	size := PageSize
	if pg.max > 0 {
		size = min(size, pg.max)
	}
	topics := n.sent.Topics(after, size+1)
	bytes := 0
	for i, t := range topics {
		if bytes += len(t) + 40; i == size || i > 0 && bytes > pageBytes {
			m.Next = topics[i-1][len(prefix):]
			break
		}
		h, _ := n.sent.Get(t)
		m.Topics[t[len(prefix):]] = h
	}
	return m
}
