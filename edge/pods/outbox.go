package pods

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// maxBatch bounds the messages of one commit.
	maxBatch = 128
	// outboxRetry is when a refused batch is tried again.
	outboxRetry = 2 * time.Second
)

// outbox publishes reports to the bus, many in one commit, so that the workers do
// not wait for a disk. Reports are conflated by topic: their number is that of the
// pods.
type outbox struct {
	bus Bus
	log *slog.Logger

	mu struct {
		sync.Mutex
		reports map[topic.Topic][]byte // empty clears the topic
		order   []topic.Topic
		waiting map[topic.Topic][]chan struct{}
	}
	signal chan struct{}
}

func newOutbox(bus Bus, log *slog.Logger) *outbox {
	o := &outbox{bus: bus, log: log, signal: make(chan struct{}, 1)}
	o.mu.reports = map[topic.Topic][]byte{}
	o.mu.waiting = map[topic.Topic][]chan struct{}{}
	return o
}

// report publishes the topic's new state soon. What the bus has already is left out.
func (o *outbox) report(t topic.Topic, p []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, ok := o.mu.reports[t]; !ok {
		if old, _ := o.bus.Retained(t); bytes.Equal(old, p) {
			return
		}
		o.mu.order = append(o.mu.order, t)
	}
	o.mu.reports[t] = p
	o.wake()
}

func (o *outbox) wake() {
	select {
	case o.signal <- struct{}{}:
	default:
	}
}

// settle waits until the topic's report is stored, so that what it was made from
// may go.
func (o *outbox) settle(ctx context.Context, t topic.Topic) error {
	o.mu.Lock()
	if _, ok := o.mu.reports[t]; !ok {
		o.mu.Unlock()
		return nil
	}
	c := make(chan struct{})
	o.mu.waiting[t] = append(o.mu.waiting[t], c)
	o.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run publishes until ctx ends, and then what is left.
func (o *outbox) run(ctx context.Context) {
	for {
		select {
		case <-o.signal:
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), outboxRetry)
			defer cancel()
			for o.publish(last) == nil && o.more() {
			}
			return
		}
		for o.more() {
			err := o.publish(ctx)
			if err == nil {
				continue
			}
			if ctx.Err() == nil {
				o.log.Warn("pods' reports not stored, trying again", "error", err)
			}
			select {
			case <-time.After(outboxRetry):
			case <-ctx.Done():
			}
			if ctx.Err() != nil {
				break
			}
		}
	}
}

func (o *outbox) more() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.mu.order) > 0
}

// publish publishes one batch. What fails stays.
func (o *outbox) publish(ctx context.Context) error {
	o.mu.Lock()
	var batch []broker.Message
	for _, t := range o.mu.order[:min(len(o.mu.order), maxBatch)] {
		batch = append(batch, broker.Message{Topic: t, Payload: o.mu.reports[t], QoS: 1, Retain: true})
	}
	o.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	if err := o.bus.Publish(ctx, batch...); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, m := range batch {
		if bytes.Equal(o.mu.reports[m.Topic], m.Payload) {
			delete(o.mu.reports, m.Topic)
			for _, c := range o.mu.waiting[m.Topic] {
				close(c)
			}
			delete(o.mu.waiting, m.Topic)
		}
	}
	var left []topic.Topic // what came meanwhile, and what changed meanwhile
	for _, t := range o.mu.order {
		if _, ok := o.mu.reports[t]; ok {
			left = append(left, t)
		}
	}
	o.mu.order = left
	return nil
}
