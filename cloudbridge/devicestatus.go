package cloudbridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	kubejson "k8s.io/apimachinery/pkg/util/json"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// maxMessage is the CRD's bound on status.message.
const maxMessage = 4096

// deviceStatus is what the status of a device should be. wishes are those that
// are published, by property. Of what nobody reports at the moment (a broker
// that lost its data, a node that is away) the status keeps the last.
func deviceStatus(obj *deviceObject, m *modelObject, v deviceView, wishes map[string]payload.Wish, now time.Time) *device.Status {
	prev := &obj.Status
	s := &device.Status{ObservedGeneration: obj.Generation, LastReportTime: prev.LastReportTime}
	dev, err := resolve(obj, m)
	if r := v.report; r != nil && r.UID != string(obj.UID) {
		v.report = nil // about a device of that name that was before
	}
	s.State, s.Message = deviceState(obj, v, prev, err)
	if len(s.Message) > maxMessage {
		s.Message = strings.ToValidUTF8(s.Message[:maxMessage], "")
	}
	report := func(t time.Time) {
		if t.After(s.LastReportTime) {
			s.LastReportTime = t
		}
	}
	if v.report != nil {
		report(device.At(v.report.Since))
	}
	was := map[string]*device.PropertyStatus{}
	for i := range prev.Properties {
		was[prev.Properties[i].Name] = &prev.Properties[i]
	}
	named := map[string]bool{}
	if dev != nil {
		s.Protocol = dev.Protocol
		for i := range dev.Properties {
			p := &dev.Properties[i]
			named[p.Name] = true
			ps := propertyStatus(obj, p, v, was[p.Name])
			report(ps.Time)
			ps.Desired = wishStatus(obj, p, p.Name, v, wishes, was[p.Name])
			if ps.Value != nil || ps.Quality != "" || ps.Desired != nil || ps.Target != nil {
				s.Properties = append(s.Properties, ps)
			}
		}
	} else {
		// Without a model nothing can be said of the values; they stay.
		for _, p := range prev.Properties {
			named[p.Name] = true
			p.Desired = wishStatus(obj, nil, p.Name, v, wishes, &p)
			s.Properties = append(s.Properties, p)
		}
		s.Protocol = prev.Protocol
	}
	var rest []string
	for name := range obj.Spec.Desired {
		if !named[name] && topic.CheckProperty(name) == nil {
			rest = append(rest, name)
		}
	}
	slices.Sort(rest)
	for _, name := range rest {
		if d := wishStatus(obj, nil, name, v, wishes, was[name]); d != nil {
			if dev != nil {
				d.Error = fmt.Sprintf("model %s has no property %s", dev.Model, name)
			}
			s.Properties = append(s.Properties, device.PropertyStatus{Name: name, Desired: d})
		}
	}
	s.Conditions = []device.Condition{ready(s, prev, obj.Generation, now)}
	return s
}

// deviceState says how a device is doing. err is why it cannot be resolved.
func deviceState(obj *deviceObject, v deviceView, prev *device.Status, err error) (device.State, string) {
	switch {
	case errors.Is(err, errModelMissing):
		return device.StateModelMissing, err.Error()
	case err != nil:
		return device.StateInvalid, err.Error()
	}
	node := obj.Spec.NodeName
	switch v.node.state {
	case linkUp:
		if v.report == nil {
			return device.StateUnknown, "no mapper on node " + node + " has taken up the device yet"
		}
		switch v.report.State {
		case payload.DeviceOnline, payload.DeviceOffline, payload.DeviceError:
			return device.State(v.report.State), v.report.Error
		}
		return device.StateError, fmt.Sprintf("mapper %s reports a state that is none: %.80q", v.report.Mapper, v.report.State)
	case linkUnknown:
		// The node may be on its way back; what was true a moment ago stands.
		if prev.State != "" && prev.State != device.StateModelMissing && prev.State != device.StateInvalid {
			return prev.State, prev.Message
		}
		return device.StateUnknown, "node " + node + " was not heard of yet"
	default:
		if !v.node.ever && prev.LastReportTime.IsZero() {
			return device.StateUnknown, "node " + node + " has never connected"
		}
		return device.StateNodeOffline, "the link to node " + node + " is down, values are the last ones"
	}
}

// propertyStatus is the mirror of one property's topics.
func propertyStatus(obj *deviceObject, p *device.Property, v deviceView, was *device.PropertyStatus) device.PropertyStatus {
	ps := device.PropertyStatus{Name: p.Name}
	if r, ok := v.readings[p.Name]; ok {
		ps.Time, ps.Quality = device.At(r.T), r.Q
		if !isNull(r.V) {
			ps.Value = stored(r.V)
		}
		if !isNull(r.LV) {
			ps.LastValue = stored(r.LV)
		}
	} else if was != nil {
		ps.Value, ps.Time, ps.Quality, ps.LastValue = was.Value, was.Time, was.Quality, was.LastValue
	}
	ps.Unit = p.Unit
	t, ok := v.targets[p.Name]
	switch {
	case ok && t.UID == string(obj.UID):
		ps.Target = &device.TargetStatus{Value: stored(t.V), Rev: t.Rev, By: t.By, Who: t.Who}
	case !ok && was != nil && v.node.state != linkUp:
		ps.Target = was.Target
	}
	return ps
}

// stored is a value as the API server gives it back: 40.0 becomes 40, which
// must not look like a change for ever.
func stored(v json.RawMessage) json.RawMessage {
	var x any
	if kubejson.Unmarshal(v, &x) != nil {
		return v
	}
	b, err := json.Marshal(x)
	if err != nil {
		return v
	}
	return b
}

// wishStatus tells what became of a wish, or nil where there is none. p is nil
// where the model has no such property or there is no model.
func wishStatus(obj *deviceObject, p *device.Property, name string, v deviceView, wishes map[string]payload.Wish, was *device.PropertyStatus) *device.DesiredStatus {
	value, wanted := obj.Spec.Desired[name]
	if !wanted || isNull(value) {
		return nil
	}
	var before device.DesiredStatus
	if was != nil && was.Desired != nil {
		before = *was.Desired
	}
	w, ok := wishes[name]
	if !ok {
		// Not published, because the device cannot be resolved: its rev must
		// outlive that.
		if before.Rev != 0 && sameJSON(before.Value, value) {
			return &before
		}
		return nil
	}
	d := &device.DesiredStatus{Value: w.V, Rev: w.Rev}
	if before.Rev == w.Rev {
		d.Acked, d.Error = before.Acked, before.Error
	}
	// The mapper acknowledges the target's rev, which is the wish's own unless
	// something came in between.
	target := w.Rev
	t, driven := v.targets[name]
	if driven && t.CloudRev() == w.Rev {
		target = t.Rev
	}
	if r, ok := v.readings[name]; ok && r.Ack == target {
		d.Acked, d.Error = true, r.Err
	}
	if p != nil && !d.Acked {
		d.Error = ""
		if !p.Access.Writable() {
			d.Error = "property " + name + " is read only"
		} else if _, err := p.Decode(value); err != nil {
			d.Error = err.Error()
		}
	}
	return d
}

// ready is the device's one condition. Its time moves with its status only.
func ready(s, prev *device.Status, generation int64, now time.Time) device.Condition {
	c := device.Condition{
		Type: device.ConditionReady, Reason: string(s.State), Message: s.Message,
		LastTransitionTime: now.UTC().Truncate(time.Second), ObservedGeneration: generation,
	}
	switch s.State {
	case device.StateOnline:
		c.Status = "True"
	case device.StateUnknown, device.StateNodeOffline:
		c.Status = "Unknown"
	default:
		c.Status = "False"
	}
	for _, old := range prev.Conditions {
		if old.Type == c.Type && old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
	}
	return c
}

// wishes reads the device's published wishes.
func (s *status) wishes(d *deviceObject) map[string]payload.Wish {
	out := map[string]payload.Wish{}
	for prop := range d.Spec.Desired {
		b, ok := s.truth.get(topic.DesiredTwin(d.Spec.NodeName, d.Namespace, d.Name, prop))
		var w payload.Wish
		if ok && payload.Decode(b, &w) == nil && w.UID == string(d.UID) {
			out[prop] = w
		}
	}
	return out
}

// writeDevice writes a device's status if it changed.
func (s *status) writeDevice(ctx context.Context, name string) error {
	obj, ok := get[deviceObject](s.in.devices, name)
	if !ok {
		s.pace.forget(name)
		s.devices.drop(name)
		return nil
	}
	now := s.now()
	if wait := s.pace.begin(name, now); wait > 0 {
		s.queue.AddAfter(key{kindDevice, name}, wait)
		return nil
	}
	// The informer may be behind our own last write.
	if last, ok := s.devices.get(name); ok {
		if last.UID == obj.UID && rev(last.ResourceVersion) > rev(obj.ResourceVersion) {
			fresh := *obj
			fresh.Status = last.Status
			obj = &fresh
		} else {
			s.devices.drop(name)
		}
	}
	next := deviceStatus(obj, s.in.model(obj), s.mirror.device(obj.Spec.NodeName, name), s.wishes(obj), now)
	patch, changed, err := statusPatch(obj, next)
	if err != nil || !changed {
		return err
	}
	got, err := s.dyn.Resource(devicesGVR).Namespace(obj.Namespace).Patch(ctx, obj.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	s.pace.done(name, now) // a refused write counts too: it cost the API server the same
	if s.count("device", err) != nil {
		return fmt.Errorf("patch device status: %w", err)
	}
	if o, err := s.readBack(got); err == nil {
		s.devices.put(name, *o)
	}
	return nil
}

func (s *status) readBack(u *unstructured.Unstructured) (*deviceObject, error) {
	d := &deviceObject{}
	if err := reread(u, d); err != nil {
		return nil, err
	}
	trimMeta(&d.ObjectMeta)
	return d, nil
}

// statusPatch is the merge patch that makes the status what it should be; lists
// are replaced whole, a field that is gone becomes null.
func statusPatch(obj *deviceObject, next *device.Status) (patch []byte, changed bool, err error) {
	was, err := json.Marshal(&obj.Status)
	if err != nil {
		return nil, false, fmt.Errorf("device status: %w", err)
	}
	is, err := json.Marshal(next)
	if err != nil {
		return nil, false, fmt.Errorf("device status: %w", err)
	}
	if bytes.Equal(was, is) {
		return nil, false, nil
	}
	var before, after map[string]json.RawMessage
	if err := json.Unmarshal(was, &before); err != nil {
		return nil, false, fmt.Errorf("device status: %w", err)
	}
	if err := json.Unmarshal(is, &after); err != nil {
		return nil, false, fmt.Errorf("device status: %w", err)
	}
	for field := range before {
		if _, ok := after[field]; !ok {
			after[field] = json.RawMessage("null")
		}
	}
	// The uid makes the API server refuse a patch of another device of that name.
	patch, err = json.Marshal(map[string]any{"metadata": map[string]any{"uid": obj.UID}, "status": after})
	if err != nil {
		return nil, false, fmt.Errorf("device status: %w", err)
	}
	return patch, true, nil
}
