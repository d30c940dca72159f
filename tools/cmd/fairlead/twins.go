package main

import (
	"encoding/json"
	"slices"
	"strings"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// key names a device in the fabric.
type key struct{ node, ns, name string }

// label is what one types for the device: the namespace only where it is not
// the one that is taken for granted.
func (a *app) label(ns, name string) string {
	if ns == a.namespace {
		return name
	}
	return ns + "/" + name
}

// twin is a device as a broker knows it.
type twin struct {
	key
	wanted     *device.Device        // desired/device
	status     *payload.DeviceStatus // reported/device
	link       *payload.Link         // of its node
	properties []*property
}

// property is one property of a twin.
type property struct {
	name    string
	model   *device.Property
	wish    *payload.Wish
	target  *payload.Target
	reading *payload.Reading
}

func (t *twin) property(name string) *property {
	for _, p := range t.properties {
		if p.name == name {
			return p
		}
	}
	p := &property{name: name}
	t.properties = append(t.properties, p)
	return p
}

// twins puts the retained topics together. What cannot be read is left out, as
// every reader must.
func (st state) twins() []*twin {
	devices := map[key]*twin{}
	links := map[string]*payload.Link{}
	at := func(p topic.Parsed) *twin {
		k := key{p.Node, p.Namespace, p.Name}
		if devices[k] == nil {
			devices[k] = &twin{key: k}
		}
		return devices[k]
	}
	for t, r := range st {
		p, err := topic.Parse(string(t))
		if err != nil {
			continue
		}
		switch p.Kind {
		case topic.KindReportedLink:
			links[p.Node] = decode[payload.Link](r.payload)
		case topic.KindDesiredDevice:
			at(p).wanted = decode[device.Device](r.payload)
		case topic.KindReportedDevice:
			at(p).status = decode[payload.DeviceStatus](r.payload)
		case topic.KindDesiredTwin:
			at(p).property(p.Property).wish = decode[payload.Wish](r.payload)
		case topic.KindReportedTarget:
			at(p).property(p.Property).target = decode[payload.Target](r.payload)
		case topic.KindReportedTwin:
			at(p).property(p.Property).reading = decode[payload.Reading](r.payload)
		}
	}
	out := make([]*twin, 0, len(devices))
	for _, t := range devices {
		t.link = links[t.node]
		order := map[string]int{}
		if t.wanted != nil {
			for i := range t.wanted.Properties {
				m := &t.wanted.Properties[i]
				t.property(m.Name).model = m
				order[m.Name] = i - len(t.wanted.Properties) // before those that no model has
			}
		}
		slices.SortFunc(t.properties, func(x, y *property) int {
			if d := order[x.name] - order[y.name]; d != 0 {
				return d
			}
			return strings.Compare(x.name, y.name)
		})
		out = append(out, t)
	}
	slices.SortFunc(out, func(x, y *twin) int {
		return strings.Compare(x.ns+"/"+x.name+"/"+x.node, y.ns+"/"+y.name+"/"+y.node)
	})
	return out
}

func decode[T any](b []byte) *T {
	var v T
	if payload.Decode(b, &v) != nil {
		return nil
	}
	return &v
}

// ownBus tells whether this looks like a node's own bus, where there are no
// digests: they are for the link. The state must have been asked for [digests].
func (st state) ownBus() bool {
	for t := range st {
		if p, err := topic.Parse(string(t)); err == nil && (p.Kind == topic.KindReportedDigest || p.Kind == topic.KindDesiredDigest) {
			return false
		}
	}
	return true
}

// digests selects both digests of a node, or of every node.
func digests(node string) []topic.Filter {
	return []topic.Filter{topic.OfKind(anyNode(node), topic.KindDesiredDigest), topic.OfKind(anyNode(node), topic.KindReportedDigest)}
}

// last is when anything was reported of the device.
func (t *twin) last() time.Time {
	var ms int64
	for _, p := range t.properties {
		if p.reading != nil {
			ms = max(ms, p.reading.T)
		}
	}
	if t.status != nil {
		ms = max(ms, t.status.Since)
	}
	return millis(ms)
}

// good counts the properties with a good value, of those that are read.
func (t *twin) good() (good, total int) {
	for _, p := range t.properties {
		if p.model != nil && !p.model.Access.Readable() {
			continue
		}
		total++
		if p.reading != nil && p.reading.Good() && len(p.reading.V) > 0 && string(p.reading.V) != "null" {
			good++
		}
	}
	return good, total
}

// state is the mapper's word, or why there is none that holds.
func (t *twin) state() (word, message string) {
	switch {
	case t.link != nil && !t.link.Online && t.status != nil:
		return string(device.StateNodeOffline), "the link to the node is down, values are the last ones"
	case t.status == nil:
		return string(device.StateUnknown), "no mapper has reported the device"
	default:
		return t.status.State, t.status.Error
	}
}

// row is a property as the listings show it.
type row struct {
	Node      string          `json:"node"`
	Namespace string          `json:"namespace"`
	Device    string          `json:"device"`
	Property  string          `json:"property"`
	Type      device.Type     `json:"type,omitempty"`
	Unit      string          `json:"unit,omitempty"`
	Access    device.Access   `json:"access,omitempty"`
	Value     json.RawMessage `json:"value,omitempty"`
	LastValue json.RawMessage `json:"lastValue,omitempty"`
	Quality   string          `json:"quality,omitempty"` // good, or one of the bad ones; empty before the first reading
	Time      time.Time       `json:"time,omitzero"`
	Wish      *wishRow        `json:"wish,omitempty"`
	Target    *targetRow      `json:"target,omitempty"`
	// Acked tells that the mapper has finished with the target, Error why it
	// could not apply it.
	Acked bool   `json:"acked"`
	Error string `json:"error,omitempty"`
	// untold: the source does not say whether the target was acked.
	untold bool
}

type wishRow struct {
	Value json.RawMessage `json:"value"`
	Rev   int64           `json:"rev"`
}

type targetRow struct {
	Value   json.RawMessage `json:"value"`
	Rev     int64           `json:"rev"`
	By      string          `json:"by"`
	Who     string          `json:"who,omitempty"`
	Time    time.Time       `json:"time,omitzero"`
	Expires time.Time       `json:"expires,omitzero"`
}

const good = "good"

func (t *twin) row(p *property) row {
	r := row{Node: t.node, Namespace: t.ns, Device: t.name, Property: p.name}
	if m := p.model; m != nil {
		r.Type, r.Unit, r.Access = m.Type, m.Unit, m.Access
		if r.Access == "" {
			r.Access = device.ReadOnly
		}
	}
	if v := p.reading; v != nil {
		r.Time, r.Quality, r.LastValue = millis(v.T), or(v.Q, good), v.LV
		if string(v.V) != "null" {
			r.Value = v.V
		}
	}
	if w := p.wish; w != nil {
		r.Wish = &wishRow{Value: w.V, Rev: w.Rev}
	}
	if g := p.target; g != nil {
		r.Target = &targetRow{Value: g.V, Rev: g.Rev, By: g.By, Who: g.Who, Time: millis(g.T), Expires: millis(g.Exp)}
		if v := p.reading; v != nil && v.Ack >= g.Rev {
			r.Acked, r.Error = true, v.Err
		}
	}
	return r
}

// value is the value with a last good one in parentheses.
func (r *row) value() string {
	if len(r.Value) == 0 && len(r.LastValue) > 0 {
		return "(" + shown(r.LastValue) + ")"
	}
	return shown(r.Value)
}

// ack is what became of the target.
func (r *row) ack() string {
	switch {
	case r.Target == nil, r.untold:
		return "-"
	case r.Error != "":
		return "refused: " + r.Error
	case r.Acked:
		return "yes"
	default:
		return "pending"
	}
}

// by is who set the target: cloud, or local/<client>.
func (t *targetRow) by() string {
	if t.Who == "" {
		return t.By
	}
	return t.By + "/" + strings.TrimPrefix(t.Who, t.By+"/")
}

// device is the resolved device that a topic is about.
func (st state) device(p topic.Parsed) *device.Device {
	r, ok := st[topic.DesiredDevice(p.Node, p.Namespace, p.Name)]
	if !ok {
		return nil
	}
	return decode[device.Device](r.payload)
}
