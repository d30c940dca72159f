package cloudbridge

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

func TestDeviceState(t *testing.T) {
	up, down, unknown := nodeView{state: linkUp, ever: true}, nodeView{state: linkDown, ever: true}, nodeView{state: linkUnknown}
	online := &payload.DeviceStatus{UID: "pump-1-uid", State: payload.DeviceOnline, Since: at}
	was := func(s device.State) *deviceObject {
		d := pump("n", "1", nil)
		d.Status = device.Status{State: s, Message: "before", LastReportTime: device.At(at)}
		return d
	}
	noAddress := pump("n", "1", nil)
	noAddress.Spec.Modbus = nil
	for _, tc := range []struct {
		name    string
		d       *deviceObject
		m       *modelObject
		v       deviceView
		want    device.State
		message string
		ready   string
	}{
		{"no model", was(device.StateOnline), nil, deviceView{node: up, report: online}, device.StateModelMissing, "no DeviceModel pump", "False"},
		{"invalid", noAddress, pumpModel("1"), deviceView{node: up}, device.StateInvalid, "spec.modbus", "False"},
		{"online", pump("n", "1", nil), pumpModel("1"), deviceView{node: up, report: online}, device.StateOnline, "", "True"},
		{"error", pump("n", "1", nil), pumpModel("1"), deviceView{node: up, report: &payload.DeviceStatus{UID: "pump-1-uid", State: payload.DeviceError, Error: "no answer"}}, device.StateError, "no answer", "False"},
		{"a state that is none", pump("n", "1", nil), pumpModel("1"), deviceView{node: up, report: &payload.DeviceStatus{UID: "pump-1-uid", State: "Dancing"}}, device.StateError, "Dancing", "False"},
		{"no mapper yet", pump("n", "1", nil), pumpModel("1"), deviceView{node: up}, device.StateUnknown, "no mapper on node n", "Unknown"},
		{"a report about the device before", pump("n", "1", nil), pumpModel("1"), deviceView{node: up, report: &payload.DeviceStatus{UID: "other", State: payload.DeviceOnline}}, device.StateUnknown, "no mapper", "Unknown"},
		{"link down", was(device.StateOnline), pumpModel("1"), deviceView{node: down, report: online}, device.StateNodeOffline, "link to node n is down", "Unknown"},
		{"never connected", pump("n", "1", nil), pumpModel("1"), deviceView{node: nodeView{state: linkDown}}, device.StateUnknown, "never connected", "Unknown"},
		{"link not known yet", was(device.StateOnline), pumpModel("1"), deviceView{node: unknown}, device.StateOnline, "before", "True"},
		{"link not known yet, model back", was(device.StateModelMissing), pumpModel("1"), deviceView{node: unknown}, device.StateUnknown, "not heard of yet", "Unknown"},
	} {
		s := deviceStatus(tc.d, tc.m, tc.v, nil, time.UnixMilli(at))
		if s.State != tc.want || !strings.Contains(s.Message, tc.message) || s.Conditions[0].Status != tc.ready || s.Conditions[0].Reason != string(tc.want) {
			t.Errorf("%s: %s %q %+v", tc.name, s.State, s.Message, s.Conditions)
		}
	}
}

func TestDeviceStatusWishes(t *testing.T) {
	wish := payload.Wish{V: json.RawMessage("40"), Rev: 100, UID: "pump-1-uid"}
	target := func(by string, rev, wish int64) map[string]payload.Target {
		return map[string]payload.Target{"speed": {V: json.RawMessage("40"), Rev: rev, Wish: wish, UID: "pump-1-uid", By: by}}
	}
	reading := func(ack int64, err string) map[string]payload.Reading {
		return map[string]payload.Reading{"speed": {V: json.RawMessage("40"), T: at, Ack: ack, Err: err}}
	}
	for _, tc := range []struct {
		name   string
		value  string
		before device.DesiredStatus
		v      deviceView
		acked  bool
		err    string
	}{
		{"not yet", "40", device.DesiredStatus{}, deviceView{}, false, ""},
		{"acknowledged", "40", device.DesiredStatus{}, deviceView{readings: reading(100, ""), targets: target("cloud", 100, 0)}, true, ""},
		{"refused by the device", "40", device.DesiredStatus{}, deviceView{readings: reading(100, "range"), targets: target("cloud", 100, 0)}, true, "range"},
		{"under a later target rev", "40", device.DesiredStatus{}, deviceView{readings: reading(120, ""), targets: target("cloud", 120, 100)}, true, ""},
		{"a later target, not yet", "40", device.DesiredStatus{}, deviceView{readings: reading(110, ""), targets: target("cloud", 120, 100)}, false, ""},
		{"a local wish came first", "40", device.DesiredStatus{}, deviceView{readings: reading(150, ""), targets: target("local", 150, 0)}, false, ""},
		{"a local wish came later", "40", device.DesiredStatus{Value: json.RawMessage("40"), Rev: 100, Acked: true}, deviceView{readings: reading(150, ""), targets: target("local", 150, 0)}, true, ""},
		{"an older wish was acknowledged", "40", device.DesiredStatus{Value: json.RawMessage("39"), Rev: 90, Acked: true}, deviceView{readings: reading(90, "")}, false, ""},
		{"the value cannot be", "-1", device.DesiredStatus{}, deviceView{}, false, "property speed: -1 does not fit uint16"},
	} {
		d := pump("n", "1", map[string]string{"speed": tc.value})
		if tc.before.Rev != 0 {
			d.Status.Properties = []device.PropertyStatus{{Name: "speed", Desired: &tc.before}}
		}
		tc.v.node = nodeView{state: linkUp}
		s := deviceStatus(d, pumpModel("1"), tc.v, map[string]payload.Wish{"speed": wish}, time.UnixMilli(at))
		got := s.Properties[0].Desired
		if got == nil || got.Rev != 100 || got.Acked != tc.acked || got.Error != tc.err {
			t.Errorf("%s: %+v", tc.name, got)
		}
	}
}

// TestDeviceStatusKeeps: what nobody reports at the moment stays, and the rev of
// a wish outlives a missing model.
func TestDeviceStatusKeeps(t *testing.T) {
	d := pump("n", "1", map[string]string{"speed": "40", "absent": "1"})
	d.Status = device.Status{State: device.StateOnline, LastReportTime: device.At(at), Properties: []device.PropertyStatus{
		{Name: "speed", Value: json.RawMessage("39"), Time: device.At(at), Desired: &device.DesiredStatus{Value: json.RawMessage("40"), Rev: 7}, Target: &device.TargetStatus{Rev: 7, By: "cloud"}},
		{Name: "removed", Value: json.RawMessage("1")},
	}}
	now := time.UnixMilli(at)
	s := deviceStatus(d, nil, deviceView{node: nodeView{state: linkUp}}, nil, now)
	if len(s.Properties) != 2 || s.Properties[0].Desired == nil || s.Properties[0].Desired.Rev != 7 {
		t.Errorf("without a model: %+v", s.Properties)
	}
	wishes := map[string]payload.Wish{"speed": {V: json.RawMessage("40"), Rev: 7}, "absent": {V: json.RawMessage("1"), Rev: 8}}
	s = deviceStatus(d, pumpModel("1"), deviceView{node: nodeView{state: linkUnknown}}, wishes, now)
	if len(s.Properties) != 2 || string(s.Properties[0].Value) != "39" || s.Properties[0].Target == nil || s.Properties[0].Unit != "%" {
		t.Errorf("a broker without data: %+v", s.Properties)
	}
	if p := s.Properties[1]; p.Name != "absent" || p.Desired.Error != "model pump has no property absent" {
		t.Errorf("a wish for no property: %+v", p)
	}
	s = deviceStatus(d, pumpModel("1"), deviceView{node: nodeView{state: linkUp}}, wishes, now)
	if s.Properties[0].Target != nil {
		t.Error("a target that the node took back is still there")
	}
}

// TestStatusPatch: a field that is gone becomes null, and the API server's own
// way to write a number is no change.
func TestStatusPatch(t *testing.T) {
	d := pump("n", "1", nil)
	up := deviceView{node: nodeView{state: linkUp}, report: &payload.DeviceStatus{UID: "pump-1-uid", State: payload.DeviceError, Error: "no answer", Since: at},
		readings: map[string]payload.Reading{"pressure": {V: json.RawMessage("3.0"), T: at}}}
	now := time.UnixMilli(at)
	first := deviceStatus(d, pumpModel("1"), up, nil, now)
	if string(first.Properties[0].Value) != "3" {
		t.Errorf("value %s", first.Properties[0].Value)
	}
	d.Status = *first
	if _, changed, err := statusPatch(d, deviceStatus(d, pumpModel("1"), up, nil, now.Add(time.Hour))); changed || err != nil {
		t.Errorf("nothing happened, and it is written: %v", err)
	}
	up.report = &payload.DeviceStatus{UID: "pump-1-uid", State: payload.DeviceOnline, Since: at}
	patch, changed, err := statusPatch(d, deviceStatus(d, pumpModel("1"), up, nil, now))
	if !changed || err != nil || !strings.Contains(string(patch), `"message":null`) || !strings.Contains(string(patch), `"uid":"pump-1-uid"`) {
		t.Errorf("%s, %t, %v", patch, changed, err)
	}
}

func TestNodeStatus(t *testing.T) {
	now := time.UnixMilli(at)
	r := &payload.Node{Agent: "v1.2.3", OS: "linux", Arch: "arm64", CPUs: 4, MemoryBytes: 1 << 30, InternalAddress: "192.0.2.7", Hostname: "gw"}
	prev := &corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: "Other", Status: corev1.ConditionTrue}}}
	up := nodeStatus(prev, nodeView{state: linkUp, node: r}, now)
	cond := func(s *corev1.NodeStatus, typ corev1.NodeConditionType) corev1.NodeCondition {
		for _, c := range s.Conditions {
			if c.Type == typ {
				return c
			}
		}
		return corev1.NodeCondition{}
	}
	if c := cond(up, corev1.NodeReady); c.Status != corev1.ConditionTrue || c.Reason != reasonLinkUp {
		t.Errorf("%+v", c)
	}
	if cond(up, "Other").Status != corev1.ConditionTrue {
		t.Error("another writer's condition is gone")
	}
	if p := up.Allocatable[corev1.ResourcePods]; !p.IsZero() {
		t.Errorf("room for %s pods", p.String())
	}
	later := now.Add(time.Minute)
	if again := nodeStatus(up, nodeView{state: linkUp, node: r}, later); cond(again, corev1.NodeReady).LastHeartbeatTime.Time.Equal(later) {
		t.Error("a status without news is written")
	}
	if same := nodeStatus(up, nodeView{state: linkUnknown, node: r}, later); cond(same, corev1.NodeReady).Status != corev1.ConditionTrue {
		t.Error("a link that is not known made the node NotReady")
	}
	full := *r
	full.StoreError = "disk full"
	down := nodeStatus(up, nodeView{state: linkDown, node: &full}, later)
	if c := cond(down, corev1.NodeReady); c.Status != corev1.ConditionUnknown || c.Reason != reasonLinkDown || !c.LastTransitionTime.Time.Equal(later) {
		t.Errorf("%+v", c)
	}
	if c := cond(down, conditionStore); c.Status != corev1.ConditionTrue || c.Message != "disk full" {
		t.Errorf("%+v", c)
	}
	patch, err := twoWay(&corev1.Node{Status: *up}, &corev1.Node{Status: *down})
	if err != nil || strings.Count(string(patch), "Other") != 1 /* in the order of the list */ || !strings.Contains(string(patch), reasonLinkDown) {
		t.Errorf("%s, %v", patch, err)
	}
}
