package netem

import (
	"container/heap"
	"os"
	"time"
)

// maxQueue bounds the packets under way in one direction; those beyond are
// dropped and counted.
const maxQueue = 8192

// path carries one direction. Its fields are guarded by the line's mutex, but
// for the files.
type path struct {
	l        *Line
	from, to *os.File
	wake     chan struct{}

	queue queue
	n     uint64    // packets queued so far
	last  time.Time // when the newest that keeps the order is due
	stats PathStats
}

func newPath(l *Line, from, to *os.File) *path {
	return &path{l: l, from: from, to: to, wake: make(chan struct{}, 1)}
}

func (p *path) conditionsLocked() *Path {
	if p == p.l.up {
		return &p.l.mu.conditions.Up
	}
	return &p.l.mu.conditions.Down
}

// read takes packets until the device is closed.
func (p *path) read() {
	b := make([]byte, 1<<16)
	for {
		n, err := p.from.Read(b)
		if err != nil {
			return
		}
		if n < 20 || b[0]>>4 != 4 {
			continue // the kernel looks for IPv6 routers
		}
		up, down := p.take(b[:n])
		p.l.up.write(up)
		p.l.down.write(down)
	}
}

// write hands packets over at once; a nil one is none.
func (p *path) write(packets ...[]byte) {
	for _, b := range packets {
		if b != nil {
			_, _ = p.to.Write(b) // lost, as a packet may be
		}
	}
}

// take puts a packet on its way. Where its connection is over it gives what is
// to be told to whom.
func (p *path) take(b []byte) (up, down []byte) {
	l := p.l
	l.mu.Lock()
	defer l.mu.Unlock()
	c := p.conditionsLocked()
	if c.Cut {
		p.stats.Cut++
		return nil, nil
	}
	s, tcp := parseSegment(b, p == l.up)
	var f *flow
	if tcp {
		f = l.flowLocked(&s)
		if f.dead {
			p.stats.Cut++
			if s.up {
				return nil, s.reset()
			}
			return s.reset(), nil
		}
		f.seen(&s)
		f.bytes += int64(len(b))
		if most := l.mu.conditions.FlowBytes; most > 0 && f.bytes > most {
			p.stats.Cut++
			return l.endLocked(f)
		}
	}
	if l.mu.rng.Float64() < c.Loss {
		p.stats.Lost++
		return nil, nil
	}
	p.queueLocked(c, b, f)
	if l.mu.rng.Float64() < c.Duplicate {
		p.stats.Duplicated++
		p.queueLocked(c, b, f)
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
	return nil, nil
}

func (p *path) queueLocked(c *Path, b []byte, f *flow) {
	if len(p.queue) >= maxQueue {
		p.stats.Overflowed++
		return
	}
	rng := p.l.mu.rng
	due := time.Now()
	if rng.Float64() < c.Reorder {
		p.stats.Overtaking++
	} else {
		due = due.Add(c.Delay)
		if c.Jitter > 0 {
			due = due.Add(time.Duration(rng.Int64N(2*int64(c.Jitter)+1)) - c.Jitter)
		}
		if due.Before(p.last) {
			due = p.last
		}
		p.last = due
	}
	p.n++
	heap.Push(&p.queue, packet{due: due, n: p.n, b: append([]byte(nil), b...), flow: f})
}

// deliver hands packets over when they are due, until the line is closed.
func (p *path) deliver() {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-p.l.done:
			return
		case <-p.wake:
		case <-timer.C:
		}
		for {
			b, wait := p.due()
			if b == nil {
				timer.Reset(wait)
				break
			}
			p.write(b)
		}
	}
}

// due gives the next packet that is to be handed over now, or how long there is
// none.
func (p *path) due() ([]byte, time.Duration) {
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	for len(p.queue) > 0 {
		if wait := time.Until(p.queue[0].due); wait > 0 {
			return nil, wait
		}
		x := heap.Pop(&p.queue).(packet)
		if x.flow != nil && x.flow.dead {
			p.stats.Cut++
			continue
		}
		p.stats.Packets++
		p.stats.Bytes += int64(len(x.b))
		return x.b, 0
	}
	return nil, time.Hour
}

type packet struct {
	due  time.Time
	n    uint64 // orders what is due at once
	b    []byte
	flow *flow // nil where it is not TCP
}

// queue is a heap by time.
type queue []packet

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	if !q[i].due.Equal(q[j].due) {
		return q[i].due.Before(q[j].due)
	}
	return q[i].n < q[j].n
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(packet)) }
func (q *queue) Pop() any {
	old := *q
	x := old[len(old)-1]
	old[len(old)-1] = packet{}
	*q = old[:len(old)-1]
	return x
}
