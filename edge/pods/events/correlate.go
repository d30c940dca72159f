package events

import (
	"fmt"
	"strings"
	"time"

	"k8s.io/utils/lru"
)

// The figures are client-go's (tools/record/events_cache.go), but for the number
// of records: a node has a hundred pods, not a cluster's.
const (
	// records is how many of each kind are remembered; the least recently used
	// goes first.
	records = 1024

	// similar events are combined from this number of different messages on, …
	combineFrom = 10
	// … unless there was none for this long.
	combineWithin = 10 * time.Minute

	// An object may have spamBurst events at once and one per spamRefill.
	spamBurst  = 25
	spamRefill = 5 * time.Minute

	combinedPrefix = "(combined from similar events): "
	maxName        = 253 // of a Kubernetes object
)

// spamKey is an object with a type of events.
type spamKey struct {
	ref Ref // without FieldPath
	typ string
}

// similarKey is events that differ in their message only. As in client-go, the
// containers of a pod are not told apart.
type similarKey struct {
	spamKey
	reason string
}

// sameKey is one event that repeats itself.
type sameKey struct {
	similarKey
	fieldPath, message string
}

// similarities is what was seen of similar events.
type similarities struct {
	messages map[string]struct{} // at most combineFrom
	last     time.Time
}

// observed is an event that has been seen.
type observed struct {
	id    string
	first time.Time
	count int
}

// bucket is an object's tokens.
type bucket struct {
	tokens float64
	at     time.Time
}

// correlator finds out what an event is a repetition of. It is guarded by its
// recorder.
type correlator struct {
	similar *lru.Cache // similarKey → *similarities
	// seen is by sameKey, and by similarKey what combines.
	seen    *lru.Cache // → *observed
	buckets *lru.Cache // spamKey → *bucket
	nanos   int64      // of the last ID
}

func newCorrelator() *correlator {
	return &correlator{similar: lru.New(records), seen: lru.New(records), buckets: lru.New(records)}
}

// correlate completes an event; !ok is one that its object may not send now. It
// is counted nevertheless, so that the next one tells the whole number.
func (c *correlator) correlate(ev Event, now time.Time) (_ Event, ok bool) {
	object := spamKey{ref: ev.Ref, typ: ev.Type}
	object.ref.FieldPath = ""
	like := similarKey{object, ev.Reason}
	var key any = sameKey{like, ev.Ref.FieldPath, ev.Message}

	s, _ := get[*similarities](c.similar, like)
	if s == nil || now.Sub(s.last) > combineWithin {
		s = &similarities{messages: map[string]struct{}{}}
		c.similar.Add(like, s)
	}
	s.messages[ev.Message], s.last = struct{}{}, now
	if len(s.messages) >= combineFrom {
		for m := range s.messages { // any of them: the set must not grow, nor shrink further
			delete(s.messages, m)
			break
		}
		key, ev.Message = like, combinedPrefix+ev.Message
	}

	o, _ := get[*observed](c.seen, key)
	if o == nil {
		o = &observed{id: c.id(ev.Ref.Name, now), first: now}
		c.seen.Add(key, o)
	}
	o.count++
	ev.ID, ev.First, ev.Last, ev.Count = o.id, o.first, now, o.count

	b, _ := get[*bucket](c.buckets, object)
	if b == nil {
		b = &bucket{tokens: spamBurst, at: now}
		c.buckets.Add(object, b)
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(spamBurst, b.tokens+float64(d)/float64(spamRefill))
	}
	b.at = now
	if b.tokens < 1 {
		return Event{}, false
	}
	b.tokens--
	return ev, true
}

// id names an event as the kubelet does, after the object and the time, and
// never twice.
func (c *correlator) id(name string, now time.Time) string {
	c.nanos = max(now.UnixNano(), c.nanos+1)
	suffix := fmt.Sprintf(".%x", c.nanos)
	if len(name)+len(suffix) > maxName {
		name = strings.TrimRight(name[:maxName-len(suffix)], "-.")
	}
	return name + suffix
}

func get[V any](c *lru.Cache, key any) (v V, ok bool) {
	if x, found := c.Get(key); found {
		return x.(V), true
	}
	return v, false
}
