package broker

import (
	"strings"
	"sync"
	"time"

	"github.com/tidwall/btree"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// retained is the index of retained messages: all of them, in memory, sorted
// by topic. The core alone writes it.
type retained struct {
	mu   sync.RWMutex
	tree btree.Map[string, *Message]
}

func (r *retained) get(t topic.Topic) (*Message, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.tree.Get(string(t))
}

func (r *retained) put(m *Message) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(m.Payload) == 0 {
		r.tree.Delete(string(m.Topic))
		return
	}
	r.tree.Set(string(m.Topic), m)
}

func (r *retained) len() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.tree.Len()
}

// next gives the first match of the filter after the topic, which may be empty.
// Walking the index by next holds the lock for one step at a time, and gives
// every topic its newest message at the moment it is reached.
func (r *retained) next(f topic.Filter, after string) (*Message, bool) {
	prefix := f.Prefix()
	literal := prefix == string(f)
	r.mu.RLock()
	defer r.mu.RUnlock()
	if literal {
		if after != "" {
			return nil, false
		}
		return r.tree.Get(prefix)
	}
	var found *Message
	from := max(prefix, after)
	r.tree.Ascend(from, func(t string, m *Message) bool {
		if t == after {
			return true
		}
		if !strings.HasPrefix(t, prefix) {
			return false
		}
		if !f.Match(topic.Topic(t)) {
			return true
		}
		found = m
		return false
	})
	return found, found != nil
}

// expired lists up to n topics whose time is over.
func (r *retained) expired(now time.Time, n int) []topic.Topic {
	var out []topic.Topic
	r.mu.RLock()
	defer r.mu.RUnlock()
	r.tree.Scan(func(_ string, m *Message) bool {
		if m.expired(now) {
			out = append(out, m.Topic)
		}
		return len(out) < n
	})
	return out
}

// match lists all messages that the filter selects, sorted by topic.
func (r *retained) match(f topic.Filter) []*Message {
	var out []*Message
	after := ""
	for {
		m, ok := r.next(f, after)
		if !ok {
			return out
		}
		out = append(out, m)
		after = string(m.Topic)
	}
}
