package broker

import (
	"errors"
	"sync"
	"sync/atomic"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/schemas/access"
)

const (
	// maxWrite is about how much goes into one write.
	maxWrite = 32 << 10
	// maxAnswers bounds the answers that wait for a client that does not read.
	maxAnswers = 256 << 10
	// maxAliases bounds the topic aliases in each direction.
	maxAliases = 256
)

var (
	errSlow          = errors.New("outbound queue full: the client reads too slowly")
	errSubscriptions = errors.New("too many subscriptions in one session")
)

// conn is one connection, from accept to its end. Where nothing else is said
// its fields are the reader goroutine's.
type conn struct {
	b        *Broker
	fc       *frameConn
	cl       *mqtt.Client
	listener string
	refuse   bool          // a full queue refuses the publisher
	done     chan struct{} // closed when the connection is gone with all that belonged to it

	id      access.Identity
	v5      bool
	window  int
	aliases map[uint16]string // of topics that the client sends
	claimed bool              // it holds its client id
	session *session          // set before up
	up      atomic.Bool       // the session is attached
	reason  string            // for the CONNACK
	will    *store.Will
	bye     bool   // it sent DISCONNECT 0x00: no Will
	expiry  uint32 // of the session, as asked for
	pending []op   // for the core, until the next read from the socket
	unacked atomic.Int32

	hang   sync.Once
	hungUp chan struct{} // closed when the farewell is over; nil before hang

	touched bool // the core's: it is to be woken at the end of the batch

	mu struct {
		sync.Mutex
		closed  bool
		running bool // there is a writer
		again   bool // and there may be more for it
		answers []byte
	}
	writers sync.WaitGroup

	// The writer's own.
	names     map[string]uint16 // topic aliases that the client knows
	aliasMax  uint16
	nextAlias uint16
	byAlias   []string
}

// kick sees to it that a writer looks for work. There is none while nothing
// is to be sent: an idle client costs no goroutine of ours beside its reader.
func (c *conn) kick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mu.again = true
	if c.mu.running || c.mu.closed || !c.up.Load() {
		return
	}
	c.mu.running = true
	c.writers.Add(1)
	go c.write()
}

// answer queues a packet that goes out before any message.
func (c *conn) answer(packet ...byte) {
	c.mu.Lock()
	c.b.stats.packetsSent.Add(1)
	full := len(c.mu.answers)+len(packet) > maxAnswers
	if !full && !c.mu.closed {
		c.mu.answers = append(c.mu.answers, packet...)
	}
	c.mu.Unlock()
	if full {
		c.stop(errSlow)
	}
}

func (c *conn) ack(kind byte, id uint16) {
	var p [4]byte
	c.answer(appendAck(p[:0], kind, id)...)
}

// stop ends the connection without waiting for its socket. The client is told
// why if it reads within a second.
func (c *conn) stop(err error) {
	if !c.shut() {
		return
	}
	if errors.Is(err, errSlow) {
		c.b.metrics.slow.Inc()
	}
	c.b.log.Warn("client disconnected", "client", c.cl.ID, "remote", c.cl.Net.Remote, "error", err)
	code := packets.ErrImplementationSpecificError
	if errors.Is(err, errSlow) || errors.Is(err, errSubscriptions) {
		code = packets.ErrQuotaExceeded
		code.Reason = err.Error()
	}
	c.b.hangUp(c, code)
}

// shut ends the writer; it does not wait for it. It tells whether there was
// anything to end.
func (c *conn) shut() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	open := !c.mu.closed
	c.mu.closed = true
	c.mu.answers = nil
	return open
}

// buffers are the writers'.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, maxWrite+4096); return &b }}

// write is the writer: it sends until there is nothing to send. Answers go first.
func (c *conn) write() {
	defer c.writers.Done()
	p := buffers.Get().(*[]byte)
	defer func() {
		if cap(*p) <= 4*maxWrite {
			buffers.Put(p)
		}
	}()
	for {
		c.mu.Lock()
		if c.mu.closed {
			c.mu.running = false
			c.mu.Unlock()
			return
		}
		c.mu.again = false
		buf := (*p)[:0]
		buf = append(buf, c.mu.answers...)
		if cap(c.mu.answers) > 4096 {
			c.mu.answers = nil
		} else {
			c.mu.answers = c.mu.answers[:0]
		}
		c.mu.Unlock()
		buf, page, ask := c.session.fill(c, buf)
		*p = buf
		if ask {
			c.b.tidyLater(c.session)
		}
		if len(buf) > 0 {
			if _, err := c.fc.Write(buf); err != nil {
				c.shut()
				c.cl.Stop(err) // the reader notices
				continue
			}
			c.b.stats.bytesSent.Add(uint64(len(buf)))
			if len(buf) >= maxWrite {
				continue
			}
		}
		if page {
			if err := c.session.page(c); err != nil {
				c.b.log.Error("queue not read", "client", c.cl.ID, "error", err)
				c.stop(err)
			}
			continue
		}
		if c.session.wantsReplay() {
			c.b.replayLater(c.session)
		}
		c.mu.Lock()
		if !c.mu.again || c.mu.closed {
			c.mu.running = false
			c.mu.Unlock()
			return
		}
		c.mu.Unlock()
	}
}

// append encodes a message for this client. ok is false where it is larger
// than the client takes.
func (c *conn) append(buf []byte, p *outPublish, now time.Time) (out []byte, ok bool) {
	known := true
	if c.aliasMax > 0 {
		p.alias, known = c.names[string(p.m.Topic)], true
		if p.alias == 0 {
			known = false
			p.alias = c.nextAlias%c.aliasMax + 1
		}
		p.bare = known
	}
	out, size := p.append(buf, c.v5, now)
	if limit := c.cl.Properties.Props.MaximumPacketSize; limit > 0 && uint32(size) > limit {
		return buf, false
	}
	if !known { // the oldest alias makes room
		if c.names == nil {
			c.names = map[string]uint16{}
		}
		i := int(p.alias) - 1
		if i < len(c.byAlias) {
			delete(c.names, c.byAlias[i])
			c.byAlias[i] = string(p.m.Topic)
		} else {
			c.byAlias = append(c.byAlias, string(p.m.Topic))
		}
		c.names[string(p.m.Topic)] = p.alias
		c.nextAlias = p.alias
	}
	return out, true
}

// hangUp ends a connection without waiting for it. A client of MQTT 5 is told
// why, and has a second to hear it.
func (b *Broker) hangUp(c *conn, code packets.Code) {
	c.hang.Do(func() {
		if !c.up.Load() {
			_ = c.fc.Close()
			return
		}
		c.mu.Lock()
		c.mu.closed = true
		answers := c.mu.answers
		c.mu.answers = nil
		c.mu.Unlock()
		c.fc.end()
		hungUp := make(chan struct{})
		b.mu.Lock()
		c.hungUp = hungUp
		b.mu.Unlock()
		// A deadline does not free every kind of connection from a write that
		// does not end; closing it does.
		force := time.AfterFunc(farewell, func() { _ = c.fc.Close() })
		go func() {
			defer close(hungUp)
			defer force.Stop()
			c.farewell(answers, code)
			_ = c.fc.Close()
		}()
	})
}

// farewell sends the last answers and, in MQTT 5, the reason.
func (c *conn) farewell(answers []byte, code packets.Code) {
	c.writers.Wait() // whose last write ends, or is ended by closing the connection
	if c.v5 {
		pk := packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Disconnect}, ReasonCode: code.Code}
		pk.Properties.ReasonString = code.Reason
		answers = append(answers, c.encode(pk)...)
	}
	if len(answers) > 0 {
		_, _ = c.fc.Write(answers)
	}
}
