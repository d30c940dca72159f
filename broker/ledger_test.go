package broker_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/mochi-mqtt/server/v2/packets"
)

// ledger is what a few clients know together of their sessions and messages,
// and what a broker owes them for it: it is the judge of the crash suite and of
// the soak. It takes what was sent before it is sent, and what was received
// after it was, so that whatever it calls acknowledged is.
type ledger struct {
	now     time.Time
	seq     int // of the entry
	clients []*lClient
	msgs    map[string]*lMsg
	topics  map[string]*lTopic // retained ones
	crashed int                // seq of the last crash
	started time.Time          // of the broker
	lax     bool               // time is real: close calls are not judged
	err     error
}

// lMsg is a published message. Its payload is its key.
type lMsg struct {
	key, topic string
	from, n    int // n counts the publisher's messages
	qos        byte
	retain     bool
	empty      bool
	expiry     uint32
	expires    time.Time
	sent       int // seq; 0 for a Will that is not published yet
	acked      int // PUBACK or PUBREC
	done       int // PUBACK or PUBCOMP
	sends      int
}

// lTopic is a retained topic, which has one writer.
type lTopic struct {
	acked int // newest n that was acknowledged
	all   []*lMsg
}

type lSub struct {
	filter  string
	qos     byte
	sent    int
	acked   int
	leaving int            // UNSUBSCRIBE was sent
	left    int            // UNSUBACK came
	floor   map[string]int // what its replay must not be older than
}

// lGot is a message that a session received.
type lGot struct {
	first int // times without DUP
	live  bool
}

type lClient struct {
	n      int
	v      byte
	expiry uint32
	life   uint32 // expiry of the connection's session: MQTT 3.1.1 has none with a clean one

	up, connecting bool
	clean          bool      // of the CONNECT under way
	doubt          bool      // whether that one goes on with the session
	exists         bool      // there is a session
	unsure         bool      // whether there is, or what it holds, is not known
	left, latest   time.Time // latest where a CONNECT had no answer
	hold           bool
	held           []packets.Packet

	subs     []*lSub // of the session, also those left
	asked    map[uint16][]*lSub
	unasked  map[uint16][]*lSub
	inflight []*lMsg // our publishes without their last answer
	ids      map[*lMsg]uint16
	released map[uint16]bool // PUBREC came
	lastID   uint16
	count    int
	exact    map[uint16]string // QoS 2 messages received whose PUBREL has not come
	got      map[string]*lGot
	order    map[string]int

	will, willing *lMsg   // of the connection; of the CONNECT under way
	byeWill       *lMsg   // it left in peace, but the broker may not know
	hungUp        bool    // by the broker, after that
	settled       []*lMsg // it came back after that
}

func newLedger(seed uint64, clients int) *ledger {
	rng := rand.New(rand.NewPCG(seed, 2))
	l := &ledger{msgs: map[string]*lMsg{}, topics: map[string]*lTopic{}}
	for i := range clients {
		c := &lClient{n: i, v: []byte{5, 5, 4}[rng.IntN(3)], expiry: forever, ids: map[*lMsg]uint16{}, released: map[uint16]bool{}}
		switch i {
		case clients - 1:
			c.expiry = 0
		case clients - 2:
			c.v, c.expiry = 5, brief
		}
		c.reset()
		l.clients = append(l.clients, c)
	}
	return l
}

// brief is the session expiry interval of the client whose session ends at times.
const brief = 3

// reset begins a session.
func (c *lClient) reset() {
	c.exists, c.unsure = false, false
	c.subs, c.asked, c.unasked = nil, map[uint16][]*lSub{}, map[uint16][]*lSub{}
	c.inflight, c.ids, c.released = nil, map[*lMsg]uint16{}, map[uint16]bool{}
	c.exact, c.got, c.order = map[uint16]string{}, map[string]*lGot{}, map[string]int{}
}

func (l *ledger) fail(c *lClient, format string, args ...any) {
	if l.err == nil {
		l.err = fmt.Errorf("c%d: "+format, append([]any{c.n}, args...)...)
	}
}

// connect is a CONNECT about to be sent.
func (l *ledger) connect(n int, clean, will bool) packets.Packet {
	c := l.clients[n]
	if c.up {
		l.gone(n, false) // a takeover
	}
	if c.byeWill != nil && !c.hungUp {
		c.byeWill.sent = l.seq // the CONNECT may overtake the DISCONNECT
	}
	// What may have been a clean start is made one: then all is known again.
	clean = clean || c.unsure || c.expiry == 0
	c.connecting, c.clean, c.willing = true, clean, nil
	must, _ := l.mayBe(c)
	c.doubt = !must
	if clean && c.exists {
		c.unsure = true
	}
	c.life = c.expiry
	if clean && c.v < 5 {
		c.life = 0
	}
	pk := hello(c.v, fmt.Sprintf("c%d", n), clean, c.expiry)
	if will {
		m := l.message(c, fmt.Sprintf("w/%d", n), 1, true, false)
		c.willing = m
		pk.Connect.WillFlag, pk.Connect.WillTopic, pk.Connect.WillPayload, pk.Connect.WillQos, pk.Connect.WillRetain = true, m.topic, []byte(m.key), 1, true
	}
	return pk
}

// mayBe tells whether the session of a client that was away must be there, and
// whether it must not.
func (l *ledger) mayBe(c *lClient) (must, mustNot bool) {
	if !c.exists || c.clean {
		return false, !c.unsure || c.clean
	}
	if c.unsure {
		return false, false
	}
	if c.expiry == forever {
		return true, false
	}
	limit, slack := brief*time.Second, 200*time.Millisecond
	from := c.latest
	if l.started.After(from) {
		from = l.started // a killed broker may not know since when
	}
	return !l.lax && l.now.Sub(c.left) < limit-slack, l.now.Sub(from) > limit+slack && !l.lax
}

func (l *ledger) connack(n int, pk packets.Packet) (out []packets.Packet) {
	c := l.clients[n]
	if pk.ReasonCode != 0 {
		l.fail(c, "CONNACK 0x%02x %s", pk.ReasonCode, pk.Properties.ReasonString)
		return nil
	}
	must, mustNot := l.mayBe(c)
	if must && !pk.SessionPresent || mustNot && pk.SessionPresent {
		l.fail(c, "session present %v (clean %v, away since %v)", pk.SessionPresent, c.clean, l.now.Sub(c.left))
	}
	if !pk.SessionPresent {
		c.reset()
	}
	c.up, c.connecting, c.exists, c.unsure, c.held = true, false, true, false, nil
	c.will, c.willing = c.willing, nil
	if c.byeWill != nil && c.byeWill.sent == 0 {
		c.settled = append(c.settled, c.byeWill)
	}
	c.byeWill = nil
	for _, m := range c.inflight { // [MQTT-4.4.0-1]
		id := c.ids[m]
		if c.released[id] {
			out = append(out, note(packets.Pubrel, id))
			continue
		}
		m.sends++
		pk := publish(m.topic, m.key, m.qos, m.retain, id)
		if m.empty {
			pk.Payload = nil
		}
		pk.FixedHeader.Dup = true
		if m.expiry > 0 {
			pk.Properties.MessageExpiryInterval = m.expiry
			m.expires = l.now.Add(time.Duration(m.expiry) * time.Second)
		}
		out = append(out, pk)
	}
	return out
}

// gone is the end of a connection, for the client's part.
func (l *ledger) gone(n int, bye bool) {
	c := l.clients[n]
	if !c.up && !c.connecting {
		return
	}
	// SUBSCRIBE and UNSUBSCRIBE without an answer may have been heeded or not,
	// and are not sent again.
	c.asked, c.unasked = map[uint16][]*lSub{}, map[uint16][]*lSub{}
	if c.connecting && c.doubt { // it may find another session than it had
		c.unsure, c.exists = true, true
	}
	if w := c.will; w != nil {
		if bye {
			c.byeWill, c.hungUp = w, false
		} else {
			w.sent = l.seq
		}
	}
	if w := c.willing; w != nil {
		w.sent = l.seq // perhaps
	}
	if c.up {
		c.left = l.now
		if c.life == 0 {
			c.reset()
		}
	}
	c.latest = l.now
	c.up, c.connecting, c.held, c.hold, c.will, c.willing = false, false, nil, false, nil, nil
}

// hungUp is the end of a connection after DISCONNECT, as seen from the broker.
func (l *ledger) hungUp(n int) { l.clients[n].hungUp = true }

// crash is the end of the broker. wills are those that it must publish when it
// is back.
func (l *ledger) crash() (wills []*lMsg) {
	for _, c := range l.clients {
		if c.up && c.will != nil {
			wills = append(wills, c.will)
		}
		if c.byeWill != nil {
			c.byeWill.sent = l.seq // its DISCONNECT may not have got through
		}
		l.gone(c.n, false)
	}
	l.crashed = l.seq
	return wills
}

func (l *ledger) message(c *lClient, topic string, qos byte, retain, empty bool) *lMsg {
	c.count++
	m := &lMsg{key: fmt.Sprintf("c%d/%d", c.n, c.count), topic: topic, from: c.n, n: c.count, qos: qos, retain: retain, empty: empty}
	l.msgs[m.key] = m
	if retain {
		if l.topics[topic] == nil {
			l.topics[topic] = &lTopic{}
		}
		l.topics[topic].all = append(l.topics[topic].all, m)
	}
	return m
}

func (c *lClient) id() uint16 {
	for {
		c.lastID++
		_, sub := c.asked[c.lastID]
		_, unsub := c.unasked[c.lastID]
		used := c.lastID == 0 || sub || unsub
		for _, id := range c.ids {
			used = used || id == c.lastID
		}
		if !used {
			return c.lastID
		}
	}
}

func (l *ledger) publish(n int, topic string, qos byte, retain, empty bool, expiry uint32) packets.Packet {
	c := l.clients[n]
	m := l.message(c, topic, qos, retain, empty)
	m.sent, m.sends = l.seq, 1
	pk := publish(topic, m.key, qos, retain, 0)
	if empty {
		pk.Payload = nil
	}
	if expiry > 0 && c.v == 5 {
		m.expires = l.now.Add(time.Duration(expiry) * time.Second)
		pk.Properties.MessageExpiryInterval, m.expiry = expiry, expiry
	}
	if qos > 0 {
		pk.PacketID = c.id()
		c.ids[m] = pk.PacketID
		c.inflight = append(c.inflight, m)
	}
	return pk
}

func (l *ledger) subscribe(n int, filter string, qos byte) packets.Packet {
	c := l.clients[n]
	s := &lSub{filter: filter, qos: qos, sent: l.seq, floor: map[string]int{}}
	for name, t := range l.topics {
		s.floor[name] = t.acked
	}
	for _, old := range c.subs {
		if old.filter == filter && old.left == 0 { // replaced, perhaps with a lower QoS
			old.leaving = l.seq
		}
	}
	c.subs = append(c.subs, s)
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Subscribe}, PacketID: c.id(), Filters: packets.Subscriptions{{Filter: filter, Qos: qos}}}
	c.asked[pk.PacketID] = []*lSub{s}
	return pk
}

func (l *ledger) unsubscribe(n int, filter string) packets.Packet {
	c := l.clients[n]
	pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsubscribe}, PacketID: c.id(), Filters: packets.Subscriptions{{Filter: filter}}}
	var subs []*lSub
	for _, s := range c.subs {
		if s.filter == filter && s.left == 0 {
			s.leaving = l.seq
			subs = append(subs, s)
		}
	}
	c.unasked[pk.PacketID] = subs
	return pk
}

// receive takes a packet and gives the answers to it.
func (l *ledger) receive(n int, pk packets.Packet) []packets.Packet {
	c := l.clients[n]
	switch pk.FixedHeader.Type {
	case packets.Connack:
		return l.connack(n, pk)
	case packets.Publish:
		return l.delivered(c, pk)
	case packets.Puback, packets.Pubrec, packets.Pubcomp:
		return l.answered(c, pk)
	case packets.Pubrel:
		delete(c.exact, pk.PacketID)
		return c.reply(note(packets.Pubcomp, pk.PacketID))
	case packets.Suback:
		for _, s := range c.asked[pk.PacketID] {
			s.acked = l.seq
			for _, old := range c.subs {
				if old.filter == s.filter && old != s && old.sent < s.sent && old.left == 0 {
					old.left = l.seq
				}
			}
		}
		if len(pk.ReasonCodes) != 1 || pk.ReasonCodes[0] > 2 {
			l.fail(c, "SUBACK %v", pk.ReasonCodes)
		}
		delete(c.asked, pk.PacketID)
	case packets.Unsuback:
		for _, s := range c.unasked[pk.PacketID] {
			s.left = l.seq
		}
		delete(c.unasked, pk.PacketID)
	case packets.Disconnect:
		if pk.ReasonCode != packets.ErrServerShuttingDown.Code && pk.ReasonCode != packets.ErrSessionTakenOver.Code {
			l.fail(c, "DISCONNECT 0x%02x %s", pk.ReasonCode, pk.Properties.ReasonString)
		}
	}
	return nil
}

// reply sends an answer, or keeps it where the client is slow.
func (c *lClient) reply(pk packets.Packet) []packets.Packet {
	if c.hold {
		c.held = append(c.held, pk)
		return nil
	}
	return []packets.Packet{pk}
}

// release ends a slow phase.
func (l *ledger) release(n int) []packets.Packet {
	c := l.clients[n]
	out := c.held
	c.hold, c.held = false, nil
	return out
}

func (l *ledger) answered(c *lClient, pk packets.Packet) []packets.Packet {
	i := slices.IndexFunc(c.inflight, func(m *lMsg) bool { return c.ids[m] == pk.PacketID })
	if i < 0 {
		l.fail(c, "%s %d for nothing", packets.PacketNames[pk.FixedHeader.Type], pk.PacketID)
		return nil
	}
	m := c.inflight[i]
	// After an outage the PUBREL may come a second time: 0x92 is no error then [MQTT 5, 3.7.2.1].
	if pk.ReasonCode >= 0x80 && !(pk.FixedHeader.Type == packets.Pubcomp && pk.ReasonCode == packets.ErrPacketIdentifierNotFound.Code) {
		l.fail(c, "%s of %s: 0x%02x %s", packets.PacketNames[pk.FixedHeader.Type], m.key, pk.ReasonCode, pk.Properties.ReasonString)
	}
	if want := packets.Puback; (m.qos == 1) != (pk.FixedHeader.Type == want) {
		l.fail(c, "%s %d for %s of QoS %d", packets.PacketNames[pk.FixedHeader.Type], pk.PacketID, m.key, m.qos)
		return nil
	}
	if m.acked == 0 {
		m.acked = l.seq
		if m.retain {
			t := l.topics[m.topic]
			t.acked = max(t.acked, m.n)
		}
	}
	if pk.FixedHeader.Type == packets.Pubrec {
		c.released[pk.PacketID] = true
		return []packets.Packet{note(packets.Pubrel, pk.PacketID)}
	}
	m.done = l.seq
	c.inflight = slices.Delete(c.inflight, i, i+1)
	delete(c.ids, m)
	delete(c.released, pk.PacketID)
	return nil
}

func (l *ledger) delivered(c *lClient, pk packets.Packet) (out []packets.Packet) {
	id, key := pk.PacketID, string(pk.Payload)
	switch pk.FixedHeader.Qos {
	case 1:
		out = c.reply(note(packets.Puback, id))
	case 2:
		out = c.reply(note(packets.Pubrec, id))
		if had, ok := c.exact[id]; ok {
			if had != key || !pk.FixedHeader.Dup {
				l.fail(c, "packet id %d had QoS 2 message %q, and has %q (dup %v) without PUBREL", id, had, key, pk.FixedHeader.Dup)
			}
			return out
		}
		c.exact[id] = key
	}
	if key == "" { // which clear it is cannot be told
		if l.topics[pk.TopicName] == nil || pk.FixedHeader.Retain {
			l.fail(c, "got %s without payload, retain %v", pk.TopicName, pk.FixedHeader.Retain)
		}
		return out
	}
	m := l.msgs[key]
	if m == nil || m.topic != pk.TopicName || m.empty {
		l.fail(c, "got %s %q, which was not published so", pk.TopicName, key)
		return out
	}
	if m.sent == 0 {
		l.fail(c, "got Will %s of a client that is connected or left in peace", key)
		return out
	}
	if !m.expires.IsZero() && l.now.After(m.expires.Add(time.Second)) && !pk.FixedHeader.Dup && !l.lax {
		l.fail(c, "got %s, which expired %v ago", key, l.now.Sub(m.expires))
	}
	if pk.FixedHeader.Retain {
		l.replayed(c, m)
		return out
	}
	qos, allowed := byte(0), false
	for _, s := range c.subs {
		if matches(s.filter, m.topic) && (m.done == 0 || s.sent < m.done) && (s.left == 0 || s.left > m.sent) {
			qos, allowed = max(qos, s.qos), true
		}
	}
	if !allowed || pk.FixedHeader.Qos > min(m.qos, qos) {
		l.fail(c, "got %s %s qos %d, for which it has no subscription; subscriptions: %s", m.topic, key, pk.FixedHeader.Qos, c.describe())
	}
	g := c.got[key]
	if g == nil {
		g = &lGot{}
		c.got[key] = g
	}
	again := g.live
	g.live = true
	limit := m.sends
	if m.qos == 2 || m.from >= 0 && m.sends == 0 {
		limit = 1
	}
	if !pk.FixedHeader.Dup {
		g.first++
	}
	if g.first > limit || again && pk.FixedHeader.Qos == 2 {
		l.fail(c, "got %s %s qos %d again (dup %v): %d times without dup, it was published %d times", m.topic, key, pk.FixedHeader.Qos, pk.FixedHeader.Dup, g.first, m.sends)
	}
	if again || pk.FixedHeader.Qos == 0 {
		return out
	}
	by := fmt.Sprintf("%d %s", m.from, m.topic)
	// One that was published twice may have come too early for this session the
	// first time.
	if last := c.order[by]; m.n < last && m.sends < 2 && m.expiry == 0 {
		l.fail(c, "got %s %s after c%d/%d", m.topic, key, m.from, last)
	}
	c.order[by] = max(c.order[by], m.n)
	return out
}

func (l *ledger) replayed(c *lClient, m *lMsg) {
	if !m.retain {
		l.fail(c, "got %s with the retain flag, it is not retained", m.key)
	}
	allowed := false
	for _, s := range c.subs {
		allowed = allowed || matches(s.filter, m.topic) && m.n >= s.floor[m.topic]
	}
	if !allowed {
		l.fail(c, "got retained %s %s, which was replaced or cleared before; subscriptions: %s", m.topic, m.key, c.describe())
	}
}

func (c *lClient) describe() string {
	var out []string
	for _, s := range c.subs {
		out = append(out, fmt.Sprintf("%s qos %d [%d acked %d leaving %d left %d]", s.filter, s.qos, s.sent, s.acked, s.leaving, s.left))
	}
	return strings.Join(out, "; ")
}

// missing tells of something that a session is owed and has not got. Empty is
// all that there is to wait for.
func (l *ledger) missing() string {
	for _, c := range l.clients {
		if !c.up {
			return fmt.Sprintf("c%d is not connected", c.n)
		}
		if len(c.inflight) > 0 {
			return fmt.Sprintf("the answer to %s of c%d", c.inflight[0].key, c.n)
		}
		if len(c.exact) > 0 {
			return fmt.Sprintf("PUBREL for c%d: %v", c.n, c.exact)
		}
		for _, s := range c.subs {
			if s.acked == 0 || s.leaving != 0 {
				continue
			}
			for _, m := range l.msgs {
				if g := c.got[m.key]; matches(s.filter, m.topic) && m.acked > 0 && s.acked < m.sent && !m.empty &&
					min(m.qos, s.qos) > 0 && m.expires.IsZero() && (g == nil || !g.live) {
					return fmt.Sprintf("%s %s qos %d, acknowledged at %d, for c%d with %s", m.topic, m.key, m.qos, m.acked, c.n, c.describe())
				}
			}
		}
	}
	return ""
}

// retained judges the retained value of every topic. get gives the broker's.
func (l *ledger) retained(get func(string) (string, bool)) error {
	for name, t := range l.topics {
		if strings.HasPrefix(name, "w/") {
			continue
		}
		p, ok := get(name)
		good := !ok && t.acked == 0
		for _, m := range t.all {
			if m.n < t.acked || m.sent == 0 {
				continue
			}
			good = good || ok && !m.empty && m.key == p || !ok && (m.empty || !m.expires.IsZero())
		}
		if !good {
			return fmt.Errorf("retained %s is %q, %v; message %d was acknowledged", name, p, ok, t.acked)
		}
	}
	return nil
}

// wills judges the Wills after a crash: those of wills are published, those of
// clients that left in peace are not.
func (l *ledger) wills(wills []*lMsg, get func(string) (string, bool)) error {
	for _, w := range wills {
		if p, _ := get(w.topic); p != w.key {
			return fmt.Errorf("will %s %s was not published after the crash: %q", w.topic, w.key, p)
		}
	}
	for _, c := range l.clients {
		for _, w := range c.settled {
			if p, _ := get(w.topic); p == w.key {
				return fmt.Errorf("will %s of c%d is published, which left in peace", p, c.n)
			}
		}
	}
	return nil
}
