package repair

import (
	"container/heap"
	"time"
)

// slot is a node's place in an agenda.
type slot struct {
	at  time.Time // when it is due
	pos int       // its index + 1; 0 is not in it
}

func (s *slot) place() *slot { return s }

// agenda holds nodes by when they are due: a wake costs those that are, not all
// that there are.
type agenda[N interface{ place() *slot }] struct{ h nodeHeap[N] }

// set plans the node, or takes it out for the zero time.
func (a *agenda[N]) set(n N, at time.Time) {
	s := n.place()
	s.at = at
	switch {
	case s.pos > 0 && at.IsZero():
		heap.Remove(&a.h, s.pos-1)
	case s.pos > 0:
		heap.Fix(&a.h, s.pos-1)
	case !at.IsZero():
		heap.Push(&a.h, n)
	}
}

// due gives the node that is due first, if it is due by now; otherwise how long
// that takes, an hour at most.
func (a *agenda[N]) due(now time.Time) (n N, wait time.Duration, ok bool) {
	if len(a.h) == 0 {
		return n, time.Hour, false
	}
	if wait = a.h[0].place().at.Sub(now); wait > 0 {
		return n, min(wait, time.Hour), false
	}
	return a.h[0], 0, true
}

// nodeHeap implements heap.Interface.
type nodeHeap[N interface{ place() *slot }] []N

func (h nodeHeap[N]) Len() int           { return len(h) }
func (h nodeHeap[N]) Less(i, j int) bool { return h[i].place().at.Before(h[j].place().at) }
func (h nodeHeap[N]) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].place().pos, h[j].place().pos = i+1, j+1
}

func (h *nodeHeap[N]) Push(x any) {
	n := x.(N) //nolint:forcetypeassert // from set
	*h = append(*h, n)
	n.place().pos = len(*h)
}

func (h *nodeHeap[N]) Pop() any {
	old := *h
	n := old[len(old)-1]
	var zero N
	old[len(old)-1] = zero
	*h = old[:len(old)-1]
	n.place().pos = 0
	return n
}
