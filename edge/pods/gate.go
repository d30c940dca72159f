package pods

import (
	"context"
	"slices"
	"sync"
)

// rank orders those who wait for the gate: pods that are nearly there go first, so
// that after a reboot the first of them run while others have not begun.
type rank int

const (
	toStart rank = iota // containers in a sandbox that is there
	toBegin             // a sandbox
	toClear             // what is left of the time before
	ranks
)

// gate lets a few at a time ask the runtime for what costs processor time: more at
// once would only make all of them late.
type gate struct {
	mu      sync.Mutex
	free    int
	waiting [ranks][]chan struct{}
}

func newGate(n int) *gate { return &gate{free: n} }

// enter waits for a place. Who got one calls leave.
func (g *gate) enter(ctx context.Context, r rank) error {
	g.mu.Lock()
	if g.free > 0 {
		g.free--
		g.mu.Unlock()
		return nil
	}
	c := make(chan struct{}, 1)
	g.waiting[r] = append(g.waiting[r], c)
	g.mu.Unlock()
	select {
	case <-c:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	i := slices.Index(g.waiting[r], c)
	if i >= 0 {
		g.waiting[r] = slices.Delete(g.waiting[r], i, i+1)
	}
	g.mu.Unlock()
	if i < 0 { // the place came at the same moment
		g.leave()
	}
	return ctx.Err()
}

// leave gives the place to whoever waits in front.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for r := range g.waiting {
		if len(g.waiting[r]) > 0 {
			c := g.waiting[r][0]
			g.waiting[r] = g.waiting[r][1:]
			c <- struct{}{}
			return
		}
	}
	g.free++
}
