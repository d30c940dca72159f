package broker

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// op is work for the core.
type op struct {
	// A client's publish: the message, who gets the answer, and how.
	m   *Message
	c   *conn
	id  uint16
	qos byte

	// Or messages of the process itself, and anything else.
	msgs      []*Message
	intercept bool
	// fn runs on the core, in the op's turn.
	fn func(*tx, *result)
	// done gets the outcome once everything is durable; it must not block.
	done func(error)
}

// result is what becomes of one op.
type result struct {
	err    error
	out    []*Message
	stored bool // it depends on the batch
	from   int  // its first delivery
	to     int
}

// delivery is a message on its way to one session.
type delivery struct {
	s *session
	e *entry
}

// tx is the commit under way.
type tx struct {
	b          *Broker
	sb         *store.Batch
	sync       bool
	results    []result
	deliveries []delivery
	retained   map[topic.Topic]before
	op         int        // the one that is applied
	undo       []undo     // where the store refuses the batch, last first
	full       []*session // over their bound
	homeless   []*entry   // of shared subscriptions, whose session ended in this batch
	touched    []*conn
}

// undo takes back what an op did.
type undo struct {
	op int
	fn func()
}

// undoing notes how to take back what the op did, if it depends on the batch.
func (t *tx) undoing(fn func()) { t.undo = append(t.undo, undo{t.op, fn}) }

// before is what a batch replaced, for the case that the store refuses it.
type before struct {
	m     *Message // nil for none
	dirty bool
}

// inbox is the core's queue. Whoever puts in more than it holds waits: a client
// whose packets cannot be taken is simply not read from.
type inbox struct {
	mu     sync.Mutex
	room   sync.Cond
	ops    []op
	closed bool
	wake   chan struct{} // capacity 1
}

// maxInbox bounds the ops that wait for the core, but for one client's own few.
const maxInbox = 4096

func (x *inbox) init() {
	x.room.L = &x.mu
	x.wake = make(chan struct{}, 1)
}

// put waits for room where wait is set. It tells whether the core will see them.
func (x *inbox) put(wait bool, ops ...op) bool {
	x.mu.Lock()
	for wait && len(x.ops) >= maxInbox && !x.closed {
		x.room.Wait()
	}
	if x.closed {
		x.mu.Unlock()
		return false
	}
	first := len(x.ops) == 0
	x.ops = append(x.ops, ops...)
	x.mu.Unlock()
	if first {
		select {
		case x.wake <- struct{}{}:
		default:
		}
	}
	return true
}

// take moves up to a batch of ops to buf.
func (x *inbox) take(buf []op) []op {
	x.mu.Lock()
	n := min(len(x.ops), maxBatch)
	buf = append(buf[:0], x.ops[:n]...)
	rest := copy(x.ops, x.ops[n:])
	clear(x.ops[rest:])
	x.ops = x.ops[:rest]
	more := rest > 0
	x.mu.Unlock()
	x.room.Broadcast()
	if more {
		select {
		case x.wake <- struct{}{}:
		default:
		}
	}
	return buf
}

func (x *inbox) len() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.ops)
}

func (x *inbox) close() {
	x.mu.Lock()
	x.closed = true
	x.mu.Unlock()
	x.room.Broadcast()
}

func (b *Broker) do(ctx context.Context, o op) error {
	done := make(chan error, 1)
	o.done = func(err error) { done <- err }
	select {
	case <-b.stopping:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	default:
	}
	if !b.inbox.put(true, o) {
		return ErrClosed
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

// core is the one goroutine that changes state.
func (b *Broker) core() {
	defer close(b.coreDone)
	defer b.inbox.close()
	defer b.alarm.Stop()
	tick := time.NewTicker(b.opts.Checkpoint)
	defer tick.Stop()
	report := time.NewTicker(sysInterval)
	defer report.Stop()
	batch := make([]op, 0, maxBatch)
	b.schedule()
	for {
		select {
		case <-b.inbox.wake:
			batch = b.inbox.take(batch)
			b.commit(batch)
			clear(batch)
		case <-tick.C:
			b.expire()
			b.events.tick()
			b.checkpoint()
		case <-report.C:
			b.report()
		case <-b.alarm.C:
			b.alarmAt = time.Time{}
			var err error
			b.commit([]op{{fn: b.byItself, done: func(e error) { err = e }}})
			if err != nil {
				b.log.Warn("sessions and wills that are due must wait", "error", err)
				b.alarmFor(time.Now().Add(time.Second))
				continue
			}
			b.schedule()
		case <-b.quit:
			for {
				if batch = b.inbox.take(batch); len(batch) == 0 {
					b.checkpoint()
					return
				}
				b.commit(batch)
			}
		}
	}
}

// commit runs a batch of work: intercept, store, wait for the disk, then
// acknowledge and publish.
func (b *Broker) commit(ops []op) {
	if len(ops) == 0 {
		return
	}
	t := &b.tx
	*t = tx{
		b: b, sb: b.store.NewBatch(), results: t.results[:0], deliveries: t.deliveries[:0], retained: t.retained,
		undo: t.undo[:0], full: t.full[:0], homeless: t.homeless[:0], touched: t.touched[:0],
	}
	if t.retained == nil {
		t.retained = map[topic.Topic]before{}
	}
	for i := range ops {
		t.results = append(t.results, result{})
		t.op = i
		t.apply(&ops[i], &t.results[i])
	}
	if b.putWills(t.sb) {
		t.sync = true
	}
	t.sync = b.events.flush(t.sb) || t.sync
	err := b.write(t.sb, t.sync)
	b.events.done(err)
	if err != nil {
		t.failed(err)
	} else {
		clear(b.wills)
	}
	for i := range ops {
		t.conclude(&ops[i], &t.results[i])
	}
	for _, s := range t.full {
		b.trim(s)
	}
	if len(t.homeless) > 0 {
		left := slices.Clone(t.homeless)
		b.inbox.put(false, op{fn: func(t *tx, r *result) { t.rehome(r, left, nil) }})
	}
	for _, c := range t.touched {
		c.touched = false
		c.kick()
	}
	clear(t.deliveries)
	clear(t.undo)
	clear(t.full)
	clear(t.homeless)
	clear(t.touched)
	clear(t.results)
	clear(t.retained)
}

// apply does one op as far as it can be done before the disk has it.
func (t *tx) apply(o *op, r *result) {
	r.from = len(t.deliveries)
	defer func() { r.to = len(t.deliveries) }()
	msgs := o.msgs
	if o.m != nil {
		msgs = []*Message{o.m}
	}
	if o.intercept {
		also, err := t.b.intercept(msgs)
		if err == nil && o.m != nil && o.c.refuse && o.m.QoS > 0 {
			err = t.b.refuseFull(o.m)
		}
		if err != nil {
			for _, m := range msgs {
				t.b.events.refuse(m)
			}
			r.err, msgs = err, nil
		}
		t.publish(r, msgs)
		t.add(r, also)
	}
	if o.fn != nil {
		o.fn(t, r)
	}
	if r.err == nil && o.m != nil && o.qos == 2 && o.c.session.stored {
		t.sb.PutReceived(o.c.session.num, o.id)
		r.stored, t.sync = true, true
	}
}

// add publishes messages past the interceptors.
func (t *tx) add(r *result, msgs []Message) {
	if len(msgs) == 0 {
		return
	}
	out := make([]*Message, len(msgs))
	for i := range msgs {
		m := msgs[i] // the index must not keep its neighbours in memory
		out[i] = &m
	}
	t.publish(r, out)
}

func (t *tx) publish(r *result, msgs []*Message) {
	for _, m := range msgs {
		event, drop, err := t.b.events.take(t.sb, m)
		if err != nil {
			r.err = err
			continue
		}
		r.stored = r.stored || event
		if drop {
			continue
		}
		if m.Retain {
			stored, synced := t.b.keep(t.sb, m, t.retained)
			r.stored, t.sync = r.stored || stored, t.sync || synced
		}
		r.out = append(r.out, m)
		t.route(r, m)
	}
}

// route finds who gets a message. What it puts into the queues of stored
// sessions is part of the batch.
func (t *tx) route(r *result, m *Message) {
	b, start := t.b, len(t.deliveries)
	b.hits++
	b.levels = b.subs.match(m.Topic, b.levels[:0])
	for _, l := range b.levels {
		for _, sub := range l.subs {
			s := sub.session
			if sub.NoLocal && s.id == m.ClientID { // [MQTT-3.8.3-3]
				continue
			}
			if s.hit != b.hits {
				s.hit, s.hitAt = b.hits, len(t.deliveries)
				t.deliveries = append(t.deliveries, delivery{s, &entry{m: m, qos: min(m.QoS, sub.QoS)}})
			}
			e := t.deliveries[s.hitAt].e
			e.qos = max(e.qos, min(m.QoS, sub.QoS)) // [MQTT-3.3.4-2]
			e.retain = e.retain || m.Retain && sub.RetainAsPublished
			if sub.ID > 0 {
				e.subIDs = append(e.subIDs, sub.ID)
			}
		}
	}
	for _, l := range b.levels {
		for _, g := range l.shares {
			t.share(g, nil, &entry{m: m, qos: m.QoS, retain: m.Retain})
		}
	}
	for _, d := range t.deliveries[start:] {
		slices.Sort(d.e.subIDs)
		t.number(r, d)
	}
}

// share gives a message to a member of a shared subscription.
func (t *tx) share(g *share, except *session, e *entry) {
	sub := g.pick(except)
	if sub == nil {
		return
	}
	e.share = g.filter
	e.qos = min(e.qos, sub.QoS)
	e.retain = e.retain && sub.RetainAsPublished
	e.subIDs = nil
	if sub.ID > 0 {
		e.subIDs = []int{sub.ID}
	}
	t.deliveries = append(t.deliveries, delivery{sub.session, e})
}

// rehome gives messages of a shared subscription to another member.
func (t *tx) rehome(r *result, left []*entry, except *session) {
	start := len(t.deliveries)
	for _, e := range left {
		if g := t.b.subs.share(e.share); g != nil {
			t.share(g, except, &entry{m: e.m, qos: e.m.QoS, retain: e.retain})
		}
	}
	for _, d := range t.deliveries[start:] {
		t.number(r, d)
	}
}

// number gives a delivery its place in the session's queue, and stores it where
// the session is stored.
func (t *tx) number(r *result, d delivery) {
	s, e, m := d.s, d.e, d.e.m
	e.size = m.size()
	if e.qos == 0 {
		return
	}
	e.n = s.next
	s.next++
	if !s.stored {
		return
	}
	q := queued(m, e.n, e.qos, e.retain, e.subIDs, e.share)
	e.size = t.sb.Enqueue(s.num, &q)
	s.count(e.size)
	r.stored = true
	if t.b.durability(m.Topic) == Sync {
		t.sync = true
	}
}

// failed takes back what the store refused.
func (t *tx) failed(err error) {
	b := t.b
	for i := len(t.undo) - 1; i >= 0; i-- {
		if u := t.undo[i]; t.results[u.op].stored {
			u.fn()
		}
	}
	b.undo(t.retained)
	for i := range t.results {
		r := &t.results[i]
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
				if b.durability(m.Topic) == Checkpoint {
					b.dirty[m.Topic] = struct{}{}
				}
			}
		}
	}
	for i := range t.results {
		r := &t.results[i]
		if !r.stored {
			continue
		}
		for _, d := range t.deliveries[r.from:r.to] {
			if d.s.stored && d.e.n > 0 {
				d.s.uncount(d.e.size)
			}
		}
		r.to = r.from
	}
	b.undone()
}

// conclude answers one op and hands its messages out.
func (t *tx) conclude(o *op, r *result) {
	if o.m != nil {
		o.c.concluded(o, r.err)
		t.touch(o.c)
	}
	if o.done != nil {
		o.done(r.err)
	}
	for _, m := range r.out {
		t.b.watched(m)
	}
	for _, d := range t.deliveries[r.from:r.to] {
		if d.s.ended {
			if d.e.share != "" {
				t.homeless = append(t.homeless, d.e)
			}
			continue
		}
		c, err := d.s.enqueue(d.e)
		if err != nil {
			c.stop(err)
		}
		if c != nil {
			t.touch(c)
		}
		if d.s.stored && d.e.n > 0 && d.s.full() {
			t.full = append(t.full, d.s)
		}
	}
}

func (t *tx) touch(c *conn) {
	if !c.touched {
		c.touched = true
		t.touched = append(t.touched, c)
	}
}

// errQueueFull refuses a message for which a session has no room. As nothing of
// it is kept, a publisher of MQTT 3.1.1 is disconnected, to send it again.
var errQueueFull = errors.New("the queue of a session that waits for this message is full; send it again later")

// refuseFull tells whether a session's queue has no room for the message.
func (b *Broker) refuseFull(m *Message) error {
	b.levels = b.subs.match(m.Topic, b.levels[:0])
	for _, l := range b.levels {
		for _, sub := range l.subs {
			if s := sub.session; s.stored && sub.QoS > 0 && !s.hasRoom(m.size()) {
				return errQueueFull
			}
		}
	}
	return nil
}

// trim sees to a session whose queue is over its bound: a client that is
// connected does not read and is disconnected, the oldest messages go.
func (b *Broker) trim(s *session) {
	if !s.full() || s.ended {
		return
	}
	s.mu.Lock()
	c := s.mu.conn
	s.mu.Unlock()
	if c != nil {
		s.detach(c)
		c.stop(errSlow)
	}
	sb := b.store.NewBatch()
	n, err := s.trim(sb)
	if err = errors.Join(err, b.write(sb, false)); err != nil {
		b.log.Error("queue not trimmed", "client", s.id, "error", err)
		return
	}
	b.metrics.drop("queue_full", n)
	if n > 0 && !s.told {
		s.told = true
		b.log.Warn("queue full: the oldest messages are dropped", "client", s.id, "messages", b.opts.Queue.Messages, "bytes", b.opts.Queue.Bytes)
	}
}

// tidyLater has the core remove from the store what a client acknowledged.
func (b *Broker) tidyLater(s *session) { b.inbox.put(false, b.tidyOp(s)) }

func (b *Broker) tidyOp(s *session) op {
	return op{fn: func(t *tx, r *result) {
		if !s.ended {
			t.undoing(s.tidy(t.sb))
			r.stored = true
		}
	}}
}

// intercept asks the interceptors about the messages of one op. When one is
// refused none is published, and what they added goes with them; only what was
// added to the refused one, its answer, remains.
func (b *Broker) intercept(msgs []*Message) (also []Message, err error) {
	for i, m := range msgs {
		before := len(also)
		for _, ic := range b.opts.Interceptors {
			more, err := ic.Intercept(m)
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

// putWills adds the Wills that changed; they stay noted until a commit took
// them. Unsynced, they would stay in the process's own memory.
func (b *Broker) putWills(sb *store.Batch) (put bool) {
	for id, w := range b.wills {
		put = true
		if w == nil {
			sb.DeleteWill(id)
		} else if err := sb.PutWill(*w); err != nil {
			b.log.Error("will not stored", "client", id, "error", err)
		}
	}
	return put
}

// durability is the rule for a topic.
func (b *Broker) durability(t topic.Topic) Durability {
	if len(t) > 0 && t[0] == '$' {
		return memory
	}
	return b.opts.Durability(t)
}

// concluded answers a publish.
func (c *conn) concluded(o *op, err error) {
	if err != nil {
		c.refused(o.m, err)
	}
	if o.qos == 0 {
		return
	}
	s := c.session
	switch {
	case o.qos == 1:
		c.unacked.Add(-1)
	case err == nil:
		s.mu.Lock()
		s.mu.received[o.id] = recvRecorded
		s.mu.Unlock()
	default: // [MQTT-4.3.3-9]
		c.forget2(o.id)
	}
	c.answerPublish(o.qos, o.id, err)
}

// answerPublish acknowledges a publish, or refuses it.
func (c *conn) answerPublish(qos byte, id uint16, err error) {
	kind := packets.Puback
	if qos == 2 {
		kind = packets.Pubrec
	}
	if err == nil {
		c.ack(kind, id)
		return
	}
	var r *Refusal
	refused := errors.As(err, &r)
	if !c.v5 {
		if !refused {
			// MQTT 3.1.1 has no negative answer. What could not be stored must
			// not be acknowledged: end the connection.
			c.stop(err)
			return
		}
		c.ack(kind, id) // a refused message may be acknowledged [MQTT 3.1.1, 3.3.5-2]
		return
	}
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: kind}, PacketID: id}
	pk.ReasonCode, pk.Properties.ReasonString = CodeImplementation, err.Error()
	switch {
	case refused:
		pk.ReasonCode, pk.Properties.ReasonString = r.Code, r.Reason
	case errors.Is(err, store.ErrDiskFull), errors.Is(err, errQueueFull):
		pk.ReasonCode = CodeQuotaExceeded
	}
	c.answer(c.encode(pk)...)
}
