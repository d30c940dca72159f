package broker

import (
	"slices"
	"sync"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Bounds of what waits for one client in memory. The queue of a session that
// outlives its connection goes on in the store, up to Options.Queue; a client
// without such a session is disconnected: the fabric's parts repair themselves
// at reconnect, and a publisher never waits for it.
const (
	maxQueued      = 65536
	maxQueuedBytes = 16 << 20
	// A stored session keeps less in memory, as it has the store.
	maxPage      = 512
	maxPageBytes = 1 << 20
	// maxWindow bounds what is in flight to a client that sets no Receive Maximum.
	maxWindow = 256
	// maxSubscriptions bounds the subscriptions of a session.
	maxSubscriptions = 16384
)

// session is what the broker keeps of a client: its subscriptions, the messages
// that wait for it, and the state of deliveries under way. One that is not
// stored ends with its connection.
type session struct {
	b  *Broker
	id string // the client id, with the identity in front

	// The core's own.
	num      uint64 // its name in the store
	stored   bool
	expiry   uint32    // in seconds, store.NeverExpires for never
	left     time.Time // when the client went; zero while it is connected
	subs     map[string]*subscription
	replays  []*replay
	next     uint64      // the number of the next message
	will     *store.Will // of a client that went, until its delay is over
	willDue  time.Time
	willFrom access.Identity
	told     bool   // its bound was reached and logged
	hit      uint64 // mark of the message that it was matched with last
	hitAt    int    // where its delivery is
	ended    bool

	mu struct {
		sync.Mutex
		conn *conn // nil while the client is away
		// waiting is what goes out next, in order; flight what the client has
		// not acknowledged, in the order of sending.
		waiting []*entry
		bytes   int // of waiting
		flight  []*entry
		byID    map[uint16]*entry
		// paged messages are in the store alone, from number from on; they come
		// after all that waits.
		paged int
		from  uint64
		// total and totalBytes are all messages not acknowledged, wherever.
		total      int
		totalBytes int64
		// sentTo is the newest number that may have gone out, on whatever
		// connection.
		sentTo   uint64
		released []uint64 // PUBREC has come, PUBCOMP not, while the client is away
		// done and completed are acknowledged but still in the store.
		done, completed []uint64
		asked           bool // the core is to remove them
		dropped         int  // since the client went
		received        map[uint16]recvState
		replaying       bool // there are retained messages to be queued
	}
}

// recvState is how far a QoS 2 publish of the client's is.
type recvState uint8

const (
	recvPending  recvState = iota + 1 // to be stored, PUBREC not sent
	recvRecorded                      // PUBREC sent
)

// entry is one message for one session.
type entry struct {
	m        *Message
	n        uint64 // 0 for QoS 0
	size     int
	subIDs   []int
	share    string
	qos      byte
	retain   bool
	dup      bool
	released bool // PUBREC has come
	finished bool // acknowledged; it is in flight no more
}

// packetID comes from the number, so that it is the same after a crash.
func packetID(n uint64) uint16 { return uint16((n-1)%65535) + 1 }

// replay walks the retained messages for a new subscription, a page at a time.
// What changes meanwhile is left out: it is delivered as it comes.
type replay struct {
	store.Replay
	upTo uint64 // what is newer is delivered live
}

func newSession(b *Broker, id string, num uint64) *session {
	return &session{b: b, id: id, num: num, next: 1}
}

// Readiness of a session to take a message, best last.
const (
	unready = iota
	away    // with a queue for later
	busy    // connected, but its window is full
	ready
)

func (s *session) readiness() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.mu.conn == nil && s.stored:
		return away
	case s.mu.conn == nil:
		return unready
	case len(s.mu.byID) >= s.mu.conn.window || len(s.mu.waiting) > 0 || s.mu.paged > 0:
		return busy
	default:
		return ready
	}
}

// hasRoom tells whether the queue has room for a message.
func (s *session) hasRoom(size int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.total < s.b.opts.Queue.Messages && s.mu.totalBytes+int64(size) <= s.b.opts.Queue.Bytes
}

// count counts a message that is about to be stored.
func (s *session) count(size int) {
	s.mu.Lock()
	s.tally(1, size)
	s.mu.Unlock()
}

func (s *session) uncount(size int) {
	s.mu.Lock()
	s.tally(-1, -size)
	s.mu.Unlock()
}

// tally keeps the accounts of a stored session.
func (s *session) tally(messages, bytes int) {
	s.mu.total += messages
	s.mu.totalBytes += int64(bytes)
	s.b.stats.queued.Add(int64(messages))
	s.b.stats.queuedBytes.Add(int64(bytes))
}

// enqueue hands a message over for delivery; one of a stored session is in the
// store by now. It gives the connection to wake, and an error where that one
// lags too far behind.
func (s *session) enqueue(e *entry) (*conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.mu.conn
	if e.n > 0 && s.stored {
		if c == nil || s.mu.paged > 0 || len(s.mu.waiting) >= maxPage || s.mu.bytes+e.size > maxPageBytes && len(s.mu.waiting) > 0 {
			if s.mu.paged == 0 {
				s.mu.from = e.n
			}
			s.mu.paged++
			return c, nil
		}
	} else {
		if c == nil {
			return nil, nil // QoS 0 for a client that is away
		}
		if len(s.mu.waiting) >= maxQueued || s.mu.bytes+e.size > maxQueuedBytes && len(s.mu.waiting) > 0 {
			if s.stored { // QoS 0
				s.b.metrics.drop("queue_full", 1)
				return c, nil
			}
			return c, errSlow
		}
	}
	s.mu.waiting = append(s.mu.waiting, e)
	s.mu.bytes += e.size
	return c, nil
}

// attach makes a connection the one that gets what waits. It gives the PUBRELs
// that are to be sent again.
func (s *session) attach(c *conn) (pubrels []uint16, dropped int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mu.conn = c
	for _, n := range s.mu.released {
		e := &entry{n: n, qos: 2, released: true}
		s.mu.flight = append(s.mu.flight, e)
		s.track(packetID(n), e)
		pubrels = append(pubrels, packetID(n))
	}
	s.mu.released = nil
	dropped, s.mu.dropped = s.mu.dropped, 0
	return pubrels, dropped
}

// detach takes the connection out, where it still is this one. What it did not
// deliver of a stored session is in the store.
func (s *session) detach(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.conn != c {
		return
	}
	s.mu.conn = nil
	if !s.stored {
		return // it is ending
	}
	from := s.mu.from
	if s.mu.paged == 0 {
		from = s.next
	}
	for _, e := range s.mu.waiting {
		if e.n > 0 {
			s.mu.paged++
			from = min(from, e.n)
		}
	}
	for _, e := range s.mu.flight {
		switch {
		case e.finished:
		case e.released:
			s.mu.released = append(s.mu.released, e.n)
		default:
			s.mu.paged++
			from = min(from, e.n)
		}
	}
	s.mu.from = from
	s.mu.waiting, s.mu.bytes, s.mu.flight = nil, 0, nil
	clear(s.mu.byID)
}

// fill appends packets to buf, as many as the client may get. page tells that
// there is more in the store, ask that the core is to tidy up there.
func (s *session) fill(c *conn, buf []byte) (out []byte, page, ask bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.conn != c {
		return buf, false, false
	}
	now := time.Now()
	i := 0
	for ; i < len(s.mu.waiting) && len(buf) < maxWrite; i++ {
		e := s.mu.waiting[i]
		// One of QoS 2 that may have gone out goes out again, or the client would
		// wait for its PUBREL for ever [MQTT-4.3.3-7].
		if e.m.expired(now) && (e.qos < 2 || !e.dup) {
			s.b.metrics.drop("expired", 1)
			s.finish(e)
			s.mu.bytes -= e.size
			continue
		}
		p := outPublish{m: e.m, qos: e.qos, retain: e.retain, dup: e.dup, subIDs: e.subIDs}
		if e.qos > 0 {
			if len(s.mu.byID) >= c.window {
				break
			}
			p.id = packetID(e.n)
			if s.mu.byID[p.id] != nil {
				break // 65,535 messages ago; it will be acknowledged
			}
		}
		s.mu.bytes -= e.size
		var ok bool
		if buf, ok = c.append(buf, &p, now); !ok {
			// The client's own maximum: the message counts as delivered [MQTT-3.1.2-25].
			s.b.metrics.drop("too_large", 1)
			s.finish(e)
			continue
		}
		s.b.stats.sentPublish(len(e.m.Payload))
		if e.qos > 0 {
			s.mu.sentTo = max(s.mu.sentTo, e.n)
			s.track(p.id, e)
			s.mu.flight = append(s.mu.flight, e)
		}
	}
	s.mu.waiting = shift(s.mu.waiting, i)
	return buf, len(s.mu.waiting) == 0 && s.mu.paged > 0, s.ask()
}

// shift takes the first n entries off a queue, without moving more than it takes.
func shift(q []*entry, n int) []*entry {
	if n == 0 {
		return q
	}
	clear(q[:n])
	rest := len(q) - n
	switch {
	case rest == 0 && cap(q) > 256:
		return nil
	case rest <= n:
		copy(q, q[n:])
		clear(q[max(rest, n):])
		return q[:rest]
	default:
		return q[n:]
	}
}

func (s *session) track(id uint16, e *entry) {
	if s.mu.byID == nil {
		s.mu.byID = map[uint16]*entry{}
	}
	s.mu.byID[id] = e
}

// page reads the next messages from the store. It belongs to the writer.
func (s *session) page(c *conn) error {
	s.mu.Lock()
	from, ok := s.mu.from, s.mu.conn == c && s.mu.paged > 0
	s.mu.Unlock()
	if !ok {
		return nil
	}
	msgs, err := s.b.store.Queue(s.num, from, maxPage, maxPageBytes)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mu.conn != c {
		return nil
	}
	for i := range msgs {
		q := &msgs[i]
		if s.mu.paged == 0 {
			return nil // the rest came meanwhile and waits in memory
		}
		m := &Message{Topic: topic.Topic(q.Topic), Payload: q.Payload, QoS: q.QoS, Expires: q.Expires, Props: q.Props}
		e := &entry{m: m, n: q.N, size: q.Size, subIDs: q.SubIDs, share: q.Share, qos: q.QoS, retain: q.Retain}
		e.dup = q.N <= s.mu.sentTo
		s.mu.waiting = append(s.mu.waiting, e)
		s.mu.bytes += e.size
		s.mu.paged--
		s.mu.from = q.N + 1
	}
	if len(msgs) == 0 && s.mu.paged > 0 {
		// Our count is wrong. The client gets what there is and goes on.
		s.b.log.Error("messages of a session are missing in the store", "client", s.id, "messages", s.mu.paged)
		s.b.metrics.drop("missing", s.mu.paged)
		s.tally(-s.mu.paged, 0)
		s.mu.paged = 0
	}
	return nil
}

// finish is the end of a message for this session.
func (s *session) finish(e *entry) {
	if e.n == 0 || e.finished {
		return
	}
	e.finished = true
	if e.released {
		if s.stored {
			s.mu.completed = append(s.mu.completed, e.n)
		}
		return
	}
	if s.stored {
		s.tally(-1, -e.size)
		s.mu.done = append(s.mu.done, e.n)
	}
}

// ask tells whether the core is to be asked to tidy up the store.
func (s *session) ask() bool {
	if s.mu.asked || len(s.mu.done) == 0 && len(s.mu.completed) == 0 {
		return false
	}
	s.mu.asked = true
	return true
}

// acked takes a PUBACK or PUBCOMP. It tells whether
// the core has to tidy up, and whether the packet id was known.
func (s *session) acked(c *conn, id uint16, kind byte) (ask, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.mu.byID[id]
	if s.mu.conn != c || e == nil || (e.qos == 2) != (kind != packets.Puback) || e.released != (kind == packets.Pubcomp) {
		return false, false
	}
	delete(s.mu.byID, id)
	s.finish(e)
	s.trimFlight()
	return s.ask(), true
}

// refused takes a PUBREC that refuses: the message is done with.
func (s *session) refused(c *conn, id uint16) (ask, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.mu.byID[id]
	if s.mu.conn != c || e == nil || e.qos != 2 || e.released {
		return false, false
	}
	delete(s.mu.byID, id)
	s.finish(e)
	s.trimFlight()
	return s.ask(), true
}

func (s *session) trimFlight() {
	i := 0
	for i < len(s.mu.flight) && s.mu.flight[i].finished {
		i++
	}
	s.mu.flight = shift(s.mu.flight, i)
}

// pubrec finds the QoS 2 message that the client says it has, nil for an
// unknown packet id. again tells that this was known.
func (s *session) pubrec(c *conn, id uint16) (e *entry, again bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e = s.mu.byID[id]
	if s.mu.conn != c || e == nil || e.qos != 2 {
		return nil, false
	}
	return e, e.released
}

// release notes that the client has a QoS 2 message; the store is to know in the
// same batch. undo takes it back where that failed.
func (s *session) release(e *entry) (undo func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.released = true
	if !s.stored {
		return func() {}
	}
	s.tally(-1, -e.size)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		e.released = false
		s.tally(1, e.size)
		if i := slices.Index(s.mu.released, e.n); i >= 0 { // the client went in the same batch
			s.mu.released = slices.Delete(s.mu.released, i, i+1)
			if s.mu.paged == 0 || e.n < s.mu.from {
				s.mu.from = e.n
			}
			s.mu.paged++
		}
	}
}

// tidy puts into the batch what was acknowledged. undo is for the case that the
// store refuses it.
func (s *session) tidy(sb *store.Batch) (undo func()) {
	s.mu.Lock()
	done, completed := s.mu.done, s.mu.completed
	s.mu.done, s.mu.completed, s.mu.asked = nil, nil, false
	s.mu.Unlock()
	for _, n := range done {
		sb.Dequeue(s.num, n)
	}
	for _, n := range completed {
		sb.Complete(s.num, n)
	}
	return func() { // the next acknowledgement asks again
		s.mu.Lock()
		s.mu.done = append(done, s.mu.done...)
		s.mu.completed = append(completed, s.mu.completed...)
		s.mu.Unlock()
	}
}

// full tells whether the queue is over its bound.
func (s *session) full() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mu.total > s.b.opts.Queue.Messages || s.mu.totalBytes > s.b.opts.Queue.Bytes
}

// trim drops the oldest messages of a session whose client is away until the
// queue is within its bound.
func (s *session) trim(sb *store.Batch) (dropped int, err error) {
	for s.full() {
		s.mu.Lock()
		from, paged := s.mu.from, s.mu.paged
		s.mu.Unlock()
		if paged == 0 {
			return dropped, nil
		}
		msgs, err := s.b.store.Queue(s.num, from, maxPage, maxPageBytes)
		if err != nil || len(msgs) == 0 {
			return dropped, err
		}
		for i := range msgs {
			if !s.full() {
				break
			}
			sb.Dequeue(s.num, msgs[i].N)
			s.mu.Lock()
			s.tally(-1, -msgs[i].Size)
			s.mu.paged--
			s.mu.from = msgs[i].N + 1
			s.mu.dropped++
			s.mu.Unlock()
			dropped++
		}
	}
	return dropped, nil
}

// unsent gives the messages of a shared subscription that another member may
// have when the session ends [MQTT-4.8.2-5]: all but those of QoS 2 that were sent.
func (s *session) unsent() []*entry {
	s.mu.Lock()
	var out []*entry
	for _, e := range s.mu.flight {
		if e.share != "" && e.qos == 1 && !e.finished {
			out = append(out, e)
		}
	}
	for _, e := range s.mu.waiting {
		if e.share != "" && (e.qos < 2 || !e.dup) {
			out = append(out, e)
		}
	}
	from, paged, sentTo := s.mu.from, s.mu.paged, s.mu.sentTo
	s.mu.Unlock()
	for paged > 0 {
		msgs, err := s.b.store.Queue(s.num, from, maxPage, maxPageBytes)
		if err != nil || len(msgs) == 0 {
			break
		}
		for i := range msgs {
			q := &msgs[i]
			paged--
			from = q.N + 1
			if q.Share == "" || q.QoS == 2 && q.N <= sentTo {
				continue
			}
			m := &Message{Topic: topic.Topic(q.Topic), Payload: q.Payload, QoS: q.QoS, Expires: q.Expires, Props: q.Props}
			out = append(out, &entry{m: m, share: q.Share, qos: q.QoS, retain: q.Retain})
		}
	}
	return out
}

// record is the session's own record.
func (s *session) record() store.Session {
	r := store.Session{ClientID: s.id, Num: s.num, Expiry: s.expiry, Next: s.next}
	s.mu.Lock()
	r.Sent = s.mu.sentTo
	s.mu.Unlock()
	if !s.left.IsZero() {
		r.Left = s.left.UnixMilli()
	}
	for _, p := range s.replays {
		r.Replays = append(r.Replays, p.Replay)
	}
	return r
}

// due is when the session ends by itself, zero for never.
func (s *session) due() time.Time {
	if s.left.IsZero() || s.expiry == store.NeverExpires {
		return time.Time{}
	}
	return s.left.Add(time.Duration(s.expiry) * time.Second)
}
