package cloudbridge

import (
	"log/slog"
	"maps"
	"reflect"
	"sync"
	"time"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// linkState is what is known of a node's link.
type linkState uint8

const (
	// linkUnknown: the broker was not heard of yet, or the node may be on its
	// way back after the broker or this process was away.
	linkUnknown linkState = iota
	linkUp
	linkDown
)

// linkGrace is how long a node that was not seen on this connection to the
// broker may take to come back: the longest back-off of an edge's link.
const linkGrace = 30 * time.Second

// nodeMirror is what one node reported last.
type nodeMirror struct {
	link   payload.Link
	linked bool // a link was heard of
	seen   bool // the link was up on this connection to the broker
	node   *payload.Node
	key    sealTo
	// mayCreate allows one creation of the Node object: since the link came
	// up, or since reported/node changed.
	mayCreate bool
	devices   map[string]payload.DeviceStatus
	twins     map[string]map[string]payload.Reading // device → property
	targets   map[string]map[string]payload.Target
	pods      map[string]payload.ReportedPod
}

// mirror holds what the broker holds of reported/#, decoded.
type mirror struct {
	log   *slog.Logger
	now   clock
	grace time.Duration

	mu struct {
		sync.RWMutex
		nodes map[string]*nodeMirror
		// raw marks the topics that are there, so that those which are gone
		// after a reconnect can be dropped; true where the payload is no good.
		raw map[topic.Topic]bool
		// since is when the present connection's retained messages were
		// complete; zero while there is none.
		since time.Time
	}
}

func newMirror(log *slog.Logger, now clock, grace time.Duration) *mirror {
	m := &mirror{log: log, now: now, grace: grace}
	m.mu.nodes = map[string]*nodeMirror{}
	m.mu.raw = map[topic.Topic]bool{}
	return m
}

// news says what a report was about, and how soon Kubernetes must know.
type news struct {
	kind   topic.Kind
	node   string
	object string // namespace/name, where there is one
	urgent bool
	// linkChanged: the link went up or down, which concerns all of the node.
	linkChanged bool
	// rekeyed: the node has another key now.
	rekeyed   bool
	malformed bool
}

// put takes a report.
func (m *mirror) put(p topic.Parsed, b []byte) news {
	n := news{kind: p.Kind, node: p.Node}
	if p.Name != "" {
		n.object = p.Namespace + "/" + p.Name
	}
	tp := p.Topic()
	m.mu.Lock()
	defer m.mu.Unlock()
	nm := m.mu.nodes[p.Node]
	if nm == nil {
		nm = &nodeMirror{
			devices: map[string]payload.DeviceStatus{}, pods: map[string]payload.ReportedPod{},
			twins: map[string]map[string]payload.Reading{}, targets: map[string]map[string]payload.Target{},
		}
		m.mu.nodes[p.Node] = nm
	}
	wasBad := m.mu.raw[tp]
	if len(b) == 0 {
		delete(m.mu.raw, tp)
	} else {
		m.mu.raw[tp] = false
	}
	if err := nm.put(p, n.object, b, &n); err != nil {
		m.mu.raw[tp] = true
		n.malformed = true
		if !wasBad { // once, not with every repetition
			m.log.Warn("a node reported what cannot be read, the last good report stands", "node", p.Node, "topic", tp, "error", err)
		}
	}
	return n
}

func (nm *nodeMirror) put(p topic.Parsed, object string, b []byte, n *news) error {
	switch p.Kind {
	case topic.KindReportedLink:
		var l payload.Link
		if len(b) > 0 {
			if err := payload.Decode(b, &l); err != nil {
				return err
			}
		}
		n.urgent, n.linkChanged = true, l.Online != nm.link.Online || !nm.linked
		if l.Online && (!nm.link.Online || l.Since != nm.link.Since) {
			nm.mayCreate = true
		}
		nm.link, nm.linked = l, len(b) > 0
		nm.seen = nm.seen || l.Online
	case topic.KindReportedNode:
		if len(b) == 0 {
			nm.node = nil // its key stays: what is sealed to it is no worse
			return nil
		}
		var v payload.Node
		if err := payload.Decode(b, &v); err != nil {
			return err
		}
		n.urgent = true
		if nm.node == nil || !reflect.DeepEqual(*nm.node, v) {
			nm.mayCreate = true
		}
		nm.node = &v
		if v.SealKey == nm.key.public {
			return nil
		}
		id := ""
		if v.SealKey != "" {
			var err error
			if id, err = seal.ID(v.SealKey); err != nil {
				nm.key, n.rekeyed = sealTo{}, true
				return err // of the report all else is good
			}
		}
		nm.key, n.rekeyed = sealTo{v.SealKey, id}, true
	case topic.KindReportedDevice:
		return putInto(nm.devices, object, b, func(was, is payload.DeviceStatus) { n.urgent = was != is })
	case topic.KindReportedPod:
		n.urgent = true
		return putInto(nm.pods, object, b, func(_, _ payload.ReportedPod) {})
	case topic.KindReportedTwin:
		return putProperty(nm.twins, object, p.Property, b, func(was, is payload.Reading) {
			n.urgent = was.Q != is.Q || was.Ack != is.Ack || was.Err != is.Err
		})
	case topic.KindReportedTarget:
		return putProperty(nm.targets, object, p.Property, b, func(was, is payload.Target) {
			n.urgent = was.Rev != is.Rev || was.UID != is.UID || was.Wish != is.Wish
		})
	}
	return nil
}

// putInto decodes a payload into a map, or removes its key where it is empty.
func putInto[T any](into map[string]T, name string, b []byte, compare func(was, is T)) error {
	var is T
	was := into[name]
	if len(b) == 0 {
		delete(into, name)
		compare(was, is)
		return nil
	}
	if err := payload.Decode(b, &is); err != nil {
		return err
	}
	compare(was, is)
	into[name] = is
	return nil
}

func putProperty[T any](into map[string]map[string]T, object, prop string, b []byte, compare func(was, is T)) error {
	props := into[object]
	if props == nil {
		props = map[string]T{}
		into[object] = props
	}
	err := putInto(props, prop, b, compare)
	if len(props) == 0 {
		delete(into, object)
	}
	return err
}

// lost says that the connection to the broker ended: nothing more is known of
// links until the next one's retained messages are complete.
func (m *mirror) lost() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.since = time.Time{}
	for _, n := range m.mu.nodes {
		n.seen = false
	}
}

// complete says that the retained messages of a new connection are all there:
// what was not among them is gone.
func (m *mirror) complete(seen map[topic.Topic]struct{}) {
	m.mu.Lock()
	var gone []topic.Topic
	for tp := range m.mu.raw {
		if _, ok := seen[tp]; !ok {
			gone = append(gone, tp)
		}
	}
	m.mu.since = m.now()
	m.mu.Unlock()
	for _, tp := range gone {
		if p, err := topic.Parse(string(tp)); err == nil {
			m.put(p, nil)
		}
	}
}

// nodes lists the nodes that reported anything.
func (m *mirror) nodes() []string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	out := make([]string, 0, len(m.mu.nodes))
	for n := range m.mu.nodes {
		out = append(out, n)
	}
	return out
}

// ups counts the links that are up.
func (m *mirror) ups() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	up := 0
	for _, n := range m.mu.nodes {
		if n.link.Online {
			up++
		}
	}
	return up
}

// nodeView is a copy of what is known of a node itself.
type nodeView struct {
	state     linkState
	ever      bool // the node was heard of
	since     time.Time
	node      *payload.Node // not changed after it was stored
	mayCreate bool
}

func (m *mirror) linkLocked(n *nodeMirror) linkState {
	switch {
	case m.mu.since.IsZero():
		return linkUnknown
	case n != nil && n.link.Online:
		return linkUp
	case n != nil && n.seen:
		return linkDown
	case m.now().Before(m.mu.since.Add(m.grace)):
		return linkUnknown
	default:
		return linkDown
	}
}

func (m *mirror) node(name string) nodeView {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.mu.nodes[name]
	v := nodeView{state: m.linkLocked(n)}
	if n != nil {
		v.ever, v.node, v.mayCreate = n.linked, n.node, n.mayCreate
		v.since = time.UnixMilli(n.link.Since)
	}
	return v
}

// static gives a node's report on a pod of its own.
func (m *mirror) static(node, name string) (payload.ReportedPod, bool) {
	r, ok := m.pod(node, name)
	return r, ok && r.Static != nil
}

// staticPods lists a node's own pods.
func (m *mirror) staticPods(node string) []string {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.mu.nodes[node]
	if n == nil {
		return nil
	}
	var out []string
	for name, r := range n.pods {
		if r.Static != nil {
			out = append(out, name)
		}
	}
	return out
}

// sealKey is the key that the node reported.
func (m *mirror) sealKey(name string) sealTo {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if n := m.mu.nodes[name]; n != nil {
		return n.key
	}
	return sealTo{}
}

// linkUp tells whether the node's link is up.
func (m *mirror) linkUp(name string) bool { return m.node(name).state == linkUp }

// created takes back the permission to create the Node object.
func (m *mirror) created(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := m.mu.nodes[name]; n != nil {
		n.mayCreate = false
	}
}

// deviceView is a copy of what is known of a device.
type deviceView struct {
	node     nodeView
	report   *payload.DeviceStatus
	readings map[string]payload.Reading
	targets  map[string]payload.Target
}

func (m *mirror) device(node, name string) deviceView {
	v := deviceView{node: m.node(node)}
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.mu.nodes[node]
	if n == nil {
		return v
	}
	if r, ok := n.devices[name]; ok {
		v.report = &r
	}
	v.readings = maps.Clone(n.twins[name])
	v.targets = maps.Clone(n.targets[name])
	return v
}

// targetRev is the rev of what the node drives the property to, or 0.
func (m *mirror) targetRev(node, device, prop string) int64 {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.mu.nodes[node]
	if n == nil {
		return 0
	}
	return n.targets[device][prop].Rev
}

func (m *mirror) pod(node, name string) (payload.ReportedPod, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := m.mu.nodes[node]
	if n == nil {
		return payload.ReportedPod{}, false
	}
	r, ok := n.pods[name]
	return r, ok
}
