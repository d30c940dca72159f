package broker

import (
	"errors"
	"slices"
	"sync"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// Bounds of one connection's outbound queue. A client that does not drain it is
// disconnected: the fabric's parts repair themselves at reconnect, and a
// publisher never waits for it.
const (
	maxQueued      = 16384
	maxQueuedBytes = 16 << 20
	// maxWindow bounds what is in flight to a client that sets no Receive Maximum.
	maxWindow = 256
	// maxReplays bounds the subscriptions whose retained messages still wait.
	maxReplays = 4096
	// maxSubscriptions bounds the subscriptions of a connection.
	maxSubscriptions = 16384
)

var (
	errSlow          = errors.New("outbound queue full: the client reads too slowly")
	errSubscriptions = errors.New("too many subscriptions on one connection")
)

// delivery is one message for one subscriber.
type delivery struct {
	m      *Message
	qos    byte
	retain bool
	subIDs []int
}

// replay walks the retained messages of a new subscription. It reads the index
// as it goes, so that it costs no memory. What changes meanwhile is left out: it
// waits in the queue behind, so that the last message of every topic is its newest.
type replay struct {
	filter topic.Filter
	qos    byte
	subIDs []int
	after  string
	upTo   uint64 // what is newer is delivered live
}

// conn is one client's connection: its outbound queue and the goroutine that
// drains it. All packets that our layer sends go through it, so that nobody
// else ever waits for the client's socket.
type conn struct {
	b      *Broker
	client *client
	cl     *mqtt.Client
	done   chan struct{} // closed when the writer ended
	wake   chan struct{} // capacity 1
	window int

	mu struct {
		sync.Mutex
		closed   bool
		acks     []packets.Packet
		out      []delivery
		bytes    int
		replays  []*replay
		inflight map[uint16]struct{}
		nextID   uint16
	}
}

func newConn(b *Broker, client *client) *conn {
	cl := client.mq
	c := &conn{b: b, client: client, cl: cl, done: make(chan struct{}), wake: make(chan struct{}, 1), window: maxWindow}
	if rm := int(cl.Properties.Props.ReceiveMaximum); rm > 0 { // [MQTT-3.3.4-9]
		c.window = min(rm, maxWindow)
	}
	c.mu.inflight = map[uint16]struct{}{}
	return c
}

func (c *conn) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// ack queues an answer to the client.
func (c *conn) ack(pk packets.Packet) {
	c.mu.Lock()
	full := len(c.mu.acks) >= maxQueued
	if !full && !c.mu.closed {
		c.mu.acks = append(c.mu.acks, pk)
	}
	c.mu.Unlock()
	if full {
		c.stop(errSlow)
		return
	}
	c.signal()
}

// deliver queues a message.
func (c *conn) deliver(d delivery) {
	c.mu.Lock()
	size := d.m.size()
	full := len(c.mu.out) >= maxQueued || c.mu.bytes+size > maxQueuedBytes && len(c.mu.out) > 0
	if !full && !c.mu.closed {
		c.mu.out = append(c.mu.out, d)
		c.mu.bytes += size
	}
	c.mu.Unlock()
	if full {
		c.b.metrics.slow.Inc()
		c.stop(errSlow)
		return
	}
	c.signal()
}

// wantsOwn tells whether a subscription of the client selects the topic and does
// not exclude the client's own messages. mochi merges a client's subscriptions
// into one, which has NoLocal where any of them has.
func (c *conn) wantsOwn(t topic.Topic) bool {
	for f, sub := range c.cl.State.Subscriptions.GetAll() {
		if !sub.NoLocal && topic.Filter(f).Match(t) {
			return true
		}
	}
	return false
}

// replay queues the retained messages of a filter. They go out before what is
// delivered from now on. One that waits for the same filter is replaced.
func (c *conn) replay(r *replay) {
	c.mu.Lock()
	same := func(x *replay) bool { return x.filter == r.filter }
	c.mu.replays = slices.DeleteFunc(c.mu.replays, same)
	full := len(c.mu.replays) >= maxReplays
	if !full && !c.mu.closed {
		c.mu.replays = append(c.mu.replays, r)
	}
	c.mu.Unlock()
	if full {
		c.stop(errSlow)
		return
	}
	c.signal()
}

// acked frees the packet id of a delivery that the client acknowledged.
func (c *conn) acked(id uint16) {
	c.mu.Lock()
	delete(c.mu.inflight, id)
	c.mu.Unlock()
	c.signal()
}

// stop ends the connection without waiting for its socket. The client is told
// why if it reads within a second.
func (c *conn) stop(err error) {
	if !c.shut() {
		return
	}
	c.b.log.Warn("client disconnected", "client", c.cl.ID, "remote", c.cl.Net.Remote, "error", err)
	code := packets.ErrImplementationSpecificError
	if errors.Is(err, errSlow) || errors.Is(err, errSubscriptions) {
		code = packets.ErrQuotaExceeded
	}
	c.b.hangUp(c.client, code)
}

// shut drops what waits and ends the writer; it does not wait for it. It tells
// whether there was anything to end.
func (c *conn) shut() bool {
	c.mu.Lock()
	open := !c.mu.closed
	c.mu.closed = true
	c.mu.acks, c.mu.out, c.mu.replays, c.mu.bytes = nil, nil, nil, 0
	c.mu.Unlock()
	c.signal()
	return open
}

// close ends the writer; it returns when the writer is gone.
func (c *conn) close() {
	c.shut()
	<-c.done
}

// run is the writer. Answers go first; then retained messages of new
// subscriptions; then the queue, as far as the window allows.
func (c *conn) run() {
	defer close(c.done)
	for {
		pk, release, state := c.take()
		switch state {
		case takeClosed:
			return
		case takeNothing:
			<-c.wake
			continue
		}
		err := c.cl.WritePacket(pk)
		switch {
		case err == nil:
			if pk.FixedHeader.Type == packets.Publish {
				c.b.metrics.sent.Inc()
			}
		case errors.Is(err, packets.ErrPacketTooLarge):
			// The client's own maximum: the message counts as delivered [MQTT-3.1.2-25].
			c.b.metrics.dropped.WithLabelValues("too_large").Inc()
			if release != 0 {
				c.acked(release)
			}
		default:
			c.shut()
			c.cl.Stop(err) // the reader notices
			return
		}
	}
}

type takeState uint8

const (
	takePacket takeState = iota
	takeNothing
	takeClosed
)

func (c *conn) take() (pk packets.Packet, release uint16, s takeState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.mu.closed {
		return pk, 0, takeClosed
	}
	if len(c.mu.acks) > 0 {
		pk = c.mu.acks[0]
		c.mu.acks = c.mu.acks[1:]
		if len(c.mu.acks) == 0 {
			c.mu.acks = nil
		}
		return pk, 0, takePacket
	}
	now := time.Now()
	for len(c.mu.replays) > 0 {
		r := c.mu.replays[0]
		if r.qos > 0 && len(c.mu.inflight) >= c.window {
			return pk, 0, takeNothing
		}
		m, ok := c.b.retained.next(r.filter, r.after)
		if !ok {
			c.mu.replays = c.mu.replays[1:]
			continue
		}
		r.after = string(m.Topic)
		if r.filter.Prefix() == string(r.filter) {
			c.mu.replays = c.mu.replays[1:] // a literal filter selects one topic
		}
		if m.expired(now) || m.seq > r.upTo {
			continue
		}
		qos := min(r.qos, m.QoS)
		release = c.allocLocked(qos)
		return m.packet(qos, true, release, r.subIDs), release, takePacket
	}
	for len(c.mu.out) > 0 {
		d := c.mu.out[0]
		if d.qos > 0 && len(c.mu.inflight) >= c.window {
			return pk, 0, takeNothing
		}
		c.mu.out[0] = delivery{}
		c.mu.out = c.mu.out[1:]
		c.mu.bytes -= d.m.size()
		if len(c.mu.out) == 0 {
			c.mu.out = nil
		}
		if d.m.expired(now) {
			continue
		}
		release = c.allocLocked(d.qos)
		return d.m.packet(d.qos, d.retain, release, d.subIDs), release, takePacket
	}
	return pk, 0, takeNothing
}

// allocLocked gives a packet id that is not in flight. The window is far
// smaller than the id space, so there always is one.
func (c *conn) allocLocked(qos byte) uint16 {
	if qos == 0 {
		return 0
	}
	for {
		c.mu.nextID++
		if c.mu.nextID == 0 {
			continue
		}
		if _, used := c.mu.inflight[c.mu.nextID]; !used {
			c.mu.inflight[c.mu.nextID] = struct{}{}
			return c.mu.nextID
		}
	}
}
