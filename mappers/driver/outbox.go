package driver

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	senders      = 8                      // publishes under way at a time
	publishLimit = 10 * time.Second       // one publish, PUBACK included
	publishPause = 250 * time.Millisecond // after a publish that failed
)

// outbox publishes the latest payload of every topic it was given. It is
// bounded by the number of topics: a newer payload replaces one that is still
// waiting. Entries stay after they were sent, so that what the bus lost can be
// sent again.
type outbox struct {
	bus     Bus
	log     *slog.Logger
	metrics *metrics

	mu struct {
		sync.Mutex
		changed *sync.Cond // any of the fields below
		current map[topic.Topic]*outgoing
		urgent  []topic.Topic // waiting, ahead of queue
		queue   []topic.Topic // waiting, in the order of their first change
		sending int
		up      bool
		conn    int // counts connections
		closed  bool
	}
}

type outgoing struct {
	payload []byte
	waiting bool // in urgent or queue
	urgent  bool // in urgent
	sending bool
	gone    bool // forgotten while it was being sent
	dirty   bool // changed while it was being sent
	conn    int  // the connection on which the payload was last acknowledged
	refused bool // the bus refused the last one: said in the log once
}

func newOutbox(bus Bus, m *metrics, log *slog.Logger) *outbox {
	o := &outbox{bus: bus, log: log, metrics: m}
	o.mu.changed = sync.NewCond(&o.mu)
	o.mu.current = map[topic.Topic]*outgoing{}
	return o
}

// run publishes until ctx ends.
func (o *outbox) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.mu.closed = true
		o.mu.changed.Broadcast()
	})
	defer stop()
	var wg sync.WaitGroup
	for range senders {
		wg.Go(func() { o.send(ctx) })
	}
	wg.Wait()
}

// put replaces the topic's payload and queues it; urgent ones overtake.
func (o *outbox) put(t topic.Topic, payload []byte, urgent bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	e := o.mu.current[t]
	if e == nil {
		e = &outgoing{}
		o.mu.current[t] = e
	}
	e.payload, e.gone = payload, false
	o.enqueueLocked(t, e, urgent)
}

// adopt keeps a topic as the bus already holds it.
func (o *outbox) adopt(t topic.Topic, payload []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mu.current[t] == nil {
		o.mu.current[t] = &outgoing{payload: payload}
	}
}

func (o *outbox) enqueueLocked(t topic.Topic, e *outgoing, urgent bool) {
	switch {
	case e.sending:
		e.dirty = true
		return
	case e.waiting && (e.urgent || !urgent):
		o.metrics.conflated.Inc()
		return
	case urgent:
		e.urgent = true
		// A second entry further back is skipped when its turn comes.
		o.mu.urgent = append(o.mu.urgent, t)
	default:
		o.mu.queue = append(o.mu.queue, t)
	}
	e.waiting = true
	o.mu.changed.Broadcast()
}

// forget drops topics that are no longer this mapper's to keep alive.
func (o *outbox) forget(ts ...topic.Topic) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, t := range ts {
		if e := o.mu.current[t]; e != nil && e.sending {
			e.gone = true // its sender deletes it; a put meanwhile takes it back
		} else {
			delete(o.mu.current, t)
		}
	}
}

// latest is the payload last put for the topic, or nil.
func (o *outbox) latest(t topic.Topic) []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	if e := o.mu.current[t]; e != nil && !e.gone {
		return e.payload
	}
	return nil
}

// setLink tells whether the bus is connected, and how often it has been.
func (o *outbox) setLink(up bool, conn int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.mu.up, o.mu.conn = up, conn
	o.mu.changed.Broadcast()
}

// repair queues the topics that the bus does not hold as they are here: neither
// taken on this connection nor replayed on it. holds gives what was replayed,
// or nil.
func (o *outbox) repair(holds func(topic.Topic) []byte) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for t, e := range o.mu.current {
		if !e.waiting && !e.sending && e.conn != o.mu.conn && !bytes.Equal(holds(t), e.payload) {
			o.enqueueLocked(t, e, false)
			n++
		}
	}
	return n
}

// lost queues a topic that somebody cleared on the bus, if it is kept here.
func (o *outbox) lost(t topic.Topic) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if e := o.mu.current[t]; e != nil && !e.gone {
		o.enqueueLocked(t, e, false)
	}
}

// flush waits until all was sent, the bus is down or ctx ends.
func (o *outbox) flush(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.mu.changed.Broadcast()
	})
	defer stop()
	o.mu.Lock()
	defer o.mu.Unlock()
	for ctx.Err() == nil && o.mu.up && !o.mu.closed && len(o.mu.urgent)+len(o.mu.queue)+o.mu.sending > 0 {
		o.mu.changed.Wait()
	}
}

func (o *outbox) send(ctx context.Context) {
	for {
		t, payload, conn, ok := o.take()
		if !ok {
			return
		}
		pctx, cancel := context.WithTimeout(ctx, publishLimit)
		err := o.bus.Publish(pctx, t, payload)
		cancel()
		o.sent(t, conn, err)
		if err != nil && !errors.Is(err, ErrRefused) {
			select {
			case <-ctx.Done():
			case <-time.After(publishPause):
			}
		}
	}
}

// take blocks until a topic may be sent; ok is false once the outbox is closed.
func (o *outbox) take() (t topic.Topic, payload []byte, conn int, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		if o.mu.closed {
			return "", nil, 0, false
		}
		if !o.mu.up || len(o.mu.urgent)+len(o.mu.queue) == 0 {
			o.mu.changed.Wait()
			continue
		}
		if len(o.mu.urgent) > 0 {
			t, o.mu.urgent = o.mu.urgent[0], o.mu.urgent[1:]
		} else {
			t, o.mu.queue = o.mu.queue[0], o.mu.queue[1:]
		}
		e := o.mu.current[t]
		if e == nil || !e.waiting {
			// Forgotten, or sent from the urgent queue already.
			o.mu.changed.Broadcast() // flush counts what waits
			continue
		}
		e.waiting, e.urgent, e.sending = false, false, true
		o.mu.sending++
		return t, e.payload, o.mu.conn, true
	}
}

func (o *outbox) sent(t topic.Topic, conn int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer o.mu.changed.Broadcast()
	o.mu.sending--
	switch {
	case err == nil:
		o.metrics.publishes.WithLabelValues("ok").Inc()
	case errors.Is(err, ErrRefused):
		o.metrics.publishes.WithLabelValues("refused").Inc()
	default:
		o.metrics.publishes.WithLabelValues("error").Inc()
	}
	e := o.mu.current[t]
	e.sending = false
	if e.gone {
		delete(o.mu.current, t)
		return
	}
	switch {
	case errors.Is(err, ErrRefused):
		if !e.refused {
			o.log.Warn("the bus refused a message; it is tried again with its next change", "topic", t, "error", err)
		}
		e.refused = true
	case err == nil:
		e.refused, e.conn = false, conn
	default:
		o.log.Debug("publish failed; trying again", "topic", t, "error", err)
		e.dirty = true
	}
	if e.dirty {
		e.dirty = false
		o.enqueueLocked(t, e, false)
	}
}
