package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"time"

	"github.com/eclipse/paho.golang/packets"
	"github.com/eclipse/paho.golang/paho"
	"github.com/eclipse/paho.golang/paho/session"
	"github.com/eclipse/paho.golang/paho/session/state"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Message is one application message.
type Message struct {
	Topic           topic.Topic
	Payload         []byte
	QoS             byte
	Retain          bool
	ResponseTopic   string
	CorrelationData []byte

	// ContentType, PayloadFormat, Expiry (in seconds, 0 is never) and User, the
	// user properties in their order, travel as they are.
	ContentType   string
	PayloadFormat *byte
	Expiry        uint32
	User          [][2]string
}

// Subscription is one filter with its options.
type Subscription struct {
	Filter topic.Filter
	QoS    byte
	// RetainHandling is 0 for all retained messages at every subscribe, 1 for
	// those of a new subscription, 2 for none.
	RetainHandling byte
	NoLocal        bool
	// RetainAsPublished keeps the retain flag on live messages, so that the
	// clearing of a topic can be told from an event without payload.
	RetainAsPublished bool
}

// Config says where and how to connect. The zero value of a field is its default.
type Config struct {
	// URL is the broker's address, as [ParseURL] reads it.
	URL string
	// Dial replaces URL, for connections inside one process.
	Dial func(context.Context) (net.Conn, error)

	ClientID, Username, Password string

	// KeepAlive defaults to 30s. A dead link is noticed within 1.5 times it.
	KeepAlive time.Duration
	// Will makes the last will of each connection; nil is none.
	Will func() *Message

	// Subscriptions are made at every connect, before OnUp.
	Subscriptions []Subscription
	// OnMessage gets every message in order; its QoS 1 message is acknowledged
	// after it returned. The first may come before OnUp. It may block for a
	// while, also on Publish: that holds back further messages, not
	// acknowledgements, as long as no more than ReceiveMaximum wait. That bounds
	// those of QoS 1; more of QoS 0 behind an OnMessage that waits for an answer
	// end the connection as a dead link.
	OnMessage func(Message)
	// OnMessages takes the place of OnMessage: it gets what has arrived so far, in
	// order, at least one message and at most ReceiveMaximum, so that what is to
	// be stored can be stored at once. They are acknowledged after it returned.
	OnMessages func([]Message)
	// Hold is called before each attempt to connect, on Run's goroutine; it may
	// wait, until its context ends at the latest. nil does not.
	Hold func(context.Context)
	// OnUp is called after the subscriptions were acknowledged, on Run's
	// goroutine; it must not block. The context ends with the connection.
	OnUp func(context.Context)
	// OnDown is called when the connection ended, with the reason.
	OnDown func(error)

	// MinBackoff and MaxBackoff bound the jittered wait between attempts, which is a
	// tenth of the time without a connection: who was away for a moment is back in a
	// moment, and a broker that is gone for a day is left in peace;
	// 1s and 30s by default, or less than 1s where MaxBackoff is.
	MinBackoff, MaxBackoff time.Duration
	// ReceiveMaximum bounds the messages that the broker may have in flight
	// towards us; 256 by default.
	ReceiveMaximum uint16

	Logger *slog.Logger
}

// goodbye bounds how long DISCONNECT may take.
const goodbye = time.Second

// ErrOffline says that there is no connection at the moment.
var ErrOffline = errors.New("not connected to the broker")

// ErrLost says that the connection ended before the broker acknowledged: the
// message may or may not have arrived.
var ErrLost = errors.New("connection lost before the broker acknowledged")

// errStuck says that the message was not sent because as many as the broker
// allows wait for their answer.
var errStuck = errors.New("the broker has acknowledged nothing for 10 s")

// Refused is a broker's negative answer, with its reason.
type Refused struct {
	Code   byte
	Reason string
}

func (r *Refused) Error() string {
	if r.Reason == "" {
		return fmt.Sprintf("the broker refused with reason code 0x%02x", r.Code)
	}
	return fmt.Sprintf("the broker refused: %s (0x%02x)", r.Reason, r.Code)
}

// Client keeps one connection to a broker. All methods may be called from any
// goroutine; Run exactly once.
type Client struct {
	cfg  Config
	dial func(context.Context) (net.Conn, error)
	name string
	log  *slog.Logger

	mu struct {
		sync.Mutex
		conn *connection // nil while there is none
	}
}

// connection is one MQTT connection and what is in flight on it.
type connection struct {
	client  *paho.Client
	session *teeSession
	send    chan struct{} // capacity 1: orders publishes; guards session.next
	down    chan error    // first reason why the connection ended
	// maxPacket bounds what the broker takes; 0 is no bound.
	maxPacket uint32
}

// New checks the config. It does not connect.
func New(cfg Config) (*Client, error) {
	c := &Client{cfg: cfg, dial: cfg.Dial, name: "in-process", log: cfg.Logger}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	if cfg.URL != "" {
		c.name = cfg.URL // where Dial is set too, it is how to get there
	}
	if c.dial == nil {
		d, err := ParseURL(cfg.URL, nil)
		if err != nil {
			return nil, err
		}
		c.dial, c.name = d.Dial, d.String()
	}
	if c.cfg.KeepAlive == 0 {
		c.cfg.KeepAlive = 30 * time.Second
	}
	if k := c.cfg.KeepAlive; k < time.Second || k > 65535*time.Second {
		return nil, fmt.Errorf("keepalive %s: want 1s to 18h12m15s", k)
	}
	if c.cfg.MaxBackoff == 0 {
		c.cfg.MaxBackoff = 30 * time.Second
	}
	if c.cfg.MinBackoff == 0 {
		c.cfg.MinBackoff = min(time.Second, c.cfg.MaxBackoff)
	}
	if lo, hi := c.cfg.MinBackoff, c.cfg.MaxBackoff; lo < 0 || hi < lo {
		return nil, fmt.Errorf("backoff from %s to %s: want the first above 0 and not above the second", lo, hi)
	}
	if c.cfg.ReceiveMaximum == 0 {
		c.cfg.ReceiveMaximum = 256
	}
	return c, nil
}

// Run connects, and connects again with a jittered back-off whenever the
// connection ends, until ctx ends; then it disconnects and returns nil.
func (c *Client) Run(ctx context.Context) error {
	wait, since := c.cfg.MinBackoff, time.Now()
	for ctx.Err() == nil {
		if c.cfg.Hold != nil {
			if c.cfg.Hold(ctx); ctx.Err() != nil {
				break
			}
		}
		began := time.Now()
		up, err := c.once(ctx)
		if ctx.Err() != nil {
			break
		}
		// A connection that held longer than the pause before it has earned a new
		// start: the broker restarted, or something cuts the link now and then.
		if up && time.Since(began) > wait {
			since = time.Now()
		}
		wait = min(max(time.Since(since)/outageShare, c.cfg.MinBackoff), c.cfg.MaxBackoff)
		// Half of the wait is random, so that ten thousand nodes do not come
		// back in step after the cloud did.
		pause := wait/2 + rand.N(wait/2+1)
		if up {
			c.log.Info("connection to broker ended", "broker", c.name, "error", err, "retry", pause)
		} else {
			c.log.Warn("cannot connect to broker", "broker", c.name, "error", err, "retry", pause)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

// outageShare is the part of an outage that the wait between two attempts is.
const outageShare = 10

// once holds one connection from dial to end. up tells whether it was established.
func (c *Client) once(ctx context.Context) (up bool, err error) {
	nc, err := c.dial(ctx)
	if err != nil {
		return false, err
	}
	conn := &connection{down: make(chan error, 4), send: make(chan struct{}, 1)}
	conn.session = &teeSession{State: state.NewInMemory(), lost: make(chan struct{})}
	if c.cfg.OnMessages != nil {
		conn.session.arrived = make(chan *packets.Publish, c.cfg.ReceiveMaximum)
	}
	defer func() { _ = conn.session.Close() }()

	lost := func(err error) {
		select {
		case conn.down <- err:
		default:
		}
	}
	ping := newPinger(c.cfg.KeepAlive)
	conn.client = paho.NewClient(paho.ClientConfig{
		ClientID:    c.cfg.ClientID,
		Conn:        newPacketConn(nc, ping),
		Session:     conn.session,
		PingHandler: ping,
		OnPublishReceived: []func(paho.PublishReceived) (bool, error){func(p paho.PublishReceived) (bool, error) {
			if c.cfg.OnMessage != nil {
				c.cfg.OnMessage(fromPaho(p.Packet))
			}
			return true, nil
		}},
		OnClientError: lost,
		OnServerDisconnect: func(d *paho.Disconnect) {
			r := &Refused{Code: d.ReasonCode}
			if d.Properties != nil {
				r.Reason = d.Properties.ReasonString
			}
			lost(fmt.Errorf("disconnected: %w", r))
		},
	})
	// A link that does not take the CONNECT must not hold Run.
	_ = nc.SetDeadline(time.Now().Add(dialTimeout))
	abort := context.AfterFunc(ctx, func() { _ = nc.Close() })
	ack, err := conn.client.Connect(ctx, c.connectPacket())
	if err == nil && abort() {
		_ = nc.SetDeadline(time.Time{})
	}
	if err != nil {
		abort()
		_ = nc.Close()
		if ack != nil {
			r := &Refused{Code: ack.ReasonCode}
			if ack.Properties != nil {
				r.Reason = ack.Properties.ReasonString
			}
			return false, r
		}
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
			err = fmt.Errorf("no answer within %s, is this an MQTT broker? %w", dialTimeout, err)
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			err = fmt.Errorf("the other side hung up without an answer, is this an MQTT 5 broker? %w", err)
		}
		return false, fmt.Errorf("connect: %w", err)
	}
	if p := ack.Properties; p != nil && p.MaximumPacketSize != nil {
		conn.maxPacket = *p.MaximumPacketSize
	}
	stored := make(chan struct{})
	if c.cfg.OnMessages == nil {
		close(stored)
	} else {
		go func() { defer close(stored); c.batches(conn.session) }()
	}
	defer func() {
		<-conn.client.Done()
		if conn.session.arrived != nil {
			close(conn.session.arrived)
		}
		<-stored
	}()
	// Whoever left a Will wants it published whenever it goes: 0x04 asks for
	// that, where 0x00 would discard it [MQTT-3.14.4-3].
	bye := &paho.Disconnect{}
	if c.cfg.Will != nil {
		bye.ReasonCode = 0x04
	}
	defer func() {
		// A link that is dead or full does not take a goodbye.
		force := time.AfterFunc(goodbye, func() { _ = nc.Close() })
		defer force.Stop()
		_ = conn.client.Disconnect(bye)
	}()

	if err := c.subscribe(ctx, conn); err != nil {
		return false, err
	}
	connCtx, cancel := context.WithCancel(ctx)
	defer cancel()

	c.mu.Lock()
	c.mu.conn = conn
	c.mu.Unlock()
	c.log.Info("connected to broker", "broker", c.name)
	if c.cfg.OnUp != nil {
		c.cfg.OnUp(connCtx)
	}
	select {
	case <-ctx.Done():
		err = ctx.Err()
	case err = <-conn.down:
		if ping.dead.Load() {
			err = errNoPong
		}
	}
	c.mu.Lock()
	c.mu.conn = nil
	c.mu.Unlock()
	if c.cfg.OnDown != nil {
		c.cfg.OnDown(err)
	}
	return true, err
}

// batches hands over what has arrived and acknowledges it, until the session's
// channel is closed.
func (c *Client) batches(s *teeSession) {
	var pbs []*packets.Publish
	var msgs []Message
	for pb := range s.arrived {
		pbs, msgs = append(pbs[:0], pb), msgs[:0]
		for more := true; more && len(pbs) < cap(s.arrived); {
			select {
			case pb, ok := <-s.arrived:
				if more = ok; ok {
					pbs = append(pbs, pb)
				}
			default:
				more = false
			}
		}
		for _, pb := range pbs {
			msgs = append(msgs, fromPaho(paho.PublishFromPacketPublish(pb)))
		}
		c.cfg.OnMessages(msgs)
		for _, pb := range pbs {
			if pb.QoS > 0 {
				_ = s.State.Ack(pb) // it fails with the connection, whose reader notices
			}
		}
		clear(pbs)
		clear(msgs)
	}
}

func (c *Client) connectPacket() *paho.Connect {
	cp := &paho.Connect{
		ClientID:   c.cfg.ClientID,
		KeepAlive:  uint16(c.cfg.KeepAlive / time.Second),
		CleanStart: true,
		Properties: &paho.ConnectProperties{
			ReceiveMaximum:     &c.cfg.ReceiveMaximum,
			RequestProblemInfo: true,
		},
	}
	if c.cfg.Username != "" {
		cp.Username, cp.UsernameFlag = c.cfg.Username, true
	}
	if c.cfg.Password != "" {
		cp.Password, cp.PasswordFlag = []byte(c.cfg.Password), true
	}
	if c.cfg.Will != nil {
		if w := c.cfg.Will(); w != nil {
			cp.WillMessage = &paho.WillMessage{Topic: string(w.Topic), Payload: w.Payload, QoS: w.QoS, Retain: w.Retain}
		}
	}
	return cp
}

func (c *Client) subscribe(ctx context.Context, conn *connection) error {
	if len(c.cfg.Subscriptions) == 0 {
		return nil
	}
	s := &paho.Subscribe{}
	for _, sub := range c.cfg.Subscriptions {
		s.Subscriptions = append(s.Subscriptions, paho.SubscribeOptions{
			Topic: string(sub.Filter), QoS: sub.QoS, RetainHandling: sub.RetainHandling,
			NoLocal: sub.NoLocal, RetainAsPublished: sub.RetainAsPublished,
		})
	}
	// paho does not notice that the answer cannot come any more.
	sctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-conn.session.lost:
			cancel()
		case <-sctx.Done():
		}
	}()
	defer func() { cancel(); <-watched }()
	ack, err := conn.client.Subscribe(sctx, s)
	if ack != nil {
		if len(ack.Reasons) != len(c.cfg.Subscriptions) {
			return fmt.Errorf("subscribe: the broker gave %d reason codes for %d subscriptions", len(ack.Reasons), len(c.cfg.Subscriptions))
		}
		for i, code := range ack.Reasons {
			if code >= 0x80 {
				r := &Refused{Code: code}
				if ack.Properties != nil {
					r.Reason = ack.Properties.ReasonString
				}
				return fmt.Errorf("subscribe %s: %w", c.cfg.Subscriptions[i].Filter, r)
			}
		}
	}
	if err == nil {
		return nil
	}
	select {
	case <-conn.session.lost:
		select {
		case err = <-conn.down: // why
		case <-ctx.Done():
		}
	default:
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			err = errors.New("no answer within 10s") // paho's bound
		}
	}
	return fmt.Errorf("subscribe: %w", err)
}

// Connected tells whether there is a connection with its subscriptions made.
func (c *Client) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.mu.conn != nil
}

// Drop ends the present connection, if any, so that Run makes a new one.
func (c *Client) Drop(reason error) {
	c.mu.Lock()
	conn := c.mu.conn
	c.mu.Unlock()
	if conn != nil {
		select {
		case conn.down <- reason:
		default:
		}
	}
}

// Publish sends a message and, for QoS 1 and 2, waits for the broker's answer:
// nil, a *[Refused], [ErrLost], [ErrOffline] or ctx's error. It does not retry.
// A message beyond the broker's maximum packet size is refused with 0x95 without
// being sent, as the broker would hang up.
func (c *Client) Publish(ctx context.Context, m Message) error {
	ack, err := c.Send(ctx, m)
	if err != nil {
		return err
	}
	select {
	case err := <-ack:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Send writes a message and gives the channel that will hold the broker's
// answer. Messages leave in the order of the calls. It blocks while the
// broker's receive maximum is in flight.
func (c *Client) Send(ctx context.Context, m Message) (<-chan error, error) {
	c.mu.Lock()
	conn := c.mu.conn
	c.mu.Unlock()
	if conn == nil {
		return nil, ErrOffline
	}
	answer := make(chan error, 1)
	if n := size(&m); conn.maxPacket > 0 && n > uint64(conn.maxPacket) {
		answer <- &Refused{Code: packets.DisconnectPacketTooLarge, Reason: fmt.Sprintf("a packet of %d bytes is over the broker's limit of %d", n, conn.maxPacket)}
		return answer, nil
	}
	p := &paho.Publish{Topic: string(m.Topic), Payload: m.Payload, QoS: m.QoS, Retain: m.Retain}
	p.Properties = properties(&m)
	resp := make(chan packets.ControlPacket, 1)

	select {
	case conn.send <- struct{}{}:
	case <-conn.session.lost:
		return nil, ErrOffline
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := ctx.Err(); err != nil { // paho sends nevertheless
		<-conn.send
		return nil, err
	}
	select {
	case <-conn.session.lost: // paho takes QoS 0 nevertheless
		<-conn.send
		return nil, ErrOffline
	default:
	}
	conn.session.next = resp
	_, err := conn.client.PublishWithOptions(ctx, p, paho.PublishOptions{Method: paho.PublishMethod_AsyncSend})
	conn.session.next = nil
	<-conn.send

	switch {
	case m.QoS == 0 && err == nil:
		answer <- nil
		return answer, nil
	case errors.Is(err, session.ErrNoConnection), errors.Is(err, net.ErrClosed):
		return nil, ErrOffline
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil: // paho's own
		return nil, fmt.Errorf("publish %q: %w", m.Topic, errStuck)
	case m.QoS == 0 && !errors.Is(err, paho.ErrInvalidArguments) && ctx.Err() == nil:
		return nil, fmt.Errorf("publish %q: %w: %w", m.Topic, ErrLost, err)
	case err != nil && !errors.Is(err, paho.ErrNetworkErrorAfterStored):
		return nil, fmt.Errorf("publish %q: %w", m.Topic, err)
	}
	go func() {
		select {
		case r := <-resp:
			answer <- outcome(r)
		case <-conn.session.lost:
			select {
			case r := <-resp: // it came before
				answer <- outcome(r)
			default:
				answer <- ErrLost
			}
		}
	}()
	return answer, nil
}

// properties gives the message's MQTT 5 properties, nil for none.
func properties(m *Message) *paho.PublishProperties {
	if m.ResponseTopic == "" && len(m.CorrelationData) == 0 && m.ContentType == "" && m.PayloadFormat == nil && m.Expiry == 0 && len(m.User) == 0 {
		return nil
	}
	p := &paho.PublishProperties{
		ResponseTopic: m.ResponseTopic, CorrelationData: m.CorrelationData,
		ContentType: m.ContentType, PayloadFormat: m.PayloadFormat,
	}
	if m.Expiry > 0 {
		p.MessageExpiry = &m.Expiry
	}
	for _, u := range m.User {
		p.User.Add(u[0], u[1])
	}
	return p
}

// size is the length of the message's PUBLISH on the wire.
func size(m *Message) uint64 {
	varint := func(n int) int {
		l := 1
		for ; n >= 128; n >>= 7 {
			l++
		}
		return l
	}
	props := 0
	if m.ResponseTopic != "" {
		props += 3 + len(m.ResponseTopic)
	}
	if len(m.CorrelationData) > 0 {
		props += 3 + len(m.CorrelationData)
	}
	if m.ContentType != "" {
		props += 3 + len(m.ContentType)
	}
	if m.PayloadFormat != nil {
		props += 2
	}
	if m.Expiry > 0 {
		props += 5
	}
	for _, u := range m.User {
		props += 5 + len(u[0]) + len(u[1])
	}
	n := 2 + len(m.Topic) + varint(props) + props + len(m.Payload)
	if m.QoS > 0 {
		n += 2
	}
	return uint64(1 + varint(n) + n)
}

func outcome(r packets.ControlPacket) error {
	switch p := r.Content.(type) {
	case *packets.Puback:
		if p.ReasonCode >= 0x80 {
			return refused(p.ReasonCode, p.Properties)
		}
		return nil
	case *packets.Pubrec:
		return refused(p.ReasonCode, p.Properties)
	case *packets.Pubcomp:
		return nil
	default:
		return ErrLost // the session ended with the message in it
	}
}

func refused(code byte, props *packets.Properties) error {
	r := &Refused{Code: code}
	if props != nil {
		r.Reason = props.ReasonString
	}
	return r
}

func fromPaho(p *paho.Publish) Message {
	m := Message{Topic: topic.Topic(p.Topic), Payload: p.Payload, QoS: p.QoS, Retain: p.Retain}
	if q := p.Properties; q != nil {
		m.ResponseTopic, m.CorrelationData = q.ResponseTopic, q.CorrelationData
		m.ContentType, m.PayloadFormat = q.ContentType, q.PayloadFormat
		if q.MessageExpiry != nil {
			m.Expiry = *q.MessageExpiry
		}
		for _, u := range q.User {
			m.User = append(m.User, [2]string{u.Key, u.Value})
		}
	}
	return m
}

// teeSession lets the client see the answer to a publish that was sent without
// waiting: paho makes a channel for it and drops it.
type teeSession struct {
	*state.State
	next chan<- packets.ControlPacket // guarded by connection.send
	// arrived holds what waits for OnMessages; nil where there is none.
	arrived chan *packets.Publish

	once sync.Once
	lost chan struct{} // closed when the connection is lost
}

// ConnectionLost implements session.SessionManager. paho calls it before it
// waits for OnMessage to return, which may be waiting for an answer; and what
// is added to a session at this moment never gets one from paho.
func (s *teeSession) ConnectionLost(dp *packets.Disconnect) error {
	err := s.State.ConnectionLost(dp)
	s.once.Do(func() { close(s.lost) })
	return err
}

// AddToSession implements session.SessionManager.
func (s *teeSession) AddToSession(ctx context.Context, p session.Packet, resp chan<- packets.ControlPacket) error {
	if p.Type() == packets.PUBLISH && s.next != nil {
		resp = s.next
	}
	return s.State.AddToSession(ctx, p, resp)
}

// Ack implements session.SessionManager. paho calls it when its handlers have
// returned; where messages are handed over in batches they have done nothing yet.
func (s *teeSession) Ack(pb *packets.Publish) error {
	if s.arrived == nil {
		return s.State.Ack(pb)
	}
	s.arrived <- pb
	return nil
}
