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
)

// InboxConfig configures an inbox.
type InboxConfig struct {
	Direction topic.Direction
	// Absent is told of a topic that the writer does not have: the receiver
	// drops it. Where it is nil the writer is asked to clear it.
	Absent func(topic.Topic)
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
		repairs uint64
	}
}

type inNode struct {
	have    *digest.Set
	writer  payload.Digest
	heard   bool                // a digest was received
	wanted  map[string]struct{} // asked for in the present repair
	differs time.Time           // since when, zero while equal
	due     time.Time           // when to ask
	pause   time.Duration       // before asking once more
	asked   string              // correlation of the manifest in progress, empty for none
	page    string              // which page of it was asked for
	askedAt time.Time
	want    []string // collected so far, relative to fl/<node>/
	n       uint64   // requests made
}

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
		n = &inNode{have: digest.NewSet()}
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
		if at := time.Now().Add(answer); n.asked == "" && n.due.Before(at) {
			n.due = at // the answer is coming in
		}
	}
	if !n.differs.IsZero() && n.asked == "" {
		i.compareLocked(n)
	}
}

// Wanted tells whether a repair asked for the topic, so that it is to be taken
// even if its rev is older.
func (i *Inbox) Wanted(t topic.Topic) bool {
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
	_, ok := n.wanted[string(t)]
	return ok
}

// Reset forgets what the receiver has, for a receiver that is about to be told
// everything again.
func (i *Inbox) Reset() {
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, n := range i.mu.nodes {
		n.have = digest.NewSet()
		n.heard, n.differs, n.due, n.pause = false, time.Time{}, time.Time{}, 0
		n.asked, n.want, n.wanted = "", nil, nil
	}
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
	if n.asked == "" {
		i.compareLocked(n)
		wait = n.pause
	}
	// A digest that still differs says that the writer lives, and that its
	// answer, where it gave one, is complete: neither has to be waited for.
	if at := later(n.askedAt.Add(wait), time.Now().Add(settle)); n.pause > 0 && at.Before(n.due) {
		n.due = at
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

func (i *Inbox) compareLocked(n *inNode) {
	if !n.heard {
		return
	}
	if equal(n) {
		n.differs, n.due, n.pause, n.wanted = time.Time{}, time.Time{}, 0, nil
		return
	}
	now := time.Now()
	if n.differs.IsZero() {
		n.differs = now
	}
	if n.pause > 0 {
		return // a repair was tried already; due stands
	}
	n.due = now.Add(settle)
	if m := n.differs.Add(settleMax); m.Before(n.due) {
		n.due = m
	}
}

// Manifest takes a page of the writer's manifest.
func (i *Inbox) Manifest(name string, m payload.SyncManifest, correlation []byte) {
	prefix := topic.Root + "/" + name + "/"
	var absent []topic.Topic
	i.mu.Lock()
	n := i.mu.nodes[name]
	if n == nil || n.asked == "" || string(correlation) != n.asked || m.After != n.page {
		i.mu.Unlock()
		return // late, or meant for another receiver
	}
	if m.Next != "" && m.Next <= m.After {
		i.mu.Unlock()
		i.log.Warn("manifest ignored: its next page does not lie behind it", "node", name)
		return
	}
	n.writer = m.Digest // as new as any, and the digest's own message may be lost
	for t, h := range m.Topics {
		if _, ok := node(topic.Topic(prefix+t), i.cfg.Direction); !ok {
			continue // we would never hold it
		}
		if have, ok := n.have.Get(prefix + t); !ok || have != h {
			n.want = append(n.want, t)
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
		}
	}
	i.mu.Unlock()
	for _, t := range absent {
		i.cfg.Absent(t)
	}
	i.mu.Lock()
	if n.asked == string(correlation) { // nothing began anew meanwhile
		n.after(m.Next)
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
	n.asked, n.want = "", nil
	i.compareLocked(n)
	return true
}

// after records that a page came; next is where the following one begins.
func (n *inNode) after(next string) {
	if next != "" {
		n.asked = "next:" + next
	} else {
		n.asked = "done"
	}
	n.due = time.Now()
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
		n.asked, n.want, n.wanted = "", nil, nil
		n.differs, n.due, n.pause = time.Time{}, time.Time{}, 0
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
	now := time.Now()
	wait := time.Hour
	var out []request
	i.mu.Lock()
	for name, n := range i.mu.nodes {
		if n.due.IsZero() || !n.due.After(now) && i.equalLocked(n) {
			continue
		}
		if n.due.After(now) {
			wait = min(wait, n.due.Sub(now))
			continue
		}
		next, more := strings.CutPrefix(n.asked, "next:")
		switch {
		case more:
			out = append(out, i.requestLocked(name, n, next))
		case n.asked == "done":
			out = append(out, i.finishLocked(name, n)...)
		default: // a new repair, or one whose answer did not come
			i.mu.repairs++
			n.pause = min(max(2*n.pause, again), againMax)
			n.want, n.wanted = nil, map[string]struct{}{}
			i.log.Info("repair: state differs, asking for the manifest", "node", name,
				"direction", i.cfg.Direction.String(), "have", n.have.Count(), "writer", n.writer.Count)
			out = append(out, i.requestLocked(name, n, ""))
		}
		wait = min(wait, max(0, n.due.Sub(now)))
	}
	i.mu.Unlock()
	for _, r := range out {
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

// requestLocked asks for the manifest's page after a topic.
func (i *Inbox) requestLocked(name string, n *inNode, after string) request {
	n.n++
	n.asked, n.page, n.askedAt = "ask:"+i.name+":"+strconv.FormatUint(n.n, 36), after, time.Now()
	n.due = n.askedAt.Add(n.pause)
	return request{node: name, r: payload.SyncRequest{Manifest: true, After: after}, correlation: n.asked}
}

// finishLocked wants what the manifest showed to differ. If the sets still
// differ when the answers should have come, the repair begins again.
func (i *Inbox) finishLocked(name string, n *inNode) []request {
	n.asked = ""
	slices.Sort(n.want)
	if n.wanted == nil {
		n.wanted = map[string]struct{}{}
	}
	for _, w := range n.want {
		n.wanted[topic.Root+"/"+name+"/"+w] = struct{}{}
	}
	var out []request
	for chunk := range slices.Chunk(n.want, wantMax) {
		out = append(out, request{node: name, r: payload.SyncRequest{Want: chunk}})
	}
	n.want = nil
	n.due = time.Now().Add(max(n.pause, answer))
	return out
}
