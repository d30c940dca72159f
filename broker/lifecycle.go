package broker

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// errSessions refuses one more session that outlives its connection.
var errSessions = errors.New("too many sessions; connect with clean start and without session expiry, or wait until one expires")

// load reads the store.
func (b *Broker) load() ([]store.Will, error) {
	err := b.store.EachRetained(func(r store.Retained) error {
		b.retained.put(&Message{Topic: topic.Topic(r.Topic), Payload: r.Payload, QoS: r.QoS, Retain: true, Expires: r.Expires, Props: r.Props})
		return nil
	})
	if err != nil {
		return nil, err
	}
	sessions, err := b.store.Sessions(maxWindow)
	if err != nil {
		return nil, err
	}
	if err := b.events.load(b.store); err != nil {
		return nil, err
	}
	wills, err := b.store.Wills()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	for i := range sessions {
		b.restore(&sessions[i], now)
	}
	// A Will with a delay waits for its client from now on.
	now = time.Now()
	var due []store.Will
	for _, w := range wills {
		s := b.sessions[w.ClientID]
		if s == nil || w.Delay == 0 {
			due = append(due, w)
			continue
		}
		s.will, s.willDue = &w, now.Add(time.Duration(w.Delay)*time.Second)
	}
	return due, nil
}

// restore makes a session of its records.
func (b *Broker) restore(r *store.Stored, now time.Time) {
	s := newSession(b, r.ClientID, r.Num)
	s.stored, s.expiry, s.subs = true, r.Expiry, map[string]*subscription{}
	s.left = now
	if r.Left != 0 {
		s.left = time.UnixMilli(r.Left)
		if s.left.After(now) { // the clock was set back
			s.left = now
		}
	} else {
		// The broker was killed while the client was connected: what was in
		// flight is not known, but not more than a window.
		r.Sent = max(r.Sent, r.Window)
	}
	s.next = max(r.Next, r.Last+1)
	for _, n := range r.Released {
		s.next = max(s.next, n+1)
	}
	for _, p := range r.Replays {
		s.replays = append(s.replays, &replay{Replay: p})
	}
	for _, sub := range r.Subscriptions {
		x := &subscription{Subscription: sub, session: s}
		s.subs[sub.Filter] = x
		b.subs.add(x)
	}
	s.tally(r.Messages, int(r.Bytes))
	s.mu.paged, s.mu.from = r.Messages, r.First
	s.mu.replaying = len(s.replays) > 0
	s.mu.released, s.mu.sentTo = r.Released, r.Sent
	s.mu.received = map[uint16]recvState{}
	for _, id := range r.Received {
		s.mu.received[id] = recvRecorded
	}
	b.lastNum = max(b.lastNum, r.Num)
	b.sessions[r.ClientID] = s
	b.stored++
	b.stats.stored.Add(1)
}

// inheritWills publishes the Wills of those who were connected when a killed
// broker died: they are not connected now. It waits for the first way in, so
// that the interceptors are ready, and whoever comes sees the outcome.
func (b *Broker) inheritWills() {
	b.inherit.Do(func() {
		for i := range b.orphans {
			w := &b.orphans[i]
			b.inbox.put(false, op{fn: func(t *tx, r *result) { t.publishWill(r, w, access.Identity{}) }, done: b.willDone(w)})
		}
		b.orphans = nil
	})
}

// attached is what a client gets to know with its CONNACK.
type attached struct {
	present bool
	pubrels []uint16
}

// attach gives a connection its session. It is called on the core.
func (b *Broker) attach(t *tx, r *result, c *conn, clean bool, a *attached) {
	id, now := c.cl.ID, time.Now()
	s := b.sessions[id]
	if s != nil && s.left.IsZero() {
		// Never with a claim, which waits until the connection before is gone.
		r.err = fmt.Errorf("session of %s is in use", id)
		return
	}
	if s != nil && (clean || s.due().Before(now) && !s.due().IsZero()) { // [MQTT-3.1.2-4]
		b.end(t, r, s)
		s = nil
	}
	a.present = s != nil
	var will *store.Will // that waits for its delay
	if s == nil {
		if c.expiry > 0 && b.stored >= b.opts.MaxSessions {
			r.err = errSessions
			return
		}
		b.lastNum++
		s = newSession(b, id, b.lastNum)
		s.stored = c.expiry > 0
		b.sessions[id] = s
		if s.stored {
			b.keepStored(s, 1)
		}
		t.undoing(func() { b.remove(s) })
	} else {
		left, expiry := s.left, s.expiry
		will = s.will
		t.undoing(func() {
			s.detach(c)
			s.left, s.expiry, s.will = left, expiry, will
		})
		if s.will != nil { // it came back in time [MQTT-3.1.3-9]
			s.will, b.wills[id] = nil, nil
		}
	}
	s.left, s.expiry, s.told = time.Time{}, c.expiry, false
	if s.stored {
		t.undoing(s.tidy(t.sb))
		if err := t.sb.PutSession(s.record()); err != nil {
			r.err = err
			return
		}
		r.stored, t.sync = true, true
	}
	if c.will != nil {
		// One whose client is refused after all must not be published.
		t.undoing(func() { b.wills[id] = will })
		b.wills[id] = c.will
		t.sync = true
	}
	c.session = s
	var dropped int
	a.pubrels, dropped = s.attach(c)
	if dropped > 0 {
		b.log.Warn("messages were dropped while the client was away: its queue was full", "client", id, "messages", dropped)
	}
	b.present(c, true)
	t.undoing(func() { b.present(c, false) })
}

// present tells of a client that came or went.
func (b *Broker) present(c *conn, up bool) {
	if up {
		b.stats.online(1)
	} else {
		b.stats.online(-1)
	}
	if b.opts.Presence != nil {
		b.opts.Presence(c.id, up)
	}
}

// detach ends a connection's part in its session, and the session where that
// does not outlive it. It is called on the core.
func (b *Broker) detach(t *tx, r *result, c *conn) {
	s, now := c.session, time.Now()
	s.detach(c)
	s.left, s.expiry = now, c.expiry
	b.present(c, false)
	w := c.will
	switch {
	case w == nil:
	case c.bye: // [MQTT-3.1.2-8] [MQTT-3.14.4-3]
		b.wills[s.id] = nil
	case w.Delay == 0 || s.expiry == 0:
		t.publishWill(r, w, c.id)
	default:
		s.will, s.willDue = w, now.Add(time.Duration(w.Delay)*time.Second)
		s.willFrom = c.id
		b.alarmFor(s.willDue)
	}
	if s.expiry == 0 {
		b.end(t, r, s)
		return
	}
	t.sync = true // what was sent is known from here on, and what is new is no duplicate
	if err := t.sb.PutSession(s.record()); err != nil {
		b.log.Error("session not stored", "client", s.id, "error", err)
	}
	b.alarmFor(s.due())
}

// end ends a session.
func (b *Broker) end(t *tx, r *result, s *session) {
	if s.will != nil { // the session's end comes before the delay's [MQTT-3.1.3.2.2]
		t.publishWill(r, s.will, s.willFrom)
		s.will = nil
	}
	left := s.unsent()
	b.remove(s)
	if s.stored {
		t.sb.DeleteSession(s.id, s.num)
		r.stored, t.sync = true, true // a session that has ended must not come back
		t.undoing(func() { b.unremove(s) })
	}
	t.rehome(r, left, s)
}

// remove takes a session out of the indexes.
func (b *Broker) remove(s *session) {
	if s.ended {
		return
	}
	s.ended = true
	for _, sub := range s.subs {
		b.subs.remove(sub)
	}
	if b.sessions[s.id] == s {
		delete(b.sessions, s.id)
	}
	if s.stored {
		b.keepStored(s, -1)
	}
}

// keepStored counts a stored session in or out, with what waits for it.
func (b *Broker) keepStored(s *session, n int) {
	b.stored += n
	b.stats.stored.Add(int64(n))
	s.mu.Lock()
	b.stats.queued.Add(int64(n * s.mu.total))
	b.stats.queuedBytes.Add(int64(n) * s.mu.totalBytes)
	s.mu.Unlock()
}

// unremove takes remove back.
func (b *Broker) unremove(s *session) {
	s.ended = false
	for _, sub := range s.subs {
		b.subs.add(sub)
	}
	b.sessions[s.id] = s
	b.keepStored(s, 1)
}

// publishWill publishes a Will and forgets it, as one that its client published.
func (t *tx) publishWill(r *result, w *store.Will, from access.Identity) {
	b := t.b
	m := fromWill(w)
	m.From = from
	b.wills[w.ClientID] = nil
	t.sync = true
	also, err := b.intercept([]*Message{&m})
	if err != nil {
		b.log.Warn("will not published", "client", w.ClientID, "topic", w.Topic, "error", err)
	} else {
		t.publish(r, []*Message{&m})
	}
	t.add(r, also)
}

// willDone tells of a Will that was refused; there is no client any more to tell.
func (b *Broker) willDone(w *store.Will) func(error) {
	return func(err error) {
		if err != nil {
			b.log.Warn("will not published", "client", w.ClientID, "topic", w.Topic, "error", err)
		}
	}
}

// alarmFor has the core look at its sessions at a time.
func (b *Broker) alarmFor(at time.Time) {
	if at.IsZero() || !b.alarmAt.IsZero() && !at.Before(b.alarmAt) {
		return
	}
	b.alarmAt = at
	b.alarm.Reset(max(time.Until(at), 0))
}

// schedule sets the alarm for what comes first.
func (b *Broker) schedule() {
	for _, s := range b.sessions {
		b.alarmFor(s.due())
		if s.will != nil {
			b.alarmFor(s.willDue)
		}
	}
}

// byItself publishes the Wills whose delay is over and ends the sessions whose
// time is.
func (b *Broker) byItself(t *tx, r *result) {
	now := time.Now()
	for _, s := range b.sessions {
		if s.will != nil && !s.willDue.After(now) {
			t.publishWill(r, s.will, s.willFrom)
			s.will = nil
		}
		if due := s.due(); !due.IsZero() && !due.After(now) {
			b.metrics.expired.Inc()
			b.stats.expired.Add(1)
			b.end(t, r, s)
		}
	}
}

// claim gives a client its client id. Whoever has it is disconnected, and the
// claim holds when all that was the other's is gone: so the other's Will comes
// before anything of the new client's.
func (b *Broker) claim(c *conn) error {
	id := c.cl.ID
	for {
		b.mu.Lock()
		if b.mu.closed {
			b.mu.Unlock()
			return ErrClosed
		}
		other := b.mu.claims[id]
		if other == nil {
			b.mu.claims[id], c.claimed = c, true
			b.mu.Unlock()
			return nil
		}
		b.mu.Unlock()
		b.hangUp(other, packets.ErrSessionTakenOver) // [MQTT-3.1.4-3]
		<-other.done
	}
}

// subscribe adds subscriptions and begins the replay of retained messages. It
// is called on the core.
func (b *Broker) subscribe(t *tx, r *result, c *conn, subs []store.Subscription) {
	s := c.session
	if s.ended {
		return
	}
	for _, sub := range subs {
		x := &subscription{Subscription: sub, session: s}
		old := s.subs[sub.Filter]
		if s.subs == nil {
			s.subs = map[string]*subscription{}
		}
		if old != nil {
			b.subs.remove(old)
		}
		s.subs[sub.Filter] = x
		b.subs.add(x)
		t.undoing(func() {
			if s.ended {
				return
			}
			b.subs.remove(x)
			delete(s.subs, sub.Filter)
			if old != nil {
				s.subs[sub.Filter] = old
				b.subs.add(old)
			}
		})
		if s.stored {
			if err := t.sb.PutSubscription(s.num, sub); err != nil {
				r.err = err
				return
			}
			r.stored, t.sync = true, true
		}
		if _, _, shared := shareName(sub.Filter); shared || sub.RetainHandling == 2 || sub.RetainHandling == 1 && old != nil { // [MQTT-3.3.1-10] [MQTT-3.3.1-11]
			continue
		}
		s.replay(&replay{Replay: store.Replay{Filter: sub.Filter, QoS: sub.QoS, SubID: sub.ID}, upTo: b.seq})
	}
	s.mu.Lock()
	idle := len(s.mu.waiting) == 0 && s.mu.paged == 0
	s.mu.Unlock()
	if idle { // else the writer asks for it when it comes to that
		b.page(t, r, s)
	}
}

// unsubscribe removes subscriptions. existed tells which there were.
func (b *Broker) unsubscribe(t *tx, r *result, c *conn, filters []string) (existed []bool) {
	s := c.session
	for _, f := range filters {
		sub := s.subs[f]
		existed = append(existed, sub != nil)
		if sub == nil {
			continue
		}
		b.subs.remove(sub)
		delete(s.subs, f)
		t.undoing(func() {
			if !s.ended {
				b.subs.add(sub)
				s.subs[f] = sub
			}
		})
		s.stopReplay(f)
		if s.stored {
			t.sb.DeleteSubscription(s.num, f)
			r.stored, t.sync = true, true
		}
	}
	return existed
}

// replay begins a replay; one for the same filter is replaced.
func (s *session) replay(p *replay) {
	s.stopReplay(p.Filter)
	s.replays = append(s.replays, p)
	s.mu.Lock()
	s.mu.replaying = true
	s.mu.Unlock()
}

func (s *session) stopReplay(filter string) {
	for i, p := range s.replays {
		if p.Filter == filter {
			s.replays = append(s.replays[:i:i], s.replays[i+1:]...)
			return
		}
	}
}

// wantsReplay tells the writer, which has nothing more to send, whether there
// are retained messages to come. It does so once for each page.
func (s *session) wantsReplay() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.mu.replaying || len(s.mu.waiting) > 0 || s.mu.paged > 0 {
		return false
	}
	s.mu.replaying = false
	return true
}

func (b *Broker) replayLater(s *session) {
	b.inbox.put(false, op{fn: func(t *tx, r *result) { b.page(t, r, s) }})
}

// page queues the next retained messages for a session's new subscriptions. It
// reads the index as it goes, so that a replay costs no memory.
func (b *Broker) page(t *tx, r *result, s *session) {
	if s.ended || len(s.replays) == 0 {
		return
	}
	now, start, bytes := time.Now(), len(t.deliveries), 0
	if s.stored {
		before := slices.Clone(s.replays)
		for i, p := range before {
			q := *p
			before[i] = &q
		}
		t.undoing(func() { s.replays = before })
	}
	for looked := 0; len(s.replays) > 0 && len(t.deliveries)-start < maxPage && bytes < maxPageBytes && looked < 8*maxPage; looked++ {
		p := s.replays[0]
		m, ok := b.retained.next(topic.Filter(p.Filter), p.After)
		if !ok {
			s.replays = s.replays[1:]
			continue
		}
		p.After = string(m.Topic)
		if m.expired(now) || m.seq > p.upTo {
			continue
		}
		e := &entry{m: m, qos: min(m.QoS, p.QoS), retain: true}
		if p.SubID > 0 { // [MQTT-3.3.4-3]
			e.subIDs = []int{p.SubID}
		}
		bytes += m.size()
		t.deliveries = append(t.deliveries, delivery{s, e})
	}
	for _, d := range t.deliveries[start:] {
		t.number(r, d)
	}
	s.mu.Lock()
	s.mu.replaying = len(s.replays) > 0
	c := s.mu.conn
	s.mu.Unlock()
	if s.stored {
		if err := t.sb.PutSession(s.record()); err != nil {
			b.log.Error("session not stored", "client", s.id, "error", err)
		}
	}
	if c != nil {
		t.touch(c)
	}
}
