package broker

import (
	"math"
	rm "runtime/metrics"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

// sysInterval is how often $SYS is brought up to date.
const sysInterval = 10 * time.Second

// stats are counted where things happen.
type stats struct {
	connected, maximum            atomic.Int64
	expired                       atomic.Uint64 // sessions
	stored, queued, queuedBytes   atomic.Int64  // sessions that outlive their connection, and what waits for them
	bytesReceived, bytesSent      atomic.Uint64
	packetsReceived, packetsSent  atomic.Uint64
	publishReceived, publishSent  atomic.Uint64
	payloadReceived, payloadSent  atomic.Uint64
	socketsReceived, connectsSeen atomic.Uint64
}

func (s *stats) online(n int64) {
	now := s.connected.Add(n)
	for {
		most := s.maximum.Load()
		if now <= most || s.maximum.CompareAndSwap(most, now) {
			return
		}
	}
}

func (s *stats) received() { s.packetsReceived.Add(1) }

func (s *stats) receivedPublish(payload int) {
	s.publishReceived.Add(1)
	s.payloadReceived.Add(uint64(payload))
}

func (s *stats) sentPublish(payload int) {
	s.packetsSent.Add(1)
	s.publishSent.Add(1)
	s.payloadSent.Add(uint64(payload))
}

// sys is what $SYS shows, in mosquitto's words, so that what people have for
// mosquitto shows it. It is the core's own.
type sys struct {
	began time.Time
	at    time.Time // of the last report
	last  map[string]string
	loads []load
	heap  uint64 // the most
}

// load is a moving average per minute, over 1, 5 and 15 minutes.
type load struct {
	name string
	of   func(*stats) uint64
	was  uint64
	avg  [3]float64
}

func newLoads() []load {
	return []load{
		{name: "messages/received", of: func(s *stats) uint64 { return s.packetsReceived.Load() }},
		{name: "messages/sent", of: func(s *stats) uint64 { return s.packetsSent.Load() }},
		{name: "publish/received", of: func(s *stats) uint64 { return s.publishReceived.Load() }},
		{name: "publish/sent", of: func(s *stats) uint64 { return s.publishSent.Load() }},
		{name: "bytes/received", of: func(s *stats) uint64 { return s.bytesReceived.Load() }},
		{name: "bytes/sent", of: func(s *stats) uint64 { return s.bytesSent.Load() }},
		{name: "sockets", of: func(s *stats) uint64 { return s.socketsReceived.Load() }},
		{name: "connections", of: func(s *stats) uint64 { return s.connectsSeen.Load() }},
	}
}

// report publishes what has changed since the last report.
func (b *Broker) report() {
	x, s, now := &b.sys, &b.stats, time.Now()
	if x.last == nil {
		x.last, x.loads = map[string]string{}, newLoads()
	}
	var msgs []Message
	put := func(name, value string) {
		if x.last[name] == value {
			return
		}
		x.last[name] = value
		msgs = append(msgs, Message{Topic: topic.Topic("$SYS/broker/" + name), Payload: []byte(value), Retain: true})
	}
	number := func(name string, n int64) { put(name, strconv.FormatInt(n, 10)) }
	counter := func(name string, n uint64) { put(name, strconv.FormatUint(n, 10)) }

	connected, inflight, waiting, bytes := s.connected.Load(), 0, 0, int64(0)
	gone := 0
	for _, c := range b.sessions {
		if !c.left.IsZero() {
			gone++
		}
		c.mu.Lock()
		inflight += len(c.mu.byID)
		waiting += len(c.mu.waiting) + c.mu.paged + len(c.mu.byID)
		bytes += c.mu.totalBytes
		c.mu.Unlock()
	}
	put("version", "fairlead version "+b.opts.Version)
	put("uptime", strconv.FormatInt(int64(now.Sub(x.began).Seconds()), 10)+" seconds")
	number("clients/total", connected+int64(gone))
	number("clients/connected", connected)
	number("clients/active", connected)
	number("clients/disconnected", int64(gone))
	number("clients/inactive", int64(gone))
	number("clients/maximum", s.maximum.Load())
	counter("clients/expired", s.expired.Load())
	number("subscriptions/count", int64(b.subs.count))
	number("retained messages/count", int64(b.retained.len()))
	number("messages/inflight", int64(inflight))
	number("messages/stored", int64(waiting+b.retained.len()))
	number("store/messages/count", int64(waiting+b.retained.len()))
	number("store/messages/bytes", bytes)
	counter("messages/received", s.packetsReceived.Load())
	counter("messages/sent", s.packetsSent.Load())
	counter("publish/messages/received", s.publishReceived.Load())
	counter("publish/messages/sent", s.publishSent.Load())
	counter("publish/messages/dropped", b.metrics.droppedAll.Load())
	counter("publish/bytes/received", s.payloadReceived.Load())
	counter("publish/bytes/sent", s.payloadSent.Load())
	counter("bytes/received", s.bytesReceived.Load())
	counter("bytes/sent", s.bytesSent.Load())
	sample := []rm.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	rm.Read(sample)
	heap := sample[0].Value.Uint64()
	x.heap = max(x.heap, heap)
	counter("heap/current", heap)
	counter("heap/maximum", x.heap)
	if !x.at.IsZero() {
		minutes := now.Sub(x.at).Minutes()
		for i := range x.loads {
			l := &x.loads[i]
			n := l.of(s)
			rate := float64(n-l.was) / minutes
			l.was = n
			for k, over := range []float64{1, 5, 15} {
				keep := math.Exp(-minutes / over)
				l.avg[k] = rate + keep*(l.avg[k]-rate)
				put("load/"+l.name+"/"+strconv.Itoa(int(over))+"min", strconv.FormatFloat(l.avg[k], 'f', 2, 64))
			}
		}
	}
	x.at = now
	b.commit([]op{{fn: func(t *tx, r *result) { t.add(r, msgs) }}})
}
