package cloudbridge

import (
	"sync"
	"time"
)

// pace spaces the status writes of each device (law 8 of the design): at most
// one per least, and where nothing is urgent one per usual.
type pace struct {
	least, usual time.Duration

	mu struct {
		sync.Mutex
		wrote map[string]time.Time
		due   map[string]time.Time
	}
}

func newPace(least, usual time.Duration) *pace {
	p := &pace{least: least, usual: max(least, usual)}
	p.mu.wrote = map[string]time.Time{}
	p.mu.due = map[string]time.Time{}
	return p
}

// plan tells how long a change has to wait for its write; false where one is
// planned that is no later.
func (p *pace) plan(name string, urgent bool, now time.Time) (time.Duration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	gap := p.usual
	if urgent {
		gap = p.least
	}
	at := now
	if last, ok := p.mu.wrote[name]; ok && last.Add(gap).After(now) {
		at = last.Add(gap)
	}
	if due, ok := p.mu.due[name]; ok && !due.After(at) {
		return 0, false
	}
	p.mu.due[name] = at
	return at.Sub(now), true
}

// begin takes up a planned write. It gives how long to wait where the last one
// is too fresh.
func (p *pace) begin(name string, now time.Time) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if last, ok := p.mu.wrote[name]; ok {
		if wait := last.Add(p.least).Sub(now); wait > 0 {
			p.mu.due[name] = now.Add(wait)
			return wait
		}
	}
	delete(p.mu.due, name)
	return 0
}

// done records a write.
func (p *pace) done(name string, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mu.wrote[name] = now
}

// forget drops a device that is gone.
func (p *pace) forget(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.mu.wrote, name)
	delete(p.mu.due, name)
}
