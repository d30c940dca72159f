package cloudbridge

import (
	"log/slog"
	"sync"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

// clones finds agents that have one node's name, as after a disk was copied. An
// agent makes its epoch at its start, so one that comes back after another had
// taken its place was not restarted: it was there all the time.
type clones struct {
	mu struct {
		sync.Mutex
		nodes map[string]*agents
	}
}

// agents are the last two that had a node's link.
type agents struct {
	now, before payload.Link
}

// online notes that an agent says that it has the node's link. It tells whether
// there are two, and gives the one whose place it took.
func (c *clones) online(node string, l payload.Link) (other payload.Link, two bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := c.mu.nodes[node]
	if a == nil {
		a = &agents{}
		if c.mu.nodes == nil {
			c.mu.nodes = map[string]*agents{}
		}
		c.mu.nodes[node] = a
	}
	if l.Epoch == "" || l.Epoch == a.now.Epoch {
		return other, false
	}
	two = l.Epoch == a.before.Epoch
	a.before, a.now = a.now, l
	return a.before, two
}

// linked takes a node's word that it is there.
func (b *Bridge) linked(node string, p []byte) {
	var l payload.Link
	if len(p) == 0 || payload.Decode(p, &l) != nil || !l.Online {
		return
	}
	b.inbox.Restart(node) // what was asked on the connection before may be lost
	if other, two := b.clones.online(node, l); two {
		b.metrics.clones.Inc()
		b.log.Error("two agents take a node's link from each other: switch one of them off, or give it another name",
			"node", node, slog.Group("one", "host", l.Host, "epoch", l.Epoch), slog.Group("other", "host", other.Host, "epoch", other.Epoch))
	}
}
