package cloudbridge

import (
	"bytes"
	"sync"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// kind says what a key in a queue is about.
type kind uint8

const (
	kindDevice kind = iota
	kindPod
	kindConfigMap
	kindSecret
	kindToken    // name is a pod
	kindHeal     // name is a topic
	kindNode     // name is a node
	kindLease    // name is a node
	kindPodEnded // name is a pod
	kindStatic   // name is node/namespace/pod
	kindGrace    // name is a node
	kindEvent    // name is namespace/id
)

func (k kind) String() string {
	return [...]string{"device", "pod", "configmap", "secret", "token", "heal", "node", "lease", "pod-ended", "static-pod", "grace", "event"}[k]
}

// key is one piece of work: which object is to be looked at again.
type key struct {
	kind kind
	name string // namespace/name, or a name
}

// truth holds the payload that every desired topic should have, and from which
// object it comes: no topic comes from two.
type truth struct {
	mu struct {
		sync.Mutex
		payloads map[topic.Topic][]byte
		owned    map[key][]topic.Topic
		// boot is what the broker held when the process began; nil once every
		// object was looked at.
		boot map[topic.Topic][]byte
	}
}

func newTruth() *truth {
	t := &truth{}
	t.mu.payloads = map[topic.Topic][]byte{}
	t.mu.owned = map[key][]topic.Topic{}
	return t
}

// get is the outbox's question.
func (t *truth) get(tp topic.Topic) ([]byte, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, ok := t.mu.payloads[tp]
	return p, ok
}

// before gives the topic's payload so far: the truth, or what the broker held
// when the process began.
func (t *truth) before(tp topic.Topic) ([]byte, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p, ok := t.mu.payloads[tp]; ok {
		return p, true
	}
	p, ok := t.mu.boot[tp]
	return p, ok
}

// of lists the topics of an object, and tells whether it was looked at before.
func (t *truth) of(owner key) ([]topic.Topic, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ts, ok := t.mu.owned[owner]
	return ts, ok
}

// replace sets the topics of an object and gives those that changed. nil forgets
// the object.
func (t *truth) replace(owner key, want map[topic.Topic][]byte) (changed []topic.Topic) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tp := range t.mu.owned[owner] {
		if _, ok := want[tp]; !ok {
			delete(t.mu.payloads, tp)
			changed = append(changed, tp)
		}
	}
	if want == nil {
		delete(t.mu.owned, owner)
		return changed
	}
	topics := make([]topic.Topic, 0, len(want))
	for tp, p := range want {
		topics = append(topics, tp)
		if old, ok := t.mu.payloads[tp]; !ok || !bytes.Equal(old, p) {
			t.mu.payloads[tp] = p
			changed = append(changed, tp)
		}
	}
	t.mu.owned[owner] = topics
	return changed
}

// setBoot remembers what the broker held; nil forgets it.
func (t *truth) setBoot(boot map[topic.Topic][]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mu.boot = boot
}

// topics lists every topic.
func (t *truth) topics() []topic.Topic {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]topic.Topic, 0, len(t.mu.payloads))
	for tp := range t.mu.payloads {
		out = append(out, tp)
	}
	return out
}

func (t *truth) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.mu.payloads)
}

// steady gives an object's payload under a rev that changes only when something
// else does: the resource version of a Pod or Device grows with every status
// write, which must not cross the link. encode writes the payload with a rev.
func steady(prev []byte, uid string, rev int64, encode func(rev int64) []byte) []byte {
	var p struct {
		UID string `json:"uid"`
		Rev int64  `json:"rev"`
	}
	if len(prev) == 0 || payload.Decode(prev, &p) != nil || p.UID != uid {
		return encode(rev)
	}
	if bytes.Equal(encode(p.Rev), prev) {
		return prev
	}
	return encode(max(rev, p.Rev+1)) // a restored etcd may count from an older number
}
