package broker

import (
	"errors"
	"io"
	"net"
	"runtime/debug"
	"strings"
	"time"
	"unicode/utf8"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// readBuffer is mochi's buffer of a client's bytes. Every client has one, so it
// is small; frameConn reads more at a time where there is more.
const readBuffer = 256

// maxKeepAlive is the longest keepalive that clients get, in seconds: half a day,
// of which one and a half still fits its 16 bits.
const maxKeepAlive = 43690

// maxPending is how many ops a client's packets make before the core gets them,
// if the socket has as many.
const maxPending = 64

// errBye ends the reading after a DISCONNECT.
var errBye = errors.New("client disconnected")

// handle runs one connection to its end. What is below it on the stack while it
// waits for the client is kept small: 5,000 idle clients have 5,000 of it.
func (b *Broker) handle(nc net.Conn, l listener) {
	c := b.newConn(nc, l)
	if c == nil {
		return
	}
	defer b.forget(c)
	c.serve()
}

//go:noinline
func (b *Broker) newConn(nc net.Conn, l listener) *conn {
	c := &conn{b: b, listener: l.id, refuse: l.refuse, done: make(chan struct{})}
	c.fc = newFrameConn(c, nc, b.opts.MaxPacket, b.opts.ConnectDeadline)
	b.mu.Lock()
	closed := b.mu.closed
	if !closed {
		b.mu.live[c] = struct{}{}
	}
	b.mu.Unlock()
	if closed {
		_ = nc.Close()
		return nil
	}
	c.cl = b.mqtt.NewClient(c.fc, c.listener, "", false)
	return c
}

// serve reads until the connection ends.
func (c *conn) serve() {
	defer c.recovered()
	err := c.connect()
	if err == nil {
		err = c.read()
	}
	c.ended(err)
}

// recovered is for mochi's decoders, which panic on some malformed packets, such
// as a SUBSCRIBE that ends after a filter: one client's bytes must not end the
// broker.
func (c *conn) recovered() {
	if r := recover(); r != nil {
		c.b.metrics.refused.WithLabelValues("malformed").Inc()
		c.b.denied.log(c.b.log, "malformed packet", c.fc.RemoteAddr().String(), "remote", c.fc.RemoteAddr().String(), "listener", c.listener, "panic", r, "stack", string(debug.Stack()))
		c.b.hangUp(c, packets.ErrMalformedPacket)
	}
}

// ended tells the client why its connection ends, where that is the broker's
// doing.
//
//go:noinline
func (c *conn) ended(err error) {
	if !c.up.Load() {
		return // CONNACK has told it
	}
	b := c.b
	var code packets.Code
	switch {
	case c.fc.refused:
		b.hangUp(c, c.fc.code())
	case err == nil, errors.Is(err, errBye), errors.Is(err, io.EOF):
	case errors.As(err, &code) && code.Code >= CodeUnspecified:
		if code == packets.ErrProtocolViolationQosOutOfRange { // [MQTT-3.3.1-4]
			code = packets.ErrMalformedPacket
		}
		b.metrics.refused.WithLabelValues("protocol").Inc()
		b.denied.log(b.log, "client disconnected", c.cl.ID, "client", c.cl.ID, "remote", c.cl.Net.Remote, "error", err)
		b.hangUp(c, code)
	case isTimeout(err):
		b.hangUp(c, packets.ErrKeepAliveTimeout)
	case !isNetwork(err): // mochi's, as text: the packet's type, its flags
		b.metrics.refused.WithLabelValues("malformed").Inc()
		b.hangUp(c, packets.ErrMalformedPacket)
	}
	b.log.Debug("client gone", "client", c.cl.ID, "remote", c.cl.Net.Remote, "reason", err)
}

// read takes packets until the connection ends. While it waits, its stack is
// small: a packet as mochi decodes it has a kilobyte, in several copies.
func (c *conn) read() error {
	for {
		if k := c.cl.State.Keepalive; k > 0 { // [MQTT-3.1.2-22]
			_ = c.fc.SetDeadline(time.Now().Add(time.Duration(k) * time.Second * 3 / 2))
		} else {
			_ = c.fc.SetDeadline(time.Time{})
		}
		var fh packets.FixedHeader
		if err := c.cl.ReadFixedHeader(&fh); err != nil {
			return err
		}
		if err := c.readPacket(&fh); err != nil {
			return err
		}
	}
}

//go:noinline
func (c *conn) readPacket(fh *packets.FixedHeader) error {
	pk, err := c.cl.ReadPacket(fh)
	if err != nil {
		return err
	}
	return c.receive(&pk)
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

// isNetwork tells the connection's own errors from those of its content.
func isNetwork(err error) bool {
	var n net.Error
	return errors.As(err, &n) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, mqtt.ErrConnectionClosed)
}

// connect reads CONNECT and answers it.
func (c *conn) connect() error {
	b, cl := c.b, c.cl
	var fh packets.FixedHeader
	if err := cl.ReadFixedHeader(&fh); err != nil {
		return err
	}
	if fh.Type != packets.Connect { // [MQTT-3.1.0-1]
		return packets.ErrProtocolViolationRequireFirstConnect
	}
	pk, err := cl.ReadPacket(&fh)
	if err != nil {
		return err
	}
	b.stats.connectsSeen.Add(1)
	cl.ParseConnect(c.listener, pk)
	c.v5 = cl.Properties.ProtocolVersion == 5
	p := &cl.Properties.Props
	code := checkConnect(&pk)
	if c.v5 && code == packets.CodeSuccess {
		code = checkConnectProperties(c.fc.body, pk.Connect.WillFlag)
	}
	c.fc.body, c.fc.keep = nil, 0
	if code != packets.CodeSuccess {
		return errors.Join(code, c.connack(code, false))
	}
	if cl.State.Keepalive > maxKeepAlive {
		cl.State.Keepalive, cl.State.ServerKeepalive = maxKeepAlive, true // [MQTT-3.1.2-21]
	}
	c.window = maxWindow
	if rm := int(p.ReceiveMaximum); rm > 0 { // [MQTT-3.3.4-9]
		c.window = min(rm, maxWindow)
	}
	c.aliasMax = min(p.TopicAliasMaximum, maxAliases)
	switch {
	case c.v5:
		c.expiry = p.SessionExpiryInterval
	case !pk.Connect.Clean:
		c.expiry = store.NeverExpires
	}
	if err := c.admit(&pk); err != nil {
		c.reason = err.Error()
		code := packets.ErrBadUsernameOrPassword
		if errors.Is(err, ErrClosed) {
			code = packets.ErrServerUnavailable
		}
		return errors.Join(err, c.connack(code, false))
	}
	var a attached
	if err := b.ask(func(t *tx, r *result) { b.attach(t, r, c, pk.Connect.Clean, &a) }); err != nil {
		c.session = nil
		b.metrics.refused.WithLabelValues("session").Inc()
		b.denied.log(b.log, "connection refused", cl.ID, "client", cl.ID, "remote", cl.Net.Remote, "error", err)
		c.reason = err.Error()
		code := packets.ErrServerUnavailable
		if errors.Is(err, errSessions) || errors.Is(err, store.ErrDiskFull) {
			code = packets.ErrQuotaExceeded
			if !c.v5 {
				code = packets.ErrServerUnavailable
			}
		}
		return errors.Join(err, c.connack(code, false))
	}
	// What mochi keeps for its own sessions is never used.
	cl.State.Inflight, cl.State.Subscriptions, cl.State.TopicAliases = nil, nil, mqtt.TopicAliases{}
	// CONNACK is this connection's first writer: nothing overtakes it, and who
	// takes the session over waits for it with the farewell.
	c.writers.Add(1)
	c.mu.Lock()
	c.mu.running = true
	c.mu.Unlock()
	c.up.Store(true)
	err = c.connack(packets.CodeSuccess, a.present)
	c.mu.Lock()
	c.mu.running = false
	c.mu.Unlock()
	c.writers.Done()
	if err != nil {
		return err
	}
	for _, id := range a.pubrels { // [MQTT-4.4.0-1]
		c.ack(packets.Pubrel, id)
	}
	b.mu.Lock()
	closed := b.mu.closed
	b.mu.Unlock()
	if closed {
		b.hangUp(c, packets.ErrServerShuttingDown)
	}
	c.kick()
	b.log.Debug("client connected", "client", cl.ID, "remote", cl.Net.Remote, "listener", cl.Net.Listener, "session", a.present)
	return nil
}

// checkConnect is mochi's check, but for an empty Will, which is allowed.
func checkConnect(pk *packets.Packet) packets.Code {
	empty := pk.Connect.WillFlag && len(pk.Connect.WillPayload) == 0 && pk.Connect.WillTopic != ""
	if empty {
		pk.Connect.WillPayload = []byte{0}
	}
	code := pk.ConnectValidate() // [MQTT-3.1.4-1]
	if empty {
		pk.Connect.WillPayload = nil
	}
	switch {
	case code.Code == packets.ErrProtocolViolationProtocolVersion.Code && code.Reason == packets.ErrProtocolViolationProtocolVersion.Reason:
		return packets.ErrUnsupportedProtocolVersion // [MQTT-3.1.2-2]
	case code != packets.CodeSuccess:
		return code
	case pk.ProtocolVersion < 5 && !pk.Connect.Clean && pk.Connect.ClientIdentifier == "":
		return packets.ErrClientIdentifierNotValid // [MQTT-3.1.3-8]
	case pk.ProtocolVersion < 5 && pk.Connect.PasswordFlag && !pk.Connect.UsernameFlag: // [MQTT 3.1.1, 3.1.2-22]
		return packets.ErrProtocolViolationUsernameNoFlag
	case !pk.Connect.WillFlag && pk.Connect.WillQos > 0: // [MQTT-3.1.2-11]
		return packets.ErrProtocolViolationQosOutOfRange
	case strings.ContainsAny(pk.Connect.WillTopic, "+#\x00"): // [MQTT-3.1.3-11]
		return packets.ErrTopicNameInvalid
	case pk.Properties.AuthenticationMethod != "":
		return packets.ErrBadAuthenticationMethod
	}
	return packets.CodeSuccess
}

// admit authenticates the client, checks its Will and claims its client id.
func (c *conn) admit(pk *packets.Packet) error {
	b, cl := c.b, c.cl
	refuse := func(why string, err error) error {
		b.metrics.refused.WithLabelValues(why).Inc()
		b.denied.log(b.log, "connection refused", cl.Net.Remote, "client", cl.ID, "remote", cl.Net.Remote, "listener", cl.Net.Listener, "error", err)
		return err
	}
	id, err := b.opts.Authenticate(ConnectInfo{
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
	if pk.Connect.WillFlag {
		wp := &pk.Connect.WillProperties
		c.will = &store.Will{
			ClientID: cl.ID, Topic: pk.Connect.WillTopic, Payload: pk.Connect.WillPayload, QoS: pk.Connect.WillQos, Retain: pk.Connect.WillRetain,
			Expiry: wp.MessageExpiryInterval, Delay: wp.WillDelayInterval, Props: props(wp),
		}
		cl.Properties.Will = mqtt.Will{} // ours from here
		m := fromWill(c.will)
		m.From = id
		if err := m.check(b.opts.Node); err != nil {
			var r *Refusal
			if errors.As(err, &r) {
				err = errors.New("will: " + r.Reason)
			}
			return refuse("will", err)
		}
	}
	if err := b.claim(c); err != nil {
		return refuse("closed", err)
	}
	return nil
}

// connack answers CONNECT.
func (c *conn) connack(code packets.Code, present bool) error {
	p := &packets.Properties{MaximumPacketSize: c.b.opts.MaxPacket, TopicAliasMaximum: maxAliases}
	if code.Code >= CodeUnspecified && c.reason != "" {
		code.Reason = c.reason
		if !c.v5 { // mochi finds the old codes by the whole new one
			for v5, v3 := range packets.V5CodesToV3 {
				if v5.Code == code.Code {
					code = v3
				}
			}
			return c.connack3(code.Code)
		}
	}
	return c.b.mqtt.SendConnack(c.cl, code, present, p)
}

// connack3 refuses a client of MQTT 3.1.1.
func (c *conn) connack3(code byte) error {
	if code > 5 {
		code = packets.Err3ServerUnavailable.Code
	}
	_, err := c.fc.Write([]byte{packets.Connack << 4, 2, 0, code})
	return err
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

// forget removes what is left of a connection. Who sees it closed knows that the
// core hears of its end before anything that comes later.
func (b *Broker) forget(c *conn) {
	c.flush()
	// A farewell that is under way wants to be heard.
	c.hang.Do(func() {}) // none from here on
	b.mu.Lock()
	hungUp := c.hungUp
	b.mu.Unlock()
	if c.session != nil {
		b.inbox.put(false, b.tidyOp(c.session), op{fn: func(t *tx, r *result) { b.detach(t, r, c) }, done: func(err error) {
			if err != nil && c.will != nil && !c.bye {
				b.willDone(c.will)(err)
			}
		}})
	}
	if hungUp != nil {
		<-hungUp
	}
	c.shut()
	_ = c.fc.Close()
	c.cl.Stop(nil)
	c.writers.Wait()
	b.mu.Lock()
	delete(b.mu.live, c)
	if c.claimed {
		delete(b.mu.claims, c.cl.ID)
	}
	b.mu.Unlock()
	close(c.done)
}

// ask runs fn on the core and waits until it is durable.
func (b *Broker) ask(fn func(*tx, *result)) error {
	done := make(chan error, 1)
	if !b.inbox.put(true, op{fn: fn, done: func(err error) { done <- err }}) {
		return ErrClosed
	}
	return <-done
}

// later adds to what the core gets when the client's bytes are used up.
func (c *conn) later(o op) {
	c.pending = append(c.pending, o)
	if len(c.pending) >= maxPending {
		c.flush()
	}
}

// flush hands over to the core; it waits while the core has enough to do.
func (c *conn) flush() {
	if len(c.pending) == 0 {
		return
	}
	n := len(c.pending)
	c.b.inbox.put(true, c.pending...)
	clear(c.pending)
	c.pending = c.pending[:0]
	if n <= 2 && cap(c.pending) > 8 { // quiet again
		c.pending = nil
	}
}

// receive takes one packet of a connected client.
func (c *conn) receive(pk *packets.Packet) error {
	c.b.stats.received()
	switch pk.FixedHeader.Type {
	case packets.Publish:
		return c.publish(pk)
	case packets.Puback, packets.Pubcomp:
		c.acked(pk)
		return nil
	case packets.Pubrec:
		return c.pubrec(pk)
	case packets.Pubrel:
		return c.pubrel(pk)
	case packets.Subscribe:
		return c.subscribe(pk)
	case packets.Unsubscribe:
		return c.unsubscribe(pk)
	case packets.Pingreq:
		c.answer(packets.Pingresp<<4, 0)
		c.kick()
		return nil
	case packets.Disconnect:
		return c.disconnect(pk)
	case packets.Connect:
		return packets.ErrProtocolViolationSecondConnect // [MQTT-3.1.0-2]
	default: // AUTH, without a method in CONNECT; and what only servers send
		return packets.ErrProtocolViolation
	}
}

func (c *conn) disconnect(pk *packets.Packet) error {
	if pk.Properties.SessionExpiryIntervalFlag {
		if c.expiry == 0 && pk.Properties.SessionExpiryInterval > 0 { // [MQTT-3.14.2-2]
			return packets.ErrProtocolViolationZeroNonZeroExpiry
		}
		c.expiry = pk.Properties.SessionExpiryInterval
	}
	// Only this reason code discards the Will [MQTT-3.14.4-3].
	c.bye = pk.ReasonCode == 0
	return errBye
}

// publish takes a PUBLISH. The answer follows once it is durable.
func (c *conn) publish(pk *packets.Packet) error {
	b, s := c.b, c.session
	if err := c.resolve(pk); err != nil {
		return err
	}
	b.stats.receivedPublish(len(pk.Payload))
	m := fromPacket(pk)
	m.From, m.ClientID = c.id, c.cl.ID
	qos := pk.FixedHeader.Qos
	switch qos {
	case 1:
		over := int(c.unacked.Add(1))+c.received2() > receiveMaximum
		if over && c.v5 { // [MQTT-3.3.4-7]
			return packets.ErrReceiveMaximum
		}
	case 2:
		s.mu.Lock()
		state := s.mu.received[pk.PacketID]
		if state == 0 {
			if s.mu.received == nil {
				s.mu.received = map[uint16]recvState{}
			}
			s.mu.received[pk.PacketID] = recvPending
		}
		over := int(c.unacked.Load())+len(s.mu.received) > receiveMaximum
		s.mu.Unlock()
		if over && c.v5 {
			return packets.ErrReceiveMaximum
		}
		switch state { // [MQTT-4.3.3-10]
		case recvRecorded:
			c.ack(packets.Pubrec, pk.PacketID)
			c.kick()
			return nil
		case recvPending:
			return nil // its PUBREC comes
		}
	}
	o := op{m: m, c: c, id: pk.PacketID, qos: qos, intercept: true}
	if err := m.check(b.opts.Node); err != nil {
		c.flush() // answers keep the order of the publishes
		c.later(op{fn: func(_ *tx, r *result) { r.err = err }, done: func(error) { c.concluded(&o, err); c.kick() }})
		return nil
	}
	c.later(o)
	return nil
}

// resolve checks a PUBLISH and its topic, and puts the topic in where the
// client sent its alias.
func (c *conn) resolve(pk *packets.Packet) error {
	if pk.FixedHeader.Qos == 0 && pk.FixedHeader.Dup { // [MQTT-3.3.1-2]
		return packets.ErrProtocolViolationDupNoQos
	}
	if code := pk.PublishValidate(maxAliases); code != packets.CodeSuccess {
		return code
	}
	if r := pk.Properties.ResponseTopic; strings.ContainsAny(r, "+#") { // [MQTT-3.3.2-14]
		return packets.ErrProtocolViolationInvalidTopic
	}
	if a := pk.Properties.TopicAlias; a > 0 && c.v5 {
		if pk.TopicName == "" {
			t, ok := c.aliases[a]
			if !ok {
				return packets.ErrProtocolViolationNoTopic
			}
			pk.TopicName = t
		} else {
			if c.aliases == nil {
				c.aliases = map[uint16]string{}
			}
			c.aliases[a] = pk.TopicName
		}
	}
	if !utf8.ValidString(pk.TopicName) || strings.ContainsRune(pk.TopicName, 0) { // [MQTT-1.5.4-1] [MQTT-1.5.4-2]
		return packets.ErrMalformedTopic
	}
	return nil
}

func (c *conn) received2() int {
	c.session.mu.Lock()
	defer c.session.mu.Unlock()
	return len(c.session.mu.received)
}

// forget2 forgets the packet id of a QoS 2 publish.
func (c *conn) forget2(id uint16) {
	c.session.mu.Lock()
	delete(c.session.mu.received, id)
	c.session.mu.Unlock()
}

// pubrel completes a QoS 2 publish of the client's. A stored session forgets
// its packet id for good before PUBCOMP: a new message may have it next.
func (c *conn) pubrel(pk *packets.Packet) error {
	s, id := c.session, pk.PacketID
	s.mu.Lock()
	state := s.mu.received[id]
	s.mu.Unlock()
	if state != recvRecorded {
		pc := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubcomp}, PacketID: id}
		if c.v5 {
			pc.ReasonCode = packets.ErrPacketIdentifierNotFound.Code
		}
		c.answer(c.encode(pc)...)
		c.kick()
		return nil
	}
	if !s.stored {
		c.forget2(id)
		c.ack(packets.Pubcomp, id)
		c.kick()
		return nil
	}
	c.later(op{
		fn: func(t *tx, r *result) {
			t.sb.DeleteReceived(s.num, id)
			r.stored, t.sync = true, true
		},
		done: func(err error) {
			if err != nil {
				c.stop(err)
				return
			}
			c.forget2(id)
			c.ack(packets.Pubcomp, id)
			c.kick()
		},
	})
	return nil
}

// acked takes PUBACK and PUBCOMP.
func (c *conn) acked(pk *packets.Packet) {
	ask, known := c.session.acked(c, pk.PacketID, pk.FixedHeader.Type)
	if !known {
		return
	}
	if ask {
		c.later(c.b.tidyOp(c.session))
	}
	c.kick()
}

// pubrec takes PUBREC: a stored session notes it for good before PUBREL, after
// which the client forgets the packet id.
func (c *conn) pubrec(pk *packets.Packet) error {
	s, id := c.session, pk.PacketID
	if pk.ReasonCode >= CodeUnspecified { // [MQTT-4.3.3-9], the other way round
		if ask, known := s.refused(c, id); known && ask {
			c.later(c.b.tidyOp(s))
		}
		c.kick()
		return nil
	}
	e, again := s.pubrec(c, id)
	if e == nil {
		pr := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Pubrel}, PacketID: id}
		if c.v5 {
			pr.ReasonCode = packets.ErrPacketIdentifierNotFound.Code
		}
		c.answer(c.encode(pr)...)
		c.kick()
		return nil
	}
	if again || !s.stored {
		if !again {
			s.release(e)
		}
		c.ack(packets.Pubrel, id)
		c.kick()
		return nil
	}
	c.later(op{
		fn: func(t *tx, r *result) {
			if _, again := s.pubrec(c, id); again || s.ended {
				return
			}
			t.undoing(s.release(e))
			t.sb.Release(s.num, e.n)
			r.stored, t.sync = true, true
		},
		done: func(err error) {
			if err != nil {
				c.stop(err)
				return
			}
			c.ack(packets.Pubrel, id)
			c.kick()
		},
	})
	return nil
}

func (c *conn) subscribe(pk *packets.Packet) error {
	if code := pk.SubscribeValidate(); code != packets.CodeSuccess {
		return code
	}
	if ids := pk.Properties.SubscriptionIdentifier; len(ids) > 1 || len(ids) == 1 && ids[0] == 0 { // [MQTT-3.8.2.1.2]
		return packets.ErrProtocolViolation
	}
	b := c.b
	codes := make([]byte, len(pk.Filters))
	var subs []store.Subscription
	reason := ""
	for i, f := range pk.Filters {
		_, _, shared := shareName(f.Filter)
		if shared && f.NoLocal { // [MQTT-3.8.3-4]
			return packets.ErrProtocolViolationInvalidSharedNoLocal
		}
		if f.RetainHandling > 2 || !utf8.ValidString(f.Filter) {
			return packets.ErrMalformedPacket
		}
		codes[i] = f.Qos
		err := checkFilter(f.Filter)
		if err != nil {
			codes[i] = packets.ErrTopicFilterInvalid.Code
		} else if err = c.id.MaySubscribe(topic.Filter(f.Filter)); err != nil {
			codes[i] = packets.ErrNotAuthorized.Code
		}
		if err != nil {
			if !c.v5 {
				codes[i] = packets.ErrUnspecifiedError.Code // [MQTT 3.1.1, 3.9.3-2]
			}
			reason = err.Error()
			b.metrics.refused.WithLabelValues("subscribe").Inc()
			b.denied.log(b.log, "subscribe refused", c.cl.ID+f.Filter, "client", c.cl.ID, "filter", f.Filter, "error", err)
			continue
		}
		subs = append(subs, store.Subscription{
			Filter: f.Filter, QoS: f.Qos, ID: f.Identifier, NoLocal: f.NoLocal,
			RetainAsPublished: f.RetainAsPublished, RetainHandling: f.RetainHandling,
		})
	}
	c.later(op{
		fn: func(t *tx, r *result) {
			if len(c.session.subs)+len(subs) > maxSubscriptions {
				r.err = errSubscriptions
				return
			}
			b.subscribe(t, r, c, subs)
		},
		done: func(err error) {
			if errors.Is(err, errSubscriptions) {
				c.stop(err)
				return
			}
			if err != nil {
				reason = err.Error()
				for i := range codes {
					codes[i] = packets.ErrUnspecifiedError.Code
					if c.v5 {
						codes[i] = CodeImplementation
					}
				}
			}
			c.answer(c.encode(packets.Packet{
				FixedHeader: packets.FixedHeader{Type: packets.Suback}, PacketID: pk.PacketID, ReasonCodes: codes,
				Properties: packets.Properties{ReasonString: reason},
			})...)
			c.kick()
		},
	})
	return nil
}

func (c *conn) unsubscribe(pk *packets.Packet) error {
	if code := pk.UnsubscribeValidate(); code != packets.CodeSuccess {
		return code
	}
	var filters []string
	for _, f := range pk.Filters {
		filters = append(filters, f.Filter)
	}
	var existed []bool
	c.later(op{
		fn: func(t *tx, r *result) { existed = c.b.unsubscribe(t, r, c, filters) },
		done: func(err error) {
			a := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Unsuback}, PacketID: pk.PacketID}
			for _, was := range existed {
				code := byte(0)
				switch {
				case err != nil:
					code, a.Properties.ReasonString = CodeImplementation, err.Error()
				case !was:
					code = packets.CodeNoSubscriptionExisted.Code
				}
				a.ReasonCodes = append(a.ReasonCodes, code)
			}
			if err != nil && !c.v5 { // which has no way to say so
				c.stop(err)
				return
			}
			c.answer(c.encode(a)...)
			c.kick()
		},
	})
	return nil
}

// check refuses what the publisher must not publish.
func (m *Message) check(node string) error {
	if m.Topic == "" {
		return &Refusal{Code: CodeTopicInvalid, Kind: "topic", Reason: "the topic is empty"}
	}
	if strings.HasPrefix(string(m.Topic), "$SYS") || strings.HasPrefix(string(m.Topic), "$share") {
		return &Refusal{Code: CodeTopicInvalid, Kind: "topic", Reason: "topics that begin with $SYS or $share are the broker's"}
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

func (c *conn) refused(m *Message, err error) {
	kind := "store"
	var r *Refusal
	switch {
	case errors.As(err, &r):
		kind = r.Kind
	case errors.Is(err, errQueueFull):
		kind = "queue_full"
	}
	c.b.metrics.refused.WithLabelValues(kind).Inc()
	c.b.denied.log(c.b.log, "publish refused", c.cl.ID+string(m.Topic), "client", c.cl.ID, "topic", m.Topic, "kind", kind, "error", err)
}
