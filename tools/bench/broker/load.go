package main

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
)

// load is a load of QoS 1 publishes, and a subscriber to all of them.
type load struct {
	Addr       string
	Publishers int
	// Window is how many publishes of each wait for their PUBACK, or at most
	// wait where the load is paced; the broker's Receive Maximum bounds it too.
	Window  int
	Warmup  time.Duration
	Measure time.Duration
	Payload int // B
	// Retained is over how many topics retained publishes cycle; 0 is none retained.
	Retained int
	// Subscriber is "persistent", "clean" or "none".
	Subscriber string
	// Rate paces all publishers together, per second; 0 is as fast as the window allows.
	Rate float64
	// Broker is the broker's process, whose CPU time is read; 0 is none.
	Broker int
}

// result is what the measured part of a load gave.
type result struct {
	Acked     float64 `json:"acked_per_s"`
	Delivered float64 `json:"delivered_per_s"`
	// Latency is from publish to PUBACK, ms: from the intended time where the
	// load was paced.
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`
	// Late is the 99th percentile of how late a paced generator was, ms.
	Late float64 `json:"late_p99_ms,omitempty"`
	// Generator and Broker are CPU time per time: 1 is a whole core.
	Generator float64 `json:"generator_cores"`
	Broker    float64 `json:"broker_cores"`
	// Others is what the rest of the machine took, the kernel's own work on
	// packets included: a figure of a machine that is busy otherwise says little.
	Others float64 `json:"others_cores"`
	// Lost are acknowledged messages that had not come to the subscriber when
	// nothing came any more.
	Lost int64 `json:"lost"`
	// Again are deliveries behind a later one of the same publisher: duplicates,
	// or out of order.
	Again int64 `json:"again"`
	// Cut is how often the broker ended the subscriber's connection, for what.
	Cut    int    `json:"cut"`
	CutFor string `json:"cut_for,omitempty"`
}

func (r result) String() string {
	s := fmt.Sprintf("acked/s %.0f  delivered/s %.0f  ack p50 %.2f ms  p99 %.2f ms  max %.1f ms  CPU generator %.2f", r.Acked, r.Delivered, r.P50, r.P99, r.Max, r.Generator)
	if r.Broker > 0 {
		s += fmt.Sprintf(" broker %.2f others %.2f", r.Broker, r.Others)
	}
	if r.Late > 0 {
		s += fmt.Sprintf("  paced late p99 %.2f ms", r.Late)
	}
	return s + r.faults()
}

// faults says what went wrong with the deliveries.
func (r result) faults() (s string) {
	if r.Cut > 0 {
		s += fmt.Sprintf("  SUBSCRIBER CUT %d times (%s)", r.Cut, r.CutFor)
	}
	if r.Lost > 0 {
		s += fmt.Sprintf("  %d ACKED AND NOT DELIVERED", r.Lost)
	}
	if r.Again > 0 {
		s += fmt.Sprintf("  %d duplicate or out of order", r.Again)
	}
	return s
}

// counters are shared by all connections of a load.
type counters struct {
	acked, delivered, again atomic.Int64
	measuring, stop         atomic.Bool
}

const topicRoot = "bench/"

// Every payload begins with its publisher's number and its own, so that the
// subscriber sees what is missing, twice or out of order.
const numbered = 2 + 8

func payloadOf(publisher, size int) func(int64) []byte {
	b := make([]byte, size)
	for i := range b {
		b[i] = 'a' + byte(i%26)
	}
	binary.BigEndian.PutUint16(b, uint16(publisher))
	return func(n int64) []byte {
		binary.BigEndian.PutUint64(b[2:], uint64(n))
		return b
	}
}

func retainedTopics(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%sr/%06d", topicRoot, i)
	}
	return out
}

// run runs the load to its end.
func (l load) run(ctx context.Context) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, l.Warmup+l.Measure+time.Minute)
	defer cancel()
	var n counters
	var r result
	if l.Payload < numbered {
		return r, fmt.Errorf("payload of %d B: want %d at least", l.Payload, numbered)
	}
	var sub *subscriber
	var subDone chan error
	if l.Subscriber != "none" {
		sub = &subscriber{addr: l.Addr, filter: topicRoot + "#", qos: 1, publishers: l.Publishers, subscribed: make(chan struct{}), n: &n, persistent: l.Subscriber == "persistent"}
		if err := sub.connect(ctx); err != nil {
			return r, err
		}
		subDone = make(chan error, 1)
		go func() { subDone <- sub.run(ctx) }()
		select {
		case <-sub.subscribed:
		case err := <-subDone:
			return r, cmp.Or(err, ctx.Err())
		}
	}
	topics := retainedTopics(l.Retained)
	pubs := make([]*publisher, l.Publishers)
	for i := range pubs {
		p := &publisher{n: &n, window: l.Window, retain: l.Retained > 0, payload: payloadOf(i, l.Payload)}
		if l.Retained > 0 {
			// Each has its part of the topics, so that all are cycled over.
			p.topics = topics[i*len(topics)/l.Publishers : (i+1)*len(topics)/l.Publishers]
		} else {
			p.topics = []string{fmt.Sprintf("%sq/%02d", topicRoot, i)}
		}
		if err := p.connect(ctx, l.Addr, connect{id: clientID("pub")}); err != nil {
			return r, err
		}
		pubs[i] = p
	}
	done := make(chan error, len(pubs)+1)
	running := len(pubs)
	var late []uint32
	if l.Rate > 0 {
		running++
		go func() {
			var err error
			late, err = pace(ctx, pubs, l.Rate, &n)
			done <- err
		}()
	}
	for _, p := range pubs {
		go func() {
			if l.Rate > 0 {
				done <- p.acks()
			} else {
				done <- p.run()
			}
		}()
	}
	fail := func(err error) (result, error) {
		cancel()
		return r, err
	}
	wait := func(d time.Duration) error {
		select {
		case <-time.After(d):
			return nil
		case err := <-done:
			return cmp.Or(err, errors.New("a publisher ended early"))
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := wait(l.Warmup); err != nil {
		return fail(err)
	}
	if err := l.window(&n, &r, wait); err != nil {
		return fail(err)
	}
	n.stop.Store(true)
	// What is on its way gets ten seconds, then it counts with its age.
	for _, p := range pubs {
		_ = p.c.nc.SetReadDeadline(time.Now().Add(drainTime))
	}
	var errs error
	for range running {
		if err := <-done; !errors.Is(err, os.ErrDeadlineExceeded) {
			errs = errors.Join(errs, err)
		}
	}
	if errs != nil {
		return fail(errs)
	}
	if sub != nil {
		r.Lost = sub.drain(ctx, n.acked.Load())
		r.Again = n.again.Load()
		sub.close()
		if err := <-subDone; err != nil {
			return fail(err)
		}
		r.Cut, r.CutFor = sub.cut, sub.cutFor
	}
	var lat []uint32
	for _, p := range pubs {
		lat = slices.Concat(lat, p.latency, p.overdue(), p.unsent)
		p.c.disconnect()
	}
	r.P50, r.P99, r.Max = quantile(lat, 0.5), quantile(lat, 0.99), quantile(lat, 1)
	r.Late = quantile(late, 0.99)
	return r, ctx.Err()
}

// drainTime bounds the wait for what is on its way at the end.
const drainTime = 10 * time.Second

// window is the measured part.
func (l load) window(n *counters, r *result, wait func(time.Duration) error) error {
	cpu := func() (c struct{ own, broker, all float64 }, err error) {
		if c.own, err = machine.CPUOf(os.Getpid()); err != nil {
			return c, err
		}
		if l.Broker > 0 {
			if c.broker, err = machine.CPUOf(l.Broker); err != nil {
				return c, err
			}
		}
		c.all, err = machine.CPU()
		return c, err
	}
	c0, err := cpu()
	if err != nil {
		return err
	}
	a0, d0, began := n.acked.Load(), n.delivered.Load(), time.Now()
	n.measuring.Store(true)
	if err := wait(l.Measure); err != nil {
		return err
	}
	n.measuring.Store(false)
	a1, d1, took := n.acked.Load(), n.delivered.Load(), time.Since(began)
	c1, err := cpu()
	if err != nil {
		return err
	}
	s := took.Seconds()
	r.Acked, r.Delivered = float64(a1-a0)/s, float64(d1-d0)/s
	r.Generator, r.Broker = (c1.own-c0.own)/s, (c1.broker-c0.broker)/s
	if l.Broker > 0 {
		r.Others = (c1.all-c0.all)/s - r.Generator - r.Broker
	}
	return nil
}

func clientID(kind string) string { return fmt.Sprintf("bench-%s-%08x", kind, rand.Uint32()) }

// quantile of samples in µs, in ms.
func quantile(us []uint32, q float64) float64 {
	if len(us) == 0 {
		return 0
	}
	slices.Sort(us)
	return float64(us[min(int(q*float64(len(us))), len(us)-1)]) / 1000
}
