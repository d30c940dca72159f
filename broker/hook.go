package broker

import (
	"errors"
	"net"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// hook is where mochi hands over. It takes every publish out of mochi's hands
// (ErrRejectPacket), so that mochi neither stores, acknowledges nor routes.
type hook struct {
	mqtt.HookBase
	b *Broker
}

// client is one connection, from accept to its end. Where nothing else is said
// its fields are the reader goroutine's, on which mochi calls most hooks.
type client struct {
	fc   *frameConn
	done chan struct{} // closed when the connection is gone with all that belonged to it

	id      access.Identity
	mq      *mqtt.Client // set before claimed and up
	claimed bool         // it holds its client id
	conn    *conn        // set before up
	up      atomic.Bool  // CONNACK is out
	reason  string       // for the next CONNACK or SUBACK
	will    *store.Will
	bye     bool // it sent DISCONNECT 0x00: no Will
	ended   bool

	hang   sync.Once
	hungUp chan struct{} // closed when the farewell is over; nil before hang

	// existing holds the filters of the SUBSCRIBE in progress that were
	// subscribed before.
	existing map[string]bool

	mu       sync.Mutex
	exact2   map[uint16]struct{} // QoS 2 publishes waiting for their PUBREL [MQTT-4.3.3-10]
	unacked1 int                 // QoS 1 publishes not yet acknowledged
}

// ID implements mqtt.Hook.
func (h *hook) ID() string { return "fairlead" }

// Provides implements mqtt.Hook.
func (h *hook) Provides(what byte) bool {
	switch what {
	case mqtt.OnConnect, mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnSessionEstablished, mqtt.OnDisconnect,
		mqtt.OnPacketRead, mqtt.OnPacketProcessed, mqtt.OnPacketEncode, mqtt.OnSubscribe, mqtt.OnSubscribed, mqtt.OnPublish:
		return true
	}
	return false
}

func (h *hook) client(cl *mqtt.Client) *client {
	if fc, ok := cl.Net.Conn.(*frameConn); ok {
		return fc.client
	}
	return nil
}

// maxKeepAlive is the longest keepalive of which mochi can compute one and a
// half: it does so in 16 bits.
const maxKeepAlive = 43690

// OnConnect implements mqtt.Hook.
func (h *hook) OnConnect(cl *mqtt.Client, _ packets.Packet) error {
	if cl.State.Keepalive > maxKeepAlive {
		cl.State.Keepalive, cl.State.ServerKeepalive = maxKeepAlive, true // [MQTT-3.1.2-21]
	}
	return nil
}

// OnConnectAuthenticate implements mqtt.Hook.
func (h *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	c := h.client(cl)
	c.mq = cl
	refuse := func(why string, err error) bool {
		c.reason = err.Error()
		h.b.metrics.refused.WithLabelValues(why).Inc()
		h.b.denied.log(h.b.log, "connection refused", cl.Net.Remote, "client", cl.ID, "remote", cl.Net.Remote, "listener", cl.Net.Listener, "error", err)
		return false
	}
	id, err := h.b.opts.Authenticate(ConnectInfo{
		Listener: cl.Net.Listener,
		Remote:   cl.Net.Remote,
		Loopback: loopback(cl.Net.Conn),
		ClientID: cl.ID,
		Username: string(cl.Properties.Username),
		Password: pk.Connect.Password,
	})
	if err != nil {
		return refuse("connect", err)
	}
	c.id = id
	// A client id belongs to its identity: nobody takes over another's session.
	cl.ID = id.String() + "/" + cl.ID
	if cl.Properties.ProtocolVersion < 5 {
		cl.Properties.Clean = true // sessions end with their connection until they are stored
	}
	if w := cl.Properties.Will; w.Flag != 0 {
		wp := pk.Connect.WillProperties
		c.will = &store.Will{
			ClientID: cl.ID, Topic: w.TopicName, Payload: w.Payload, QoS: w.Qos, Retain: w.Retain,
			Expiry: wp.MessageExpiryInterval, Props: props(&wp),
		}
		cl.Properties.Will = mqtt.Will{} // ours from here
		m := fromWill(c.will)
		m.From = id
		if err := m.check(h.b.opts.Node); err != nil {
			var r *Refusal
			if errors.As(err, &r) {
				err = errors.New("will: " + r.Reason)
			}
			return refuse("will", err)
		}
	}
	if err := h.b.claim(c); err != nil {
		return refuse("closed", err)
	}
	return true
}

// loopback tells whether the other end is on this host.
func loopback(c net.Conn) bool {
	if c == nil {
		return true
	}
	switch a := c.RemoteAddr().(type) {
	case *net.TCPAddr:
		return a.IP.IsLoopback()
	case *net.UnixAddr:
		return true
	default:
		return a.Network() == "pipe"
	}
}

// OnACLCheck implements mqtt.Hook. Publishes are checked in OnPublish, where a
// topic alias is resolved already.
func (h *hook) OnACLCheck(cl *mqtt.Client, filter string, write bool) bool {
	if write {
		return true
	}
	c := h.client(cl)
	if c == nil {
		return false
	}
	if err := c.id.MaySubscribe(topic.Filter(filter)); err != nil {
		c.reason = err.Error()
		h.b.metrics.refused.WithLabelValues("subscribe").Inc()
		h.b.denied.log(h.b.log, "subscribe refused", cl.ID+filter, "client", cl.ID, "filter", filter, "error", err)
		return false
	}
	return true
}

// OnSessionEstablished implements mqtt.Hook: CONNACK is out.
func (h *hook) OnSessionEstablished(cl *mqtt.Client, _ packets.Packet) {
	c := h.client(cl)
	c.conn = newConn(h.b, c)
	go c.conn.run()
	h.b.mu.Lock()
	closed := h.b.mu.closed
	h.b.mu.conns[cl.ID] = c.conn
	h.b.mu.Unlock()
	c.up.Store(true)
	if closed {
		h.b.hangUp(c, packets.ErrServerShuttingDown)
	}
	if c.will != nil {
		h.b.enqueue(op{putWill: c.will})
	}
	h.b.present(c, true)
	h.b.log.Debug("client connected", "client", cl.ID, "remote", cl.Net.Remote, "listener", cl.Net.Listener)
}

// OnDisconnect implements mqtt.Hook.
func (h *hook) OnDisconnect(cl *mqtt.Client, err error, _ bool) { h.b.end(h.client(cl), err) }

// end takes a connection out of the routing and publishes its Will.
func (b *Broker) end(c *client, err error) {
	if c.conn == nil || c.ended {
		return
	}
	c.ended = true
	b.mu.Lock()
	if b.mu.conns[c.mq.ID] == c.conn {
		delete(b.mu.conns, c.mq.ID)
	}
	b.mu.Unlock()
	c.conn.close()
	if c.will != nil {
		o := op{delWill: c.will.ClientID}
		if !c.bye { // [MQTT-3.1.2-8] [MQTT-3.14.4-3]
			m := fromWill(c.will)
			m.From = c.id
			o.msgs, o.intercept, o.done = []Message{m}, true, b.willDone(c.will)
		}
		b.enqueue(o)
	}
	b.present(c, false)
	b.log.Debug("client gone", "client", c.mq.ID, "remote", c.mq.Net.Remote, "reason", err)
}

// present tells of a client that came or went.
func (b *Broker) present(c *client, up bool) {
	if b.opts.Presence != nil {
		b.enqueue(op{fn: func() []Message { b.opts.Presence(c.id, up); return nil }})
	}
}

// willDone tells of a Will that was refused; there is no client any more to tell.
func (b *Broker) willDone(w *store.Will) func(error) {
	return func(err error) {
		if err != nil {
			b.log.Warn("will not published", "client", w.ClientID, "topic", w.Topic, "error", err)
		}
	}
}

// claim gives a client its client id. Whoever has it is disconnected, and the
// claim holds when all that was the other's is gone: so the other's Will comes
// before anything of the new client's, and mochi never has to mix two sessions.
func (b *Broker) claim(c *client) error {
	id := c.mq.ID
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

// hangUp ends a connection without waiting for it. A client of MQTT 5 is told
// why, and has a second to hear it.
func (b *Broker) hangUp(c *client, code packets.Code) {
	c.hang.Do(func() {
		if !c.up.Load() {
			_ = c.fc.Close()
			return
		}
		c.fc.end()
		hungUp := make(chan struct{})
		c.mu.Lock()
		c.hungUp = hungUp
		c.mu.Unlock()
		// A deadline does not free every kind of connection from a write that
		// does not end; closing it does.
		force := time.AfterFunc(farewell, func() { _ = c.fc.Close() })
		go func() {
			defer close(hungUp)
			defer force.Stop()
			if c.mq.Properties.ProtocolVersion == 5 {
				_ = b.mqtt.DisconnectClient(c.mq, code)
			} else {
				c.mq.Stop(code)
			}
			_ = c.fc.Close()
		}()
	})
}

// OnPacketRead implements mqtt.Hook: acknowledgements of what we sent.
func (h *hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	c := h.client(cl)
	if c == nil || c.conn == nil {
		return pk, nil
	}
	switch pk.FixedHeader.Type {
	case packets.Puback:
		c.conn.acked(pk.PacketID)
	case packets.Publish:
		// mochi drops these without an answer, and the client would wait for ever.
		if pk.FixedHeader.Qos > 0 && pk.PacketID > 0 && strings.HasPrefix(pk.TopicName, "$") &&
			!strings.ContainsAny(pk.TopicName, "+#") && !mqtt.IsValidFilter(pk.TopicName, true) {
			h.b.metrics.refused.WithLabelValues("topic").Inc()
			h.answer(c, pk, &Refusal{Code: CodeTopicInvalid, Kind: "topic", Reason: "topics that begin with $SYS or $share are the broker's"})
		}
	}
	return pk, nil
}

// OnPacketProcessed implements mqtt.Hook.
func (h *hook) OnPacketProcessed(cl *mqtt.Client, pk packets.Packet, err error) {
	// Only this reason code discards the Will [MQTT-3.14.4-3].
	if pk.FixedHeader.Type == packets.Disconnect && err == nil && pk.ReasonCode == 0 {
		if c := h.client(cl); c != nil {
			c.bye = true
		}
	}
}

// OnPacketEncode implements mqtt.Hook: it completes answers that mochi builds.
func (h *hook) OnPacketEncode(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	switch pk.FixedHeader.Type {
	case packets.Connack:
		pk.Properties.MaximumPacketSize = h.b.opts.MaxPacket
		if pk.ReasonCode >= CodeUnspecified {
			if c := h.client(cl); c != nil && c.reason != "" {
				pk.Properties.ReasonString = c.reason
			}
		}
	case packets.Suback:
		if c := h.client(cl); c != nil && c.reason != "" {
			pk.Properties.ReasonString, c.reason = c.reason, ""
		}
	case packets.Pubcomp:
		// mochi does not know the QoS 2 publishes that we took over.
		if c := h.client(cl); c != nil {
			c.mu.Lock()
			if _, ok := c.exact2[pk.PacketID]; ok {
				delete(c.exact2, pk.PacketID)
				pk.ReasonCode = 0
				pk.Properties.ReasonString = ""
			}
			c.mu.Unlock()
		}
	}
	return pk
}

// OnSubscribe implements mqtt.Hook: deliveries are QoS 1 at most.
func (h *hook) OnSubscribe(cl *mqtt.Client, pk packets.Packet) packets.Packet {
	c := h.client(cl)
	if c != nil {
		c.existing = map[string]bool{}
	}
	for i := range pk.Filters {
		if _, ok := cl.State.Subscriptions.Get(pk.Filters[i].Filter); ok && c != nil {
			c.existing[pk.Filters[i].Filter] = true
		}
		pk.Filters[i].Qos = min(pk.Filters[i].Qos, 1)
	}
	if c != nil && c.conn != nil && cl.State.Subscriptions.Len()+len(pk.Filters) > maxSubscriptions {
		c.conn.stop(errSubscriptions)
	}
	return pk
}

// OnSubscribed implements mqtt.Hook: it starts the replay of retained messages.
func (h *hook) OnSubscribed(cl *mqtt.Client, pk packets.Packet, codes []byte) {
	c := h.client(cl)
	if c == nil || c.conn == nil {
		return
	}
	upTo := h.b.seq.Load() // the filters are in the routing already
	for i, sub := range pk.Filters {
		if codes[i] >= CodeUnspecified || mqtt.IsSharedFilter(sub.Filter) {
			continue
		}
		if sub.RetainHandling == 2 || sub.RetainHandling == 1 && c.existing[sub.Filter] { // [MQTT-3.3.1-10] [MQTT-3.3.1-11]
			continue
		}
		r := &replay{filter: topic.Filter(sub.Filter), qos: sub.Qos, upTo: upTo}
		if sub.Identifier > 0 { // [MQTT-3.3.4-3]
			r.subIDs = []int{sub.Identifier}
		}
		c.conn.replay(r)
	}
}

func subscriptionIDs(ids map[string]int) []int {
	if len(ids) == 0 {
		return nil
	}
	out := make([]int, 0, len(ids))
	for _, id := range ids {
		if id > 0 {
			out = append(out, id)
		}
	}
	sort.Ints(out)
	return out
}

// OnPublish implements mqtt.Hook. The packet goes to the core; the answer
// follows once it is durable.
func (h *hook) OnPublish(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	c := h.client(cl)
	if c == nil || c.conn == nil {
		return pk, packets.ErrRejectPacket
	}
	h.b.metrics.received.Inc()
	m := fromPacket(pk)
	m.From, m.ClientID = c.id, cl.ID
	v5 := cl.Properties.ProtocolVersion == 5
	switch pk.FixedHeader.Qos {
	case 1:
		c.mu.Lock()
		c.unacked1++
		over := c.unacked1+len(c.exact2) > receiveMaximum
		c.mu.Unlock()
		if over && v5 { // [MQTT-3.3.4-7]
			h.b.hangUp(c, packets.ErrReceiveMaximum)
			return pk, packets.ErrRejectPacket
		}
	case 2:
		c.mu.Lock()
		_, again := c.exact2[pk.PacketID]
		c.exact2[pk.PacketID] = struct{}{}
		over := c.unacked1+len(c.exact2) > receiveMaximum
		c.mu.Unlock()
		if over && v5 {
			h.b.hangUp(c, packets.ErrReceiveMaximum)
			return pk, packets.ErrRejectPacket
		}
		if again {
			c.conn.ack(answer(pk, nil))
			return pk, packets.ErrRejectPacket
		}
	}
	done := func(err error) {
		if err != nil {
			h.refused(cl, &m, err)
		}
		c.mu.Lock()
		switch {
		case pk.FixedHeader.Qos == 1:
			c.unacked1--
		case pk.FixedHeader.Qos == 2 && err != nil && v5:
			delete(c.exact2, pk.PacketID) // [MQTT-4.3.3-9]
		}
		c.mu.Unlock()
		h.answer(c, pk, err)
	}
	if err := m.check(h.b.opts.Node); err != nil {
		done(err)
		return pk, packets.ErrRejectPacket
	}
	h.b.enqueue(op{msgs: []Message{m}, intercept: true, done: done})
	return pk, packets.ErrRejectPacket
}

// answer acknowledges a publish, or refuses it.
func (h *hook) answer(c *client, pk packets.Packet, err error) {
	if pk.FixedHeader.Qos == 0 {
		return
	}
	if err != nil && c.mq.Properties.ProtocolVersion < 5 {
		var r *Refusal
		if !errors.As(err, &r) {
			// MQTT 3.1.1 has no negative answer. What could not be stored must
			// not be acknowledged: end the connection.
			c.conn.stop(err)
			return
		}
		err = nil // a refused message may be acknowledged [MQTT 3.1.1, 3.3.5-2]
	}
	c.conn.ack(answer(pk, err))
}

// check refuses what the publisher must not publish.
func (m *Message) check(node string) error {
	if m.Topic == "" {
		return &Refusal{Code: CodeTopicInvalid, Kind: "topic", Reason: "the topic is empty"}
	}
	if err := m.From.MayPublish(m.Topic, node); err != nil {
		code := byte(CodeNotAuthorized)
		if errors.Is(err, topic.ErrForeign) {
			code = CodeTopicInvalid
		}
		return &Refusal{Code: code, Kind: "access", Reason: err.Error()}
	}
	if p, err := topic.Parse(string(m.Topic)); err == nil && m.Retain != p.Kind.Retained() {
		want := "without"
		if p.Kind.Retained() {
			want = "with"
		}
		return &Refusal{Code: CodeNotAuthorized, Kind: "retain", Reason: "publish " + p.Kind.String() + " " + want + " the retain flag"}
	}
	return nil
}

func (h *hook) refused(cl *mqtt.Client, m *Message, err error) {
	kind := "store"
	var r *Refusal
	if errors.As(err, &r) {
		kind = r.Kind
	}
	h.b.metrics.refused.WithLabelValues(kind).Inc()
	h.b.denied.log(h.b.log, "publish refused", cl.ID+string(m.Topic), "client", cl.ID, "topic", m.Topic, "kind", kind, "error", err)
}

// answer builds PUBACK or PUBREC.
func answer(pk packets.Packet, err error) packets.Packet {
	a := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Puback}, PacketID: pk.PacketID}
	if pk.FixedHeader.Qos == 2 {
		a.FixedHeader.Type = packets.Pubrec
	}
	if err == nil {
		return a
	}
	var r *Refusal
	switch {
	case errors.As(err, &r):
		a.ReasonCode, a.Properties.ReasonString = r.Code, r.Reason
	case errors.Is(err, store.ErrDiskFull):
		a.ReasonCode, a.Properties.ReasonString = CodeQuotaExceeded, err.Error()
	default:
		a.ReasonCode, a.Properties.ReasonString = CodeImplementation, err.Error()
	}
	return a
}
