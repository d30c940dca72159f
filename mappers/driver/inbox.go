package driver

import (
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// inbox stands between the bus's reader, which must not block, and the engine.
// It keeps the newest message per topic, in the order of their first arrival,
// and is so bounded by the number of topics on the bus.
type inbox struct {
	wake chan struct{} // holds one token while there is something to take

	mu struct {
		sync.Mutex
		latest map[topic.Topic]incoming
		order  []topic.Topic
		link   link
	}
}

type incoming struct {
	topic   topic.Topic
	payload []byte
	conn    int // the connection it came on
}

// link is what the inbox knows about the connection.
type link struct {
	conn    int // counts connections; messages carry it
	up      bool
	upAt    time.Time
	lastMsg time.Time // last arrival on this connection
}

func newInbox() *inbox {
	b := &inbox{wake: make(chan struct{}, 1)}
	b.mu.latest = map[topic.Topic]incoming{}
	b.mu.link.conn = 1
	return b
}

// Message implements [Receiver].
func (b *inbox) Message(t topic.Topic, payload []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.mu.latest[t]; !ok {
		b.mu.order = append(b.mu.order, t)
	}
	b.mu.latest[t] = incoming{t, payload, b.mu.link.conn}
	b.mu.link.lastMsg = time.Now()
	b.notify()
}

// Up implements [Receiver].
func (b *inbox) Up() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.link.up, b.mu.link.upAt = true, time.Now()
	b.notify()
}

// Down implements [Receiver].
func (b *inbox) Down(error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.mu.link.up = false
	b.mu.link.conn++
	b.notify()
}

func (b *inbox) notify() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// take empties the inbox.
func (b *inbox) take() ([]incoming, link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := make([]incoming, len(b.mu.order))
	for i, t := range b.mu.order {
		out[i] = b.mu.latest[t]
	}
	b.mu.order = b.mu.order[:0]
	clear(b.mu.latest)
	return out, b.mu.link
}

// link gives the state of the connection.
func (b *inbox) link() link {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.mu.link
}
