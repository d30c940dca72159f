package repair

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/schemas/digest"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// settle is how long a difference must stand before it is repaired: a
	// digest may overtake the retained messages of a new subscription.
	settle    = 250 * time.Millisecond
	settleMax = 2 * time.Second
	// again is when a repair without an answer is tried once more, doubling up
	// to againMax.
	again    = 5 * time.Second
	againMax = 2 * time.Minute
	// answer is how long what was wanted may take at least: where other topics
	// change all the time, only the digest behind the answer shows that the sets
	// are equal.
	answer = digestMax + settleMax
	// wantMax bounds the topics of one request.
	wantMax = 500
	// firstPage is how many topics the first page of a repair asks for; each
	// further one asks for twice as many, up to PageSize. Where a link breaks
	// after a few thousand bytes, a large page would never arrive.
	firstPage = 8
)

// InboxConfig configures an inbox.
type InboxConfig struct {
	Direction topic.Direction
	// Absent is told of topics that the writer does not have: the receiver
	// drops them. Where it is nil the writer is asked to clear them.
	Absent func([]topic.Topic)
	Logger *slog.Logger
}

// Inbox holds a receiver's set per node and repairs it. Its methods may be
// called from any goroutine.
type Inbox struct {
	cfg  InboxConfig
	log  *slog.Logger
	wake chan struct{}
	turn chan struct{} // held by Run: the one of the connection before ends first
	name string        // tells our manifests from those of another receiver

	mu struct {
		sync.Mutex
		nodes   map[string]*inNode
		agenda  agenda[*inNode] // when to ask
		repairs uint64
	}
}

type inNode struct {
	slot
	name    string
	have    *digest.Set
	writer  payload.Digest
	heard   bool                   // a digest was received
	epoch   string                 // the writer's when the sets were equal last
	wanted  map[string]digest.Hash // asked for in the present repair; zero where the writer has none
	differs time.Time              // since when, zero while equal
	pause   time.Duration          // before asking once more

	// The repair in progress.
	phase       phase
	page        string // the page that was asked for last
	max         int    // its size
	correlation string
	askedAt     time.Time
	want        []string // what differs on the page that came last, relative to fl/<node>/
	n           uint64   // requests made

	// next is the page that is to be asked for; empty is the first. A repair on
	// the next connection goes on with it, even if what was wanted before is
	// lost: one topic that does not get through must not keep the others out.
	next string
}

// phase is how far a repair is.
type phase uint8

const (
	idle  phase = iota // none in progress, or all was asked for
	asked              // a page is on its way
	more               // another one is to be asked for
	last               // the last one came
)

// NewInbox makes an empty inbox.
func NewInbox(cfg InboxConfig) *Inbox {
	i := &Inbox{cfg: cfg, log: cfg.Logger, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
	i.name = strconv.FormatUint(uint64(rand.Uint32()), 36)
	if i.log == nil {
		i.log = slog.New(slog.DiscardHandler)
	}
	i.mu.nodes = map[string]*inNode{}
	return i
}

func (i *Inbox) signal() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

func (i *Inbox) nodeLocked(name string) *inNode {
	n := i.mu.nodes[name]
	if n == nil {
		n = &inNode{name: name, have: digest.NewSet()}
		i.mu.nodes[name] = n
	}
	return n
}

// Put records what the receiver has now; an empty payload removes the topic. A
// topic of another direction is ignored.
func (i *Inbox) Put(t topic.Topic, p []byte) {
	name, ok := node(t, i.cfg.Direction)
	if !ok {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	n := i.nodeLocked(name)
	n.have.Put(string(t), p)
	if _, ok := n.wanted[string(t)]; ok {
		delete(n.wanted, string(t))
		if at := time.Now().Add(answer); n.phase == idle && n.at.Before(at) {
			i.mu.agenda.set(n, at) // the answer is coming in
		}
	}
	if !n.differs.IsZero() && n.phase == idle {
		i.compareLocked(n)
	}
}

// Accepts tells whether a receiver that holds one payload of a topic takes
// another in its place. Within an epoch it does not go back to an earlier rev of
// the same uid: such a message comes late. But it takes what the writer has just
// named as its present state, hash for hash, and everything while the writer's
// epoch is one under which the sets have not been equal yet.
func (i *Inbox) Accepts(t topic.Topic, held, p []byte) bool {
	if !older(p, held) {
		return true
	}
	name, ok := node(t, i.cfg.Direction)
	if !ok {
		return false
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	n := i.mu.nodes[name]
	if n == nil {
		return false
	}
	if n.heard && n.writer.Epoch != n.epoch {
		return true
	}
	h, ok := n.wanted[string(t)]
	return ok && h == digest.Of(string(t), p)
}

// Reset forgets what the receiver has, for a receiver that is about to be told
// everything again.
func (i *Inbox) Reset() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, n := range i.mu.nodes {
		n.have = digest.NewSet()
		n.heard = false
		i.endLocked(n)
	}
}

// Restart makes void what was asked of a node's writer, for a receiver that
// learns that the writer has connected anew: its answers may be lost.
func (i *Inbox) Restart(node string) {
	i.mu.Lock()
	if n := i.mu.nodes[node]; n != nil {
		i.endLocked(n)
		i.compareLocked(n)
	}
	i.mu.Unlock()
	i.signal()
}

// Has tells whether the receiver holds the topic.
func (i *Inbox) Has(t topic.Topic) bool {
	parsed, err := topic.Parse(string(t))
	if err != nil {
		return false
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	n := i.mu.nodes[parsed.Node]
	if n == nil {
		return false
	}
	_, ok := n.have.Get(string(t))
	return ok
}

// InSync tells whether the node's digest was heard and equals ours.
func (i *Inbox) InSync(node string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	n := i.mu.nodes[node]
	return n != nil && n.heard && equal(n)
}

// Repairs counts the repairs begun.
func (i *Inbox) Repairs() uint64 {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.mu.repairs
}

func equal(n *inNode) bool {
	return n.have.Count() == n.writer.Count && n.have.Sum() == n.writer.Sum
}

// Digest takes the writer's digest.
func (i *Inbox) Digest(node string, d payload.Digest) {
	i.mu.Lock()
	n := i.nodeLocked(node)
	n.writer, n.heard = d, true
	wait := again
	if n.phase == idle {
		i.compareLocked(n)
		wait = n.pause
	}
	// A digest that still differs says that the writer lives, and that its
	// answer, where it gave one, is complete: neither has to be waited for.
	if at := later(n.askedAt.Add(wait), time.Now().Add(settle)); n.pause > 0 && at.Before(n.at) {
		i.mu.agenda.set(n, at)
	}
	i.mu.Unlock()
	i.signal()
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// endLocked ends what there is of a repair.
func (i *Inbox) endLocked(n *inNode) {
	n.phase, n.want, n.wanted = idle, nil, nil
	n.differs, n.pause = time.Time{}, 0
	i.mu.agenda.set(n, time.Time{})
}

func (i *Inbox) compareLocked(n *inNode) {
	if !n.heard {
		return
	}
	if equal(n) {
		i.endLocked(n)
		n.epoch, n.next = n.writer.Epoch, ""
		return
	}
	now := time.Now()
	if n.differs.IsZero() {
		n.differs = now
	}
	if n.pause > 0 {
		return // a repair was tried already; the agenda stands
	}
	at := now.Add(settle)
	if m := n.differs.Add(settleMax); m.Before(at) {
		at = m
	}
	i.mu.agenda.set(n, at)
}

// Manifest takes a page of the writer's manifest.
func (i *Inbox) Manifest(name string, m payload.SyncManifest, correlation []byte) {
	prefix := topic.Root + "/" + name + "/"
	var absent []topic.Topic
	i.mu.Lock()
	n := i.mu.nodes[name]
	if n == nil || n.phase != asked || string(correlation) != n.correlation || m.After != n.page {
		i.mu.Unlock()
		return // late, or meant for another receiver
	}
	if m.Next != "" && m.Next <= m.After {
		i.mu.Unlock()
		i.log.Warn("manifest ignored: its next page does not lie behind it", "node", name)
		return
	}
	n.writer = m.Digest // as new as any, and the digest's own message may be lost
	n.want = nil
	for t, h := range m.Topics {
		if _, ok := node(topic.Topic(prefix+t), i.cfg.Direction); !ok {
			continue // we would never hold it
		}
		if have, ok := n.have.Get(prefix + t); !ok || have != h {
			n.want = append(n.want, t)
			n.wanted[prefix+t] = h
		}
	}
	after := ""
	if m.After != "" {
		after = prefix + m.After
	}
	for _, t := range n.have.Topics(after, 0) {
		rel := strings.TrimPrefix(t, prefix)
		if m.Next != "" && rel > m.Next {
			break
		}
		if _, ok := m.Topics[rel]; ok {
			continue
		}
		if i.cfg.Absent != nil {
			absent = append(absent, topic.Topic(t))
		} else {
			n.want = append(n.want, rel)
			n.wanted[t] = digest.Hash{}
		}
	}
	i.mu.Unlock()
	if len(absent) > 0 {
		i.cfg.Absent(absent)
	}
	i.mu.Lock()
	if n.phase == asked && n.correlation == string(correlation) { // nothing began anew meanwhile
		n.next, n.phase = m.Next, more
		if m.Next == "" {
			n.phase = last
		}
		n.max = min(2*n.max, PageSize)
		i.mu.agenda.set(n, time.Now())
		i.equalLocked(n)
	}
	i.mu.Unlock()
	i.signal()
}

// equalLocked ends a repair whose work is done, by whatever messages.
func (i *Inbox) equalLocked(n *inNode) bool {
	if !n.heard || !equal(n) {
		return false
	}
	i.compareLocked(n)
	return true
}

// Run asks for repairs until ctx, which is one connection's, ends.
func (i *Inbox) Run(ctx context.Context, s Sender) error {
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	i.mu.Lock()
	for _, n := range i.mu.nodes { // the repairs of the connection before are void
		i.endLocked(n)
		i.compareLocked(n)
	}
	i.mu.Unlock()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		wait, err := i.ask(ctx, s)
		if err != nil {
			return err
		}
		timer.Reset(wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-i.wake:
		case <-timer.C:
		}
	}
}

type request struct {
	node        string
	r           payload.SyncRequest
	correlation string
}

func (i *Inbox) ask(ctx context.Context, s Sender) (time.Duration, error) {
	var out []request
	var wait time.Duration
	i.mu.Lock()
	for now := time.Now(); ; {
		n, next, ok := i.mu.agenda.due(now)
		if !ok {
			wait = next
			break
		}
		if i.equalLocked(n) {
			continue
		}
		switch n.phase {
		case more:
			out = append(out, i.wantLocked(n)...)
			out[len(out)-1] = i.pageLocked(n, out[len(out)-1])
		case last:
			out = append(out, i.finishLocked(n)...)
		default: // a new repair, or one whose answer did not come
			i.mu.repairs++
			n.pause = min(max(2*n.pause, again), againMax)
			n.want, n.wanted, n.max = nil, map[string]digest.Hash{}, firstPage
			i.log.Info("repair: state differs, asking for the manifest", "node", n.name,
				"direction", i.cfg.Direction.String(), "have", n.have.Count(), "writer", n.writer.Count)
			out = append(out, i.pageLocked(n, request{node: n.name}))
		}
	}
	i.mu.Unlock()
	for _, r := range out {
		if len(r.r.Want) == 0 && !r.r.Manifest {
			continue
		}
		m := client.Message{
			Topic: topic.SyncRequest(r.node, i.cfg.Direction), Payload: payload.Encode(r.r), QoS: 1,
			ResponseTopic: string(topic.SyncManifest(r.node, i.cfg.Direction)), CorrelationData: []byte(r.correlation),
		}
		if _, err := s.Send(ctx, m); err != nil {
			return 0, err
		}
	}
	return wait, nil
}

// pageLocked adds to a request that for the manifest's next page. What the
// request wants comes first, so the page says that it has come.
func (i *Inbox) pageLocked(n *inNode, r request) request {
	n.n++
	n.phase, n.page, n.askedAt = asked, n.next, time.Now()
	n.correlation = i.name + ":" + strconv.FormatUint(n.n, 36)
	i.mu.agenda.set(n, n.askedAt.Add(n.pause))
	r.r.Manifest, r.r.After, r.r.Max = true, n.page, n.max
	r.correlation = n.correlation
	return r
}

// wantLocked asks for what the page showed to differ; the last request may ask
// for nothing.
func (i *Inbox) wantLocked(n *inNode) []request {
	slices.Sort(n.want)
	var out []request
	for chunk := range slices.Chunk(n.want, wantMax) {
		out = append(out, request{node: n.name, r: payload.SyncRequest{Want: chunk}})
	}
	if len(out) == 0 {
		out = append(out, request{node: n.name})
	}
	n.want = nil
	return out
}

// finishLocked wants what the last page showed to differ. If the sets still
// differ when the answers should have come, the repair begins again.
func (i *Inbox) finishLocked(n *inNode) []request {
	n.phase = idle
	i.mu.agenda.set(n, time.Now().Add(max(n.pause, answer)))
	return i.wantLocked(n)
}
