package cloudbridge

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"

	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// at is the time of these tests, in milliseconds.
const at = 1790000000000

// bench is a desired whose informers are filled by hand and whose API server
// does not exist: whatever asks it fails.
type bench struct {
	*desired
	touched []topic.Topic
	targets map[string]int64 // device/property → rev
	keys    map[string]sealTo
	up      bool // every node's link
}

func newBench(t *testing.T) *bench {
	t.Helper()
	rc := &rest.Config{Host: "http://127.0.0.1:1"}
	kube, err := kubernetes.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	dyn, err := dynamic.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	meta, err := metadata.NewForConfig(rc)
	if err != nil {
		t.Fatal(err)
	}
	in, err := newInformers(kube, dyn, meta)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{targets: map[string]int64{}, keys: map[string]sealTo{}}
	b.desired = &desired{
		in: in, kube: kube, log: slog.New(slog.NewTextHandler(t.Output(), nil)), now: func() time.Time { return time.UnixMilli(at) },
		truth: newTruth(), refs: newReferences(),
		touch:     func(ts ...topic.Topic) { b.touched = append(b.touched, ts...) },
		targetRev: func(_, dev, prop string) int64 { return b.targets[dev+"/"+prop] },
		devices:   newQueue(), pods: newQueue(),
		sealKey: func(node string) sealTo { return b.keys[node] }, linkUp: func(string) bool { return b.up },
		count: func(_ string, err error) error { return err },
	}
	t.Cleanup(b.shutDown)
	return b
}

func (b *bench) add(t *testing.T, objs ...any) {
	t.Helper()
	for _, o := range objs {
		var err error
		switch o.(type) {
		case *corev1.Node:
			err = b.in.nodes.GetIndexer().Add(o)
		case *corev1.Pod:
			err = b.in.pods.GetIndexer().Add(o)
		case *corev1.Service:
			err = b.in.services.GetIndexer().Add(o)
		case *deviceObject:
			err = b.in.devices.GetIndexer().Add(o)
		case *modelObject:
			err = b.in.models.GetIndexer().Add(o)
		case *metav1.PartialObjectMetadata:
			err = b.in.configMaps.GetIndexer().Add(o)
		default:
			t.Fatalf("no informer for %T", o)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func metaFor(name, version string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name + "-uid"), ResourceVersion: version, Generation: 1}
}

func pumpModel(version string) *modelObject {
	return &modelObject{ObjectMeta: metaFor("pump", version), Spec: device.ModelSpec{Protocol: "modbus", Properties: []device.Property{
		{Name: "speed", Type: device.Uint16, Access: device.ReadWrite, Unit: "%", Modbus: &device.ModbusProperty{Table: device.HoldingRegister}},
		{Name: "pressure", Type: device.Float32, Unit: "bar", Modbus: &device.ModbusProperty{Table: device.InputRegister}},
	}}}
}

func pump(node, version string, desired map[string]string) *deviceObject {
	d := &deviceObject{ObjectMeta: metaFor("pump-1", version), Spec: device.Spec{
		NodeName: node, Model: "pump", Modbus: &device.ModbusDevice{Address: "192.0.2.9:502"}, Desired: map[string]json.RawMessage{},
	}}
	for k, v := range desired {
		d.Spec.Desired[k] = json.RawMessage(v)
	}
	return d
}

func (b *bench) wishAt(t *testing.T, node, prop string) payload.Wish {
	t.Helper()
	var w payload.Wish
	p, ok := b.truth.get(topic.DesiredTwin(node, "default", "pump-1", prop))
	if ok {
		if err := payload.Decode(p, &w); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

func TestWishRev(t *testing.T) {
	wish := func(v string, rev int64) []byte {
		return payload.Encode(payload.Wish{V: json.RawMessage(v), Rev: rev, UID: "pump-1-uid"})
	}
	onBroker := topic.DesiredTwin("n", "default", "pump-1", "speed")
	inStatus := func(d *deviceObject, v string, rev int64) *deviceObject {
		d.Status.Properties = []device.PropertyStatus{{Name: "speed", Desired: &device.DesiredStatus{Value: json.RawMessage(v), Rev: rev}}}
		return d
	}
	for _, tc := range []struct {
		name   string
		boot   []byte
		dev    *deviceObject
		target int64
		want   int64
	}{
		{"first seen", nil, pump("n", "1", map[string]string{"speed": "40"}), 0, at},
		{"the broker has it", wish("40", 7), pump("n", "1", map[string]string{"speed": "40"}), 0, 7},
		{"the broker has another value", wish("39", 7), pump("n", "1", map[string]string{"speed": "40"}), 0, at},
		{"the broker's is ahead of our clock", wish("39", at+5), pump("n", "1", map[string]string{"speed": "40"}), 0, at + 6},
		{"the broker has another device's", payload.Encode(payload.Wish{V: json.RawMessage("40"), Rev: 7, UID: "before"}), pump("n", "1", map[string]string{"speed": "40"}), 0, at},
		{"what the broker has cannot be read", []byte("nonsense"), pump("n", "1", map[string]string{"speed": "40"}), 0, at},
		{"the status has it", nil, inStatus(pump("n", "1", map[string]string{"speed": "40"}), "40", 8), 0, 8},
		{"the status has another value", nil, inStatus(pump("n", "1", map[string]string{"speed": "40"}), "39", at+8), 0, at + 9},
		{"a restored broker is behind the status", wish("39", 7), inStatus(pump("n", "1", map[string]string{"speed": "40"}), "40", 8), 0, 8},
		{"the node's target is newer", nil, pump("n", "1", map[string]string{"speed": "40"}), at + 100, at + 101},
		{"a kept wish stays behind a newer target", wish("40", 7), pump("n", "1", map[string]string{"speed": "40"}), at + 100, 7},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBench(t)
			if tc.boot != nil {
				b.truth.setBoot(map[topic.Topic][]byte{onBroker: tc.boot})
			}
			b.targets["default/pump-1/speed"] = tc.target
			b.add(t, pumpModel("2"), tc.dev)
			b.device("default/pump-1")
			w := b.wishAt(t, "n", "speed")
			if w.Rev != tc.want || string(w.V) != "40" || w.UID != "pump-1-uid" {
				t.Errorf("wish %+v, want rev %d", w, tc.want)
			}
		})
	}
}

// TestWishThroughTime follows one wish through what people do.
func TestWishThroughTime(t *testing.T) {
	b := newBench(t)
	now := int64(at)
	b.desired.now = func() time.Time { return time.UnixMilli(now) }
	b.add(t, pumpModel("1"))
	step := func(d *deviceObject) {
		t.Helper()
		now += 1000
		b.add(t, d)
		b.device("default/pump-1")
	}
	step(pump("n", "2", map[string]string{"speed": "40"}))
	first := b.wishAt(t, "n", "speed").Rev
	step(pump("n", "3", map[string]string{"speed": " 40 "})) // an apply that changes nothing
	if r := b.wishAt(t, "n", "speed").Rev; r != first {
		t.Errorf("the same value got rev %d after %d", r, first)
	}
	step(pump("m", "4", map[string]string{"speed": "40"})) // moved
	if r := b.wishAt(t, "m", "speed").Rev; r != first {
		t.Errorf("moved to another node, the wish got rev %d after %d", r, first)
	}
	if _, ok := b.truth.get(topic.DesiredTwin("n", "default", "pump-1", "speed")); ok {
		t.Error("the wish is still at the old node")
	}
	old := pump("m", "5", nil) // taken back; its status still holds it
	old.Status.Properties = []device.PropertyStatus{{Name: "speed", Desired: &device.DesiredStatus{Value: json.RawMessage("40"), Rev: first}}}
	step(old)
	if w := b.wishAt(t, "m", "speed"); w.Rev != 0 {
		t.Errorf("a wish taken back is published: %+v", w)
	}
	again := pump("m", "6", map[string]string{"speed": "40"})
	again.Status = old.Status
	step(again)
	if r := b.wishAt(t, "m", "speed").Rev; r <= first {
		t.Errorf("wished again, the value has the old rev %d", r)
	}
	// Without its model the device is not published; its wish comes back with
	// its rev, which the status holds.
	rev := b.wishAt(t, "m", "speed").Rev
	again.Status.Properties[0].Desired.Rev = rev
	if err := b.in.models.GetIndexer().Delete(pumpModel("1")); err != nil {
		t.Fatal(err)
	}
	step(again)
	if b.truth.len() != 0 {
		t.Errorf("published without a model: %v", b.truth.topics())
	}
	b.add(t, pumpModel("7"))
	step(again)
	if r := b.wishAt(t, "m", "speed").Rev; r != rev {
		t.Errorf("after the model came back: rev %d, want %d", r, rev)
	}
}

// TestDeviceRevIsSteady: writes of the status do not cross the link.
func TestDeviceRevIsSteady(t *testing.T) {
	b := newBench(t)
	b.add(t, pumpModel("5"), pump("n", "9", nil))
	b.device("default/pump-1")
	tp := topic.DesiredDevice("n", "default", "pump-1")
	first, _ := b.truth.get(tp)
	var d device.Device
	if err := payload.Decode(first, &d); err != nil || d.Rev != 9 {
		t.Fatalf("%s, %v", first, err)
	}
	b.touched = nil
	b.add(t, pump("n", "12", nil))
	if b.device("default/pump-1") || len(b.touched) > 0 {
		t.Errorf("a status write touched %v", b.touched)
	}
	changed := pumpModel("20")
	changed.Spec.Properties[0].Unit = "rpm"
	b.add(t, changed)
	b.device("default/pump-1")
	second, _ := b.truth.get(tp)
	if err := payload.Decode(second, &d); err != nil || d.Rev != 20 || d.Properties[0].Unit != "rpm" {
		t.Errorf("%s, %v", second, err)
	}
}

func TestResolveRefuses(t *testing.T) {
	broken := pumpModel("1")
	broken.Spec.Properties = append(broken.Spec.Properties, broken.Spec.Properties[0])
	untyped := pumpModel("1")
	untyped.Spec.Properties[0].Type = "decimal"
	unplaced := pumpModel("1")
	unplaced.Spec.Properties[0].Modbus = nil
	noAddress := pump("n", "1", nil)
	noAddress.Spec.Modbus = nil
	for _, tc := range []struct {
		name string
		d    *deviceObject
		m    *modelObject
		want string
	}{
		{"no model", pump("n", "1", nil), nil, "there is no DeviceModel pump in namespace default: the device's model does not exist"},
		{"no address", noAddress, pumpModel("1"), "model pump speaks modbus: the device needs spec.modbus with the slave's address"},
		{"twice", pump("n", "1", nil), broken, "model pump has property speed twice"},
		{"type", pump("n", "1", nil), untyped, `model pump: property speed has no type "decimal"`},
		{"place", pump("n", "1", nil), unplaced, "model pump: property speed does not say where it lies on a modbus device"},
	} {
		if _, err := resolve(tc.d, tc.m); err == nil || err.Error() != tc.want {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

func podOn(node, name, version string, configMaps ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metaFor(name, version), Spec: corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
	for _, cm := range configMaps {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: cm, VolumeSource: corev1.VolumeSource{
			ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: cm}}}})
	}
	return p
}

func TestReferencesOf(t *testing.T) {
	named := func(n string) corev1.LocalObjectReference { return corev1.LocalObjectReference{Name: n} }
	env := func(n string) []corev1.EnvVar {
		return []corev1.EnvVar{
			{Name: "plain", Value: "x"},
			{Name: "field", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}},
			{Name: "ref", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: named(n)}}},
			{Name: "key", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: named(n)}}},
		}
	}
	from := func(n string) []corev1.EnvFromSource {
		return []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: named(n)}}, {SecretRef: &corev1.SecretEnvSource{LocalObjectReference: named(n)}}}
	}
	p := podOn("n", "p", "1", "volume")
	p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{named("pull"), named("")}
	p.Spec.Volumes = append(p.Spec.Volumes,
		corev1.Volume{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "volume"}}},
		corev1.Volume{Name: "pr", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: named("projected")}}, {Secret: &corev1.SecretProjection{LocalObjectReference: named("projected")}},
			{DownwardAPI: &corev1.DownwardAPIProjection{}}}}}})
	p.Spec.InitContainers = []corev1.Container{{Env: env("init-env"), EnvFrom: from("init-from")}}
	p.Spec.Containers = []corev1.Container{{Env: env("env"), EnvFrom: from("from")}}
	p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Env: env("debug-env"), EnvFrom: from("debug-from")}}}
	got := map[kind][]string{}
	for o := range referencesOf(p) {
		got[o.kind] = append(got[o.kind], o.name)
	}
	want := []string{"default/debug-env", "default/debug-from", "default/env", "default/from", "default/init-env", "default/init-from", "default/projected", "default/volume"}
	slices.Sort(got[kindConfigMap])
	if !slices.Equal(got[kindConfigMap], want) {
		t.Errorf("config maps\n got %v\nwant %v", got[kindConfigMap], want)
	}
	want = slices.Insert(want, 7, "default/pull")
	slices.Sort(got[kindSecret])
	if !slices.Equal(got[kindSecret], want) {
		t.Errorf("secrets\n got %v\nwant %v", got[kindSecret], want)
	}
}

// TestUnknownIsNotCleared: a ConfigMap that the broker has and the API server
// cannot be asked about stays; one whose version is known needs no question.
func TestUnknownIsNotCleared(t *testing.T) {
	b := newBench(t)
	edge := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
	b.add(t, edge, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "m"}}, podOn("n", "p", "3", "same", "changed", "gone"), podOn("m", "q", "4", "same"), podOn("other", "r", "5", "same"),
		&metav1.PartialObjectMetadata{ObjectMeta: metaFor("same", "7")}, &metav1.PartialObjectMetadata{ObjectMeta: metaFor("changed", "8")})
	boot := map[topic.Topic][]byte{}
	for _, name := range []string{"same", "changed", "gone"} {
		boot[topic.DesiredConfigMap("n", "default", name)] = payload.Encode(payload.ConfigMap{UID: name + "-uid", Rev: 7, Namespace: "default", Name: name})
	}
	b.truth.setBoot(boot)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, p := range []string{"default/p", "default/q", "default/r"} {
		if _, err := b.pod(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.configMap(ctx, "default/same"); err != nil {
		t.Errorf("same: %v", err)
	}
	if err := b.configMap(ctx, "default/changed"); err == nil {
		t.Error("changed: read from an API server that does not exist")
	}
	if err := b.configMap(ctx, "default/gone"); err != nil {
		t.Errorf("gone: %v", err)
	}
	var got []string
	for _, tp := range b.truth.topics() {
		got = append(got, string(tp))
	}
	slices.Sort(got)
	want := []string{
		"fl/m/desired/configmap/default/same", "fl/m/desired/pod/default/q",
		"fl/n/desired/configmap/default/changed", "fl/n/desired/configmap/default/same", "fl/n/desired/pod/default/p",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	// The last pod that needs it goes.
	if err := b.in.pods.GetIndexer().Delete(podOn("m", "q", "4")); err != nil {
		t.Fatal(err)
	}
	touched, err := b.pod(ctx, "default/q")
	if err != nil || !slices.Equal(touched, []key{{kindConfigMap, "default/same"}, {kindToken, "default/q"}}) {
		t.Errorf("touched %v, %v", touched, err)
	}
	if err := b.configMap(ctx, "default/same"); err != nil {
		t.Error(err)
	}
	if _, ok := b.truth.get(topic.DesiredConfigMap("m", "default", "same")); ok {
		t.Error("node m still has a ConfigMap that it does not need")
	}
}

func TestSteady(t *testing.T) {
	enc := func(v string) func(int64) []byte {
		return func(r int64) []byte {
			return payload.Encode(map[string]any{"uid": "u", "rev": r, "v": v})
		}
	}
	for _, tc := range []struct {
		name string
		prev []byte
		uid  string
		rev  int64
		want string
	}{
		{"the first", nil, "u", 5, `{"rev":5,"uid":"u","v":"a"}`},
		{"the same", enc("a")(5), "u", 9, `{"rev":5,"uid":"u","v":"a"}`},
		{"another", enc("b")(5), "u", 9, `{"rev":9,"uid":"u","v":"a"}`},
		{"another, from a restored etcd", enc("b")(50), "u", 9, `{"rev":51,"uid":"u","v":"a"}`},
		{"of an object before", enc("b")(50), "w", 9, `{"rev":9,"uid":"u","v":"a"}`},
		{"unreadable", []byte("x"), "u", 9, `{"rev":9,"uid":"u","v":"a"}`},
	} {
		if got := string(steady(tc.prev, tc.uid, tc.rev, enc("a"))); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestSameJSON(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		same bool
	}{
		{`40`, `40`, true}, {`40`, ` 40 `, true}, {`{"a":1,"b":2}`, `{"b":2, "a":1}`, true},
		{`40`, `41`, false}, {`"40"`, `40`, false}, {`18446744073709551615`, `18446744073709551614`, false}, {``, `1`, false},
	} {
		if got := sameJSON(json.RawMessage(tc.a), json.RawMessage(tc.b)); got != tc.same {
			t.Errorf("sameJSON(%s, %s) = %t", tc.a, tc.b, got)
		}
	}
}

func TestTransforms(t *testing.T) {
	keep := trimPod(func(n string) bool { return n == "edge" })
	o, err := keep(&corev1.Pod{ObjectMeta: metaFor("p", "1"), Spec: corev1.PodSpec{NodeName: "edge", Containers: []corev1.Container{{Name: "c"}}}, Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1"}})
	if p := o.(*corev1.Pod); err != nil || stripped(p) || p.Status.Phase != corev1.PodRunning || p.Status.PodIP != "" {
		t.Errorf("%+v, %v", o, err)
	}
	o, err = keep(&corev1.Pod{ObjectMeta: metaFor("p", "1"), Spec: corev1.PodSpec{NodeName: "server", Containers: []corev1.Container{{Name: "c"}}}})
	if p := o.(*corev1.Pod); err != nil || !stripped(p) || p.Spec.NodeName != "server" || p.UID != "p-uid" {
		t.Errorf("%+v, %v", o, err)
	}
}
