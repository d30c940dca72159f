package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// publisher publishes with QoS 1 on one connection.
type publisher struct {
	c       *conn
	n       *counters
	window  int
	topics  []string // cycled over
	retain  bool
	payload func(n int64) []byte // of the nth publish; valid until the next
	limit   int64                // publishes; 0 is until counters.stop

	sent     int64
	inflight atomic.Int64
	at       [1 << 16]atomic.Int64 // when each packet id was, or was to be, sent; 0 for none
	free     []uint16
	latency  []uint32 // µs
	unsent   []uint32 // µs, of a paced load: the age of what the window held back at the end
}

// begun is what all times of the generator count from, so that one fits a word.
var begun = time.Now()

func since() int64 { return int64(time.Since(begun)) }

func (p *publisher) connect(ctx context.Context, addr string, o connect) error {
	var err error
	if p.c, err = dial(ctx, addr, o); err != nil {
		return err
	}
	p.window = min(p.window, p.c.receiveMax)
	return nil
}

// run publishes with as many in flight as the window allows, until
// counters.stop or the limit, and all is acknowledged.
func (p *publisher) run() error {
	for i := range p.window {
		p.free = append(p.free, uint16(p.window-i))
	}
	for {
		now := since()
		for len(p.free) > 0 && !p.n.stop.Load() && (p.limit == 0 || p.sent < p.limit) {
			id := p.free[len(p.free)-1]
			p.free = p.free[:len(p.free)-1]
			p.add(id, now)
		}
		if p.inflight.Load() == 0 {
			return nil
		}
		if err := p.c.flush(); err != nil {
			return err
		}
		if err := p.take(); err != nil {
			return err
		}
	}
}

// add queues the next publish.
func (p *publisher) add(id uint16, at int64) {
	p.at[id].Store(at)
	p.inflight.Add(1)
	t := p.topics[p.sent%int64(len(p.topics))]
	p.c.out = appendPublish(p.c.out, t, id, p.retain, p.payload(p.sent))
	p.sent++
}

// take reads once and takes the PUBACKs.
func (p *publisher) take() error {
	if err := p.c.fill(); err != nil {
		return err
	}
	now := since()
	measuring := p.n.measuring.Load()
	acked := int64(0)
	for {
		k, ok, err := p.c.next()
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if k.typ() != typePuback {
			if err := p.c.ended(k); err != nil {
				return err
			}
			continue
		}
		id, code, err := parsePuback(k)
		if err != nil {
			return err
		}
		if code >= 0x80 {
			return fmt.Errorf("publish refused with reason code 0x%02x", code)
		}
		at := p.at[id].Swap(0)
		if at == 0 {
			return fmt.Errorf("PUBACK of packet id %d, which is not in flight", id)
		}
		if measuring {
			p.latency = append(p.latency, micros(now-at))
		}
		if p.free != nil {
			p.free = append(p.free, id)
		}
		acked++
	}
	p.inflight.Add(-acked)
	p.n.acked.Add(acked)
	return nil
}

func micros(ns int64) uint32 { return uint32(min(ns/1000, 1<<32-1)) }

// acks takes the PUBACKs of a paced publisher until pace ends the wait for them.
func (p *publisher) acks() error {
	for {
		if err := p.take(); err != nil {
			return err
		}
	}
}

// overdue is the age of what was never acknowledged.
func (p *publisher) overdue() (us []uint32) {
	now := since()
	for i := range p.at {
		if at := p.at[i].Load(); at != 0 {
			us = append(us, micros(now-at))
		}
	}
	return us
}

// tick is how often a paced load publishes: at every tick each publisher means
// to send what is due since the last one.
const tick = time.Millisecond

// pace publishes at a fixed rate whether or not the broker keeps up; the time
// of a message is the tick at which it was due. It gives how late the ticks
// were, in µs, of the measured part.
func pace(ctx context.Context, pubs []*publisher, rate float64, n *counters) ([]uint32, error) {
	// Go's own timers wake a process that waits for sockets a millisecond late.
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "timerfd")
	defer func() { _ = f.Close() }()
	spec := unix.NsecToTimespec(int64(tick))
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: spec, Value: spec}, nil); err != nil {
		return nil, fmt.Errorf("timerfd: %w", err)
	}
	var late []uint32
	each := rate / float64(len(pubs)) * tick.Seconds() // per tick and publisher
	due := make([]float64, len(pubs))
	for i := range due {
		due[i] = float64(i) / float64(len(pubs)) // not all in the same tick
	}
	waiting := make([][]int64, len(pubs)) // due and not sent as the window is full: when
	ids := make([]uint16, len(pubs))
	var expired [8]byte
	next := since()
	for !n.stop.Load() && ctx.Err() == nil {
		if _, err := f.Read(expired[:]); err != nil {
			return late, fmt.Errorf("timerfd: %w", err)
		}
		for range binary.NativeEndian.Uint64(expired[:]) {
			next += int64(tick)
			for i := range pubs {
				for due[i] += each; due[i] >= 1; due[i]-- {
					waiting[i] = append(waiting[i], next)
				}
			}
		}
		if n.measuring.Load() {
			late = append(late, micros(max(0, since()-next)))
		}
		for i, p := range pubs {
			k := min(len(waiting[i]), p.window-int(p.inflight.Load()))
			for _, at := range waiting[i][:k] {
				ids[i]++
				if ids[i] == 0 {
					ids[i] = 1
				}
				p.add(ids[i], at)
			}
			waiting[i] = slices.Delete(waiting[i], 0, k)
			if err := p.c.flush(); err != nil {
				return late, err
			}
		}
	}
	for i, p := range pubs {
		for _, at := range waiting[i] {
			p.unsent = append(p.unsent, micros(since()-at))
		}
	}
	// The readers wait for PUBACKs: with the last one they have to be told.
	for end := time.Now().Add(drainTime); time.Now().Before(end); time.Sleep(tick) {
		if !slices.ContainsFunc(pubs, func(p *publisher) bool { return p.inflight.Load() > 0 }) {
			break
		}
	}
	for _, p := range pubs {
		_ = p.c.nc.SetReadDeadline(time.Now())
	}
	return late, nil
}
