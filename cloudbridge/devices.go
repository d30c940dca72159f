package cloudbridge

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

var errModelMissing = errors.New("the device's model does not exist")

// resolve joins a device and its model, or says why the device cannot work.
// m is nil where there is no such model.
func resolve(d *deviceObject, m *modelObject) (*device.Device, error) {
	switch {
	case d.broken != nil:
		return nil, d.broken
	case m == nil:
		return nil, fmt.Errorf("there is no DeviceModel %s in namespace %s: %w", d.Spec.Model, d.Namespace, errModelMissing)
	case m.broken != nil:
		return nil, fmt.Errorf("model %s: %w", m.Name, m.broken)
	}
	if err := topic.CheckName("nodeName", d.Spec.NodeName); err != nil {
		return nil, err
	}
	if m.Spec.Protocol == "modbus" && d.Spec.Modbus == nil {
		return nil, fmt.Errorf("model %s speaks modbus: the device needs spec.modbus with the slave's address", m.Name)
	}
	seen := map[string]bool{}
	for i := range m.Spec.Properties {
		p := &m.Spec.Properties[i]
		switch {
		case topic.CheckProperty(p.Name) != nil:
			return nil, fmt.Errorf("model %s: %w", m.Name, topic.CheckProperty(p.Name))
		case seen[p.Name]:
			return nil, fmt.Errorf("model %s has property %s twice", m.Name, p.Name)
		case !p.Type.Valid():
			return nil, fmt.Errorf("model %s: property %s has no type %q", m.Name, p.Name, p.Type)
		case m.Spec.Protocol == "modbus" && p.Modbus == nil:
			return nil, fmt.Errorf("model %s: property %s does not say where it lies on a modbus device", m.Name, p.Name)
		}
		seen[p.Name] = true
	}
	return &device.Device{
		UID: string(d.UID), Rev: max(rev(d.ResourceVersion), rev(m.ResourceVersion)),
		Namespace: d.Namespace, Name: d.Name, Model: m.Name, Protocol: m.Spec.Protocol,
		Modbus: d.Spec.Modbus, Properties: m.Spec.Properties,
	}, nil
}

// model finds the device's model, or nil.
func (in *informers) model(d *deviceObject) *modelObject {
	m, ok := get[modelObject](in.models, d.Namespace+"/"+d.Spec.Model)
	if !ok {
		return nil
	}
	return m
}

// device brings the topics of a device up to date: itself with its model, and
// one wish for every value wanted. They do not wait for a Node object, which
// somebody may delete while the machine works on. It tells whether there is
// news for the device's status.
func (d *desired) device(name string) bool {
	owner := key{kindDevice, name}
	obj, ok := get[deviceObject](d.in.devices, name)
	if !ok {
		return d.set(owner, nil)
	}
	dev, err := resolve(obj, d.in.model(obj))
	if err != nil {
		// The status says why. The device is forgotten rather than empty, so
		// that its wishes keep their revs when its model comes back.
		d.set(owner, nil)
		return true
	}
	node := obj.Spec.NodeName
	tp := topic.DesiredDevice(node, dev.Namespace, dev.Name)
	prev, _ := d.truth.before(tp)
	want := map[topic.Topic][]byte{
		tp: steady(prev, dev.UID, dev.Rev, func(r int64) []byte {
			dev.Rev = r
			return payload.Encode(dev)
		}),
	}
	for prop, v := range obj.Spec.Desired {
		if topic.CheckProperty(prop) != nil || isNull(v) {
			continue
		}
		want[topic.DesiredTwin(node, dev.Namespace, dev.Name, prop)] = payload.Encode(d.wish(owner, obj, prop, v))
	}
	return d.set(owner, want)
}

func isNull(v json.RawMessage) bool {
	v = bytes.TrimSpace(v)
	return len(v) == 0 || bytes.Equal(v, []byte("null"))
}

// wish gives a wanted value its rev. The value that is wanted already keeps the
// rev it has, across restarts too: it is read back from the broker or, where
// the broker lost it, from the device's status.
func (d *desired) wish(owner key, obj *deviceObject, prop string, v json.RawMessage) payload.Wish {
	w := payload.Wish{V: v, UID: string(obj.UID)}
	prev, known := d.before(owner, obj, prop)
	if known && prev.UID == w.UID && sameJSON(prev.V, v) {
		w.Rev, w.V = prev.Rev, prev.V
		return w
	}
	status := desiredStatus(&obj.Status, prop)
	// Only of a device that has no topics yet: afterwards a value that is gone
	// from them was taken back, and wanting it again is a new wish.
	if _, looked := d.truth.of(owner); !looked && status.Rev > prev.Rev && sameJSON(status.Value, v) {
		w.Rev = status.Rev
		return w
	}
	floor := max(prev.Rev, status.Rev, d.targetRev(obj.Spec.NodeName, obj.Namespace+"/"+obj.Name, prop))
	w.Rev = payload.NextRev(floor, d.now())
	return w
}

// before finds the property's last wish: under its topic, or under the one it
// had on another node.
func (d *desired) before(owner key, obj *deviceObject, prop string) (w payload.Wish, ok bool) {
	tp := topic.DesiredTwin(obj.Spec.NodeName, obj.Namespace, obj.Name, prop)
	if b, ok := d.truth.before(tp); ok && payload.Decode(b, &w) == nil {
		return w, true
	}
	others, _ := d.truth.of(owner)
	for _, t := range others {
		p, err := topic.Parse(string(t))
		if err != nil || p.Kind != topic.KindDesiredTwin || p.Property != prop {
			continue
		}
		if b, ok := d.truth.get(t); ok && payload.Decode(b, &w) == nil {
			return w, true
		}
	}
	return payload.Wish{}, false
}

func desiredStatus(s *device.Status, prop string) device.DesiredStatus {
	for i := range s.Properties {
		if s.Properties[i].Name == prop && s.Properties[i].Desired != nil {
			return *s.Properties[i].Desired
		}
	}
	return device.DesiredStatus{}
}

// sameJSON tells whether two values are the same but for spaces and the order
// of an object's fields. Numbers compare as they are written.
func sameJSON(a, b json.RawMessage) bool {
	if bytes.Equal(a, b) {
		return true
	}
	ca, okA := canonical(a)
	cb, okB := canonical(b)
	return okA && okB && bytes.Equal(ca, cb)
}

func canonical(v json.RawMessage) ([]byte, bool) {
	dec := json.NewDecoder(bytes.NewReader(v))
	dec.UseNumber()
	var x any
	if dec.Decode(&x) != nil {
		return nil, false
	}
	b, err := json.Marshal(x)
	return b, err == nil
}

// clock is time.Now but in tests.
type clock func() time.Time
