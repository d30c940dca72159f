package broker

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Events, the fourth law. On a node's bus, an event is appended to the log in
// the batch that its PUBACK waits for; the link reads the log with [Broker.Events]
// and says with [Broker.EventsTaken] up to where the cloud has it. In the cloud,
// an event of a node is taken once: its epoch and number are compared with the
// node's mark, which moves in the batch of the event's effects.
//
// An epoch is one run of a node's broker. A store that was restored from a
// backup, copied to another disk or begun anew counts in an epoch of its own
// from its next start on, so no number ever means two events; what such a store
// still holds keeps the epoch and the number it had, and the cloud knows it again.

// maxEpochs bounds the epochs of a node whose marks the cloud keeps, the most
// recently used ones: those of a node that restarted, and of older copies of its
// disk that may still come back.
const maxEpochs = 64

// clockSet is a time that no event can be older than: a clock that says so has
// not been set yet, and says nothing about the event's age.
var clockSet = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC).UnixMilli()

// events is the log of a node's bus and the cloud's marks. Where nothing else is
// said, its fields are the core's.
type events struct {
	b     *Broker
	max   uint64        // bytes; 0 for no log
	age   time.Duration // 0 for any
	now   func() time.Time
	epoch uint64 // of this run; 0 before its first event

	log     eventLog           // what is committed
	next    eventLog           // with the batch at hand
	added   []store.Event      // in the batch at hand, without payload
	dropped map[string]float64 // by the batch at hand, by bound
	taken   *store.Event       // by the cloud, not yet deleted

	nodes    map[string]map[string]store.Mark // by node and epoch
	used     int64                            // the largest Used
	moved    map[string]map[string]store.Mark // in the batch at hand
	refusing map[string]bool                  // nodes of which an event was refused: what follows it is, too
	gone     [][2]string                      // marks that it deletes
	twice    float64                          // duplicates in it
	missing  float64                          // numbers left out in it

	metrics eventMetrics
	// signal tells the log's reader of new records; capacity 1.
	signal chan struct{}

	mu    sync.Mutex
	shown eventLog // log, for other goroutines
}

// eventLog is what is in a log.
type eventLog struct {
	first, last uint64 // numbers of the oldest and newest record; empty where first is last+1
	before, sum uint64 // bytes up to the oldest record, and up to the newest
	oldest      int64  // Time of the oldest event, 0 where there is none

	gap    *store.EventGap // where the oldest record is the marker of one
	epoch  uint64          // of the marker
	gapped int64           // Time of the marker
}

func (l *eventLog) bytes() uint64 { return l.sum - l.before }

// count is the number of events, without the marker of a gap.
func (l *eventLog) count() uint64 {
	n := l.last + 1 - l.first
	if l.gap != nil {
		n--
	}
	return n
}

type eventMetrics struct {
	logged, twice, missing prometheus.Counter
	dropped                *prometheus.CounterVec
}

func newEvents(b *Broker) *events {
	return &events{
		b: b, max: uint64(max(b.opts.EventBytes, 0)), age: b.opts.EventAge, now: time.Now,
		log: eventLog{first: 1}, next: eventLog{first: 1}, shown: eventLog{first: 1},
		dropped:  map[string]float64{},
		nodes:    map[string]map[string]store.Mark{},
		moved:    map[string]map[string]store.Mark{},
		refusing: map[string]bool{},
		signal:   make(chan struct{}, 1),
		metrics: eventMetrics{
			logged: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "fairlead_broker_events_logged_total", Help: "Events appended to the log."}),
			dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
				Name: "fairlead_broker_events_dropped_total", Help: "Events that the log's bounds dropped, by bound."}, []string{"bound"}),
			twice: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "fairlead_broker_events_duplicate_total", Help: "Events of nodes acknowledged and dropped, as they had come before."}),
			missing: prometheus.NewCounter(prometheus.CounterOpts{
				Name: "fairlead_broker_events_missing_total", Help: "Numbers that nodes left out of their events without a gap marker."}),
		},
	}
}

// register makes the metrics known, once.
func (e *events) register(r prometheus.Registerer) {
	if r == nil {
		return
	}
	if e.b.opts.Node == "" {
		r.MustRegister(e.metrics.twice, e.metrics.missing)
		return
	}
	gauge := func(name, help string, f func(EventBacklog) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return f(e.b.EventBacklog()) })
	}
	for _, bound := range []string{boundBytes, boundAge} {
		e.metrics.dropped.WithLabelValues(bound)
	}
	r.MustRegister(e.metrics.logged, e.metrics.dropped,
		gauge("fairlead_broker_events_waiting", "Events in the log.", func(l EventBacklog) float64 { return float64(l.Count) }),
		gauge("fairlead_broker_events_waiting_bytes", "Size of the events in the log.", func(l EventBacklog) float64 { return float64(l.Bytes) }),
		gauge("fairlead_broker_events_oldest_timestamp_seconds", "When the oldest event in the log was taken, 0 while it is empty.",
			func(l EventBacklog) float64 { return float64(l.Oldest) / 1000 }))
}

// load reads the ends of the log and the marks.
func (e *events) load(s *store.Store) error {
	l, err := readLog(s)
	if err != nil {
		return err
	}
	e.log, e.next = l, l
	e.show()
	return s.EachMark(func(node, epoch string, m store.Mark) error {
		if e.nodes[node] == nil {
			e.nodes[node] = map[string]store.Mark{}
		}
		e.nodes[node][epoch] = m
		e.used = max(e.used, m.Used)
		return nil
	})
}

func readLog(s *store.Store) (eventLog, error) {
	last, ok, err := s.LastEvent()
	if err != nil || !ok {
		return eventLog{first: 1}, err
	}
	l := eventLog{last: last.Seq, sum: last.Sum}
	head, err := s.Events(0, last.Seq, 2)
	if err != nil {
		return l, err
	}
	l.first, l.before, l.oldest, l.gap = head[0].Seq, head[0].Before, head[0].Time, head[0].Gap
	if l.gap != nil {
		l.epoch, l.gapped, l.oldest = head[0].Epoch, head[0].Time, 0
		if len(head) > 1 {
			l.oldest = head[1].Time
		}
	}
	return l, nil
}

func (e *events) show() {
	e.mu.Lock()
	e.shown = e.log
	e.mu.Unlock()
}

// EventBacklog is what waits in the event log.
type EventBacklog struct {
	// Count is the number of events, Bytes what they take.
	Count uint64 `json:"count"`
	Bytes uint64 `json:"bytes"`
	// Oldest is when the oldest of them was taken, in milliseconds since 1970; 0
	// where there is none.
	Oldest int64 `json:"oldest"`
	// Dropped is the number of events before the oldest that the bounds dropped
	// and whose gap the cloud has not been told of yet.
	Dropped uint64 `json:"dropped"`
}

func (l *eventLog) backlog() EventBacklog {
	x := EventBacklog{Count: l.count(), Bytes: l.bytes(), Oldest: l.oldest}
	if l.gap != nil {
		x.Dropped = l.first - l.gap.From + 1
	}
	return x
}

// EventBacklog tells what waits in the event log.
func (b *Broker) EventBacklog() EventBacklog {
	b.events.mu.Lock()
	defer b.events.mu.Unlock()
	return b.events.shown.backlog()
}

// ReadEventBacklog tells what waits in the event log of a store that no broker
// has open.
func ReadEventBacklog(dir string) (EventBacklog, error) {
	var l eventLog
	err := store.View(dir, func(s *store.Store) (err error) {
		l, err = readLog(s)
		return err
	})
	if err != nil {
		return EventBacklog{}, err
	}
	return l.backlog(), nil
}

// Events reads up to n records of the event log, all of them durable, beginning
// with the number from or the next one there is.
func (b *Broker) Events(from uint64, n int) ([]store.Event, error) {
	select {
	case <-b.stopping:
		return nil, ErrClosed
	default:
	}
	b.events.mu.Lock()
	l := b.events.shown
	b.events.mu.Unlock()
	return b.store.Events(max(from, l.first), l.last, n)
}

// EventSignal receives after new records came into the event log. It is for one
// reader.
func (b *Broker) EventSignal() <-chan struct{} { return b.events.signal }

// EventsTaken says that the cloud has the record, and all before it: they leave
// the log soon. What a crash keeps of them is sent again, and the cloud drops it.
func (b *Broker) EventsTaken(ctx context.Context, last store.Event) error {
	last.Payload = nil
	take := func(*tx, *result) {
		if e := b.events; e.taken == nil || e.taken.Seq < last.Seq {
			e.taken = &last
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if !b.inbox.put(true, op{fn: take}) {
		return ErrClosed
	}
	return nil
}

// take puts an event into the log, or a node's event to the node's mark. stored
// tells that the message depends on the batch. drop tells that it came before:
// it is acknowledged like any other and has no effect. To be called last of all
// that may refuse a message; [events.refuse] tells of one that is refused
// nevertheless. flush and done follow for every batch.
func (e *events) take(sb *store.Batch, m *Message) (stored, drop bool, err error) {
	cloud := e.b.opts.Node == ""
	if cloud && m.From.Role != access.Node || !cloud && e.max == 0 {
		return false, false, nil
	}
	p, ok := event(m)
	switch {
	case !ok:
		return false, false, nil
	case cloud:
		drop, err = e.once(m, p)
	default:
		err = e.append(sb, m)
	}
	return err == nil, drop, err
}

// event takes apart the topic of an event.
func event(m *Message) (topic.Parsed, bool) {
	if m.Retain || !strings.Contains(string(m.Topic), "/event/") { // spares most messages the parser
		return topic.Parsed{}, false
	}
	p, err := topic.Parse(string(m.Topic))
	return p, err == nil && p.Kind.IsEvent()
}

// append puts an event into the batch.
func (e *events) append(sb *store.Batch, m *Message) error {
	if size := uint64(m.size()); size > e.max {
		return &Refusal{Code: CodeQuotaExceeded, Kind: "event", Reason: fmt.Sprintf("an event of %d bytes is larger than the event log, which has %d", size, e.max)}
	}
	if e.epoch == 0 {
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		e.epoch = max(binary.BigEndian.Uint64(b[:]), 1)
	}
	r := store.Event{
		Seq: e.next.last + 1, Epoch: e.epoch, Time: payload.Millis(e.now()),
		Topic: string(m.Topic), Payload: m.Payload, QoS: m.QoS, Expires: m.Expires, Props: m.Props,
	}
	if hasReserved(r.Props.User) {
		var user [][2]string
		for _, u := range r.Props.User {
			if !strings.HasPrefix(u[0], payload.EventReserved) {
				user = append(user, u)
			}
		}
		r.Props.User = user
	}
	sb.PutEvent(&r, e.next.sum)
	if e.next.count() == 0 {
		e.next.oldest = r.Time
	}
	e.next.last, e.next.sum = r.Seq, r.Sum
	r.Payload, r.Props = nil, store.Props{} // only its place is of interest from here
	e.added = append(e.added, r)
	return nil
}

func hasReserved(user [][2]string) bool {
	for _, u := range user {
		if strings.HasPrefix(u[0], payload.EventReserved) {
			return true
		}
	}
	return false
}

// once tells whether a node's event came before, and moves the node's mark.
func (e *events) once(m *Message, p topic.Parsed) (drop bool, err error) {
	id, ok, err := payload.ReadEventID(m.Props.User)
	if err != nil {
		e.refusing[p.Node] = true
		return false, &Refusal{Code: CodeUnspecified, Kind: "event", Reason: err.Error()}
	}
	if !ok {
		return false, nil // not from a log
	}
	if id.First {
		delete(e.refusing, p.Node)
	}
	if e.refusing[p.Node] {
		return false, &Refusal{Code: CodeImplementation, Kind: "event", Reason: "an event before this one was refused: send again from that one on, the first with the user property " + payload.EventFirst}
	}
	mark, known := e.mark(p.Node, id.Epoch)
	if known && id.Seq <= mark.Seq {
		e.twice++
		return true, nil
	}
	from := id.Seq
	if p.Kind == topic.KindEventGap {
		var g payload.EventGap
		if payload.Decode(m.Payload, &g) == nil && g.To == id.Seq && g.From < from {
			from = g.From
		}
	}
	if !known {
		mark, known = e.newest(p.Node) // a run goes on where the one before ended, or a new log with 1
	}
	if known && from > mark.Seq+1 {
		e.missing += float64(from - mark.Seq - 1)
	}
	e.used = max(e.used+1, payload.Millis(e.now()))
	if e.moved[p.Node] == nil {
		e.moved[p.Node] = map[string]store.Mark{}
	}
	e.moved[p.Node][id.Epoch] = store.Mark{Seq: id.Seq, Used: e.used}
	return false, nil
}

// mark is the mark of an epoch, with the batch at hand.
func (e *events) mark(node, epoch string) (store.Mark, bool) {
	if m, ok := e.moved[node][epoch]; ok {
		return m, true
	}
	m, ok := e.nodes[node][epoch]
	return m, ok
}

// newest is the mark of the epoch that took an event last.
func (e *events) newest(node string) (m store.Mark, ok bool) {
	for _, epochs := range []map[string]store.Mark{e.nodes[node], e.moved[node]} {
		for _, x := range epochs {
			if !ok || x.Used > m.Used {
				m, ok = x, true
			}
		}
	}
	return m, ok
}

// refuse tells that a message is refused after all. Of a node's events, those
// behind it are refused from then on until the node sends it again: taken, they
// would move the mark past it.
func (e *events) refuse(m *Message) {
	if p, ok := event(m); ok && e.b.opts.Node == "" && m.From.Role == access.Node {
		e.refusing[p.Node] = true
	}
}

// The bounds of the log.
const (
	boundBytes = "bytes"
	boundAge   = "age"
)

// flush completes the batch: what the cloud has taken leaves the log, and so
// does what is beyond its bounds. It tells whether the batch needs a sync.
func (e *events) flush(sb *store.Batch) (sync bool) {
	if e.taken != nil {
		e.settle(sb, e.taken)
	}
	sync = e.bound(sb) || len(e.added) > 0
	for node, epochs := range e.moved {
		sync = true
		for epoch, m := range epochs {
			sb.PutMark(node, epoch, m)
		}
		e.prune(sb, node)
	}
	return sync
}

// settle takes out what the cloud has.
func (e *events) settle(sb *store.Batch, last *store.Event) {
	l := &e.next
	switch {
	case last.Seq < l.first && l.gap != nil && last.Seq >= l.gap.From:
		// Dropped while it was under way: the gap begins behind it.
		l.gap = &store.EventGap{From: last.Seq + 1, Before: last.Sum}
		sb.PutGap(l.marker())
	case last.Seq >= l.first && last.Seq <= l.last:
		sb.DeleteEvents(l.first, last.Seq)
		l.first, l.before, l.oldest, l.gap = last.Seq+1, last.Sum, e.timeOf(last.Seq+1), nil
	}
}

// marker is the record of the log's gap.
func (l *eventLog) marker() *store.Event {
	return &store.Event{Seq: l.first, Epoch: l.epoch, Time: l.gapped, Gap: l.gap, Before: l.before, Sum: l.before}
}

// maxAged bounds the events that one batch drops for their age, maxAgedTicks how
// many such batches follow each other.
const (
	maxAged      = 4096
	maxAgedTicks = 16
)

// bound drops the oldest events as far as the bounds ask for it. The newest
// event is never beyond the bound in bytes, so that what was acknowledged just
// now is there at least until the next.
func (e *events) bound(sb *store.Batch) (dropped bool) {
	l := &e.next
	if e.max > 0 && l.bytes() > e.max {
		// A sixteenth more than needed, so that a full log does not do this for
		// every event.
		goal := l.sum - (e.max - e.max/16)
		first := l.firstEvent()
		var err error
		n := sort.Search(int(l.last-first), func(i int) bool {
			r, ferr := e.find(first + uint64(i))
			err = errors.Join(err, ferr)
			return ferr == nil && r.Sum >= goal
		})
		if cut := min(first+uint64(n), l.last-1); err == nil && cut >= first {
			dropped = e.drop(sb, cut, boundBytes)
		} else if err != nil {
			e.b.log.Error("event log is over its bound, and the oldest events cannot be read", "error", err)
		}
	}
	if limit := payload.Millis(e.now().Add(-e.age)); e.age > 0 && l.oldest >= clockSet && l.oldest < limit {
		old, err := e.b.store.Events(l.firstEvent(), e.log.last, maxAged)
		if err != nil {
			e.b.log.Error("old events cannot be read", "error", err)
			return dropped
		}
		cut := uint64(0)
		for i := range old {
			if old[i].Time >= limit || old[i].Time < clockSet {
				break
			}
			cut = old[i].Seq
		}
		dropped = cut > 0 && e.drop(sb, cut, boundAge) || dropped
	}
	return dropped
}

// firstEvent is the number of the oldest event, behind the marker of a gap.
func (l *eventLog) firstEvent() uint64 {
	if l.gap != nil {
		return l.first + 1
	}
	return l.first
}

// drop replaces the oldest events up to the number cut with the marker of a gap.
func (e *events) drop(sb *store.Batch, cut uint64, bound string) bool {
	last, err := e.find(cut)
	if err != nil {
		e.b.log.Error("event log is over its bound, and the oldest events cannot be read", "error", err)
		return false
	}
	l := &e.next
	cut = last.Seq
	e.dropped[bound] += float64(cut - l.firstEvent() + 1)
	if l.gap == nil {
		l.gap = &store.EventGap{From: l.first, Before: l.before}
	}
	if l.first < cut {
		sb.DeleteEvents(l.first, cut-1)
	}
	l.first, l.before, l.epoch, l.gapped, l.oldest = cut, last.Sum, last.Epoch, payload.Millis(e.now()), e.timeOf(cut+1)
	sb.PutGap(l.marker())
	return true
}

// find gives the place and time of an event, or of the next one that is there:
// a store that was repaired may lack some.
func (e *events) find(seq uint64) (*store.Event, error) {
	if len(e.added) > 0 && seq >= e.added[0].Seq {
		if i := seq - e.added[0].Seq; i < uint64(len(e.added)) {
			return &e.added[i], nil
		}
		return nil, fmt.Errorf("no event %d", seq)
	}
	found, err := e.b.store.Events(seq, e.log.last, 1)
	if err == nil && len(found) == 0 && len(e.added) > 0 {
		return &e.added[0], nil
	}
	if err == nil && len(found) == 0 {
		err = fmt.Errorf("no event %d", seq)
	}
	if err != nil {
		return nil, err
	}
	return &found[0], nil
}

// timeOf is when an event was taken, 0 where there is none.
func (e *events) timeOf(seq uint64) int64 {
	if seq > e.next.last {
		return 0
	}
	r, err := e.find(seq)
	if err != nil {
		return 0
	}
	return r.Time
}

// prune takes out the marks of a node's epochs that are over the bound.
func (e *events) prune(sb *store.Batch, node string) {
	epochs := maps.Clone(e.nodes[node])
	if epochs == nil {
		return
	}
	maps.Copy(epochs, e.moved[node])
	for len(epochs) > maxEpochs {
		least := ""
		for epoch, m := range epochs {
			if least == "" || m.Used < epochs[least].Used {
				least = epoch
			}
		}
		delete(epochs, least)
		sb.DeleteMark(node, least)
		e.gone = append(e.gone, [2]string{node, least})
	}
}

// done tells what became of the batch.
func (e *events) done(err error) {
	if err != nil {
		e.next = e.log
		for node := range e.moved {
			e.refusing[node] = true
		}
	} else {
		e.log, e.taken = e.next, nil
		for node, epochs := range e.moved {
			if e.nodes[node] == nil {
				e.nodes[node] = map[string]store.Mark{}
			}
			maps.Copy(e.nodes[node], epochs)
		}
		for _, g := range e.gone {
			delete(e.nodes[g[0]], g[1])
		}
		e.metrics.logged.Add(float64(len(e.added)))
		e.metrics.twice.Add(e.twice)
		e.metrics.missing.Add(e.missing)
		for bound, n := range e.dropped {
			e.metrics.dropped.WithLabelValues(bound).Add(n)
			e.b.denied.log(e.b.log, "events dropped, the cloud gets a gap marker in their place", bound, "bound", bound, "events", n)
		}
		e.show()
		if len(e.added) > 0 || len(e.dropped) > 0 {
			select {
			case e.signal <- struct{}{}:
			default:
			}
		}
	}
	e.added, e.gone, e.twice, e.missing = e.added[:0], e.gone[:0], 0, 0
	clear(e.moved)
	clear(e.dropped)
}

// tick drops what has become too old while nothing was published.
func (e *events) tick() {
	for range maxAgedTicks {
		sb := e.b.store.NewBatch()
		sync := e.flush(sb)
		err := e.b.write(sb, sync)
		e.done(err)
		if err != nil || !sync {
			return
		}
	}
}

// Epoch writes an epoch as it travels.
func Epoch(e uint64) string { return fmt.Sprintf("%016x", e) }
