package broker

import (
	"errors"
	"net"
	"sort"
	"sync"
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
	// clients is per connection, from CONNECT to the end of the connection.
	clients sync.Map // net.Conn → *client
}

// client is what we know of a connection beside its queue.
type client struct {
	id     access.Identity
	reason string // for the next CONNACK or SUBACK
	will   *store.Will
	conn   *conn

	// existing holds the filters of the SUBSCRIBE in progress that were
	// subscribed before; it is the reader goroutine's.
	existing map[string]bool

	mu     sync.Mutex
	exact2 map[uint16]struct{} // QoS 2 publishes waiting for their PUBREL [MQTT-4.3.3-10]
}

// ID implements mqtt.Hook.
func (h *hook) ID() string { return "fairlead" }

// Provides implements mqtt.Hook.
func (h *hook) Provides(what byte) bool {
	switch what {
	case mqtt.OnConnectAuthenticate, mqtt.OnACLCheck, mqtt.OnSessionEstablished, mqtt.OnDisconnect,
		mqtt.OnPacketRead, mqtt.OnPacketEncode, mqtt.OnSubscribe, mqtt.OnSubscribed, mqtt.OnPublish:
		return true
	}
	return false
}

func (h *hook) client(cl *mqtt.Client) *client {
	if c, ok := h.clients.Load(cl.Net.Conn); ok {
		return c.(*client)
	}
	return nil
}

// OnConnectAuthenticate implements mqtt.Hook.
func (h *hook) OnConnectAuthenticate(cl *mqtt.Client, pk packets.Packet) bool {
	c := &client{exact2: map[uint16]struct{}{}}
	h.clients.Store(cl.Net.Conn, c)
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
		if err := id.MayPublish(topic.Topic(w.TopicName), h.b.opts.Node); err != nil {
			return refuse("will", err)
		}
		c.will = &store.Will{ClientID: cl.ID, Topic: w.TopicName, Payload: w.Payload, QoS: w.Qos, Retain: w.Retain}
		cl.Properties.Will = mqtt.Will{} // ours from here
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
	c.conn = newConn(h.b, cl, c.id)
	h.b.mu.Lock()
	h.b.mu.conns[cl.ID] = c.conn
	h.b.mu.Unlock()
	go c.conn.run()
	if c.will != nil {
		h.b.enqueue(op{putWill: c.will})
	}
	h.b.log.Debug("client connected", "client", cl.ID, "remote", cl.Net.Remote, "listener", cl.Net.Listener)
}

// OnDisconnect implements mqtt.Hook.
func (h *hook) OnDisconnect(cl *mqtt.Client, err error, _ bool) {
	c := h.client(cl)
	if c == nil || c.conn == nil {
		return
	}
	h.b.mu.Lock()
	if h.b.mu.conns[cl.ID] == c.conn {
		delete(h.b.mu.conns, cl.ID)
	}
	h.b.mu.Unlock()
	c.conn.close()
	if c.will != nil {
		o := op{delWill: c.will.ClientID}
		if err != nil { // [MQTT-3.1.2-8]; without an error it was a DISCONNECT [MQTT-3.14.4-3]
			o.msgs = []Message{{Topic: topic.Topic(c.will.Topic), Payload: c.will.Payload, QoS: c.will.QoS, Retain: c.will.Retain, From: c.id, ClientID: cl.ID}}
		}
		h.b.enqueue(o)
	}
	h.b.log.Debug("client gone", "client", cl.ID, "remote", cl.Net.Remote, "reason", err)
}

// OnPacketRead implements mqtt.Hook: acknowledgements of what we sent.
func (h *hook) OnPacketRead(cl *mqtt.Client, pk packets.Packet) (packets.Packet, error) {
	if pk.FixedHeader.Type == packets.Puback {
		if c := h.client(cl); c != nil && c.conn != nil {
			c.conn.acked(pk.PacketID)
		}
	}
	return pk, nil
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
	return pk
}

// OnSubscribed implements mqtt.Hook: it starts the replay of retained messages.
func (h *hook) OnSubscribed(cl *mqtt.Client, pk packets.Packet, codes []byte) {
	c := h.client(cl)
	if c == nil || c.conn == nil {
		return
	}
	for i, sub := range pk.Filters {
		if codes[i] >= CodeUnspecified || mqtt.IsSharedFilter(sub.Filter) {
			continue
		}
		if sub.RetainHandling == 2 || sub.RetainHandling == 1 && c.existing[sub.Filter] { // [MQTT-3.3.1-10] [MQTT-3.3.1-11]
			continue
		}
		c.conn.replay(&replay{filter: topic.Filter(sub.Filter), qos: sub.Qos, subIDs: subscriptionIDs(sub.Identifiers)})
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
	if pk.FixedHeader.Qos == 2 {
		c.mu.Lock()
		_, again := c.exact2[pk.PacketID]
		c.exact2[pk.PacketID] = struct{}{}
		c.mu.Unlock()
		if again {
			c.conn.ack(answer(pk, nil))
			return pk, packets.ErrRejectPacket
		}
	}
	done := func(err error) {
		if err != nil {
			h.refused(cl, &m, err)
			c.mu.Lock()
			delete(c.exact2, pk.PacketID)
			c.mu.Unlock()
		}
		if pk.FixedHeader.Qos > 0 {
			if cl.Properties.ProtocolVersion < 5 {
				var r *Refusal
				if err != nil && !errors.As(err, &r) {
					// MQTT 3.1.1 has no negative answer. What could not be
					// stored must not be acknowledged: end the connection.
					c.conn.stop(err)
					return
				}
				err = nil // a refused message may be acknowledged [MQTT 3.1.1, 3.3.5-2]
			}
			c.conn.ack(answer(pk, err))
		}
	}
	if err := m.check(h.b.opts.Node); err != nil {
		done(err)
		return pk, packets.ErrRejectPacket
	}
	h.b.enqueue(op{msgs: []Message{m}, intercept: true, done: done})
	return pk, packets.ErrRejectPacket
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

// goodbye tells a client that the broker is shutting down and hangs up. The
// deadline frees it from a socket that does not drain.
func (b *Broker) goodbye(cl *mqtt.Client) {
	if cl.Net.Conn != nil {
		_ = cl.Net.Conn.SetDeadline(time.Now().Add(time.Second))
	}
	_ = b.mqtt.DisconnectClient(cl, packets.ErrServerShuttingDown)
}
