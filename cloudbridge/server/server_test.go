package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/cloudbridge/server"
	"github.com/fairlead-io/fairlead/cloudbridge/token"
	"github.com/fairlead-io/fairlead/schemas/access"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// cloud is a running cloud process, but in this one.
type cloud struct {
	addresses []string
	stop      func()
}

// start runs the server and waits until it listens. It has the rights of
// deploy/cloud/rbac.yaml and no others.
func start(t *testing.T, c *cluster, cfg server.Config) *cloud {
	t.Helper()
	return startLogged(t, c, cfg, slog.New(slog.NewTextHandler(t.Output(), nil)))
}

func startLogged(t *testing.T, c *cluster, cfg server.Config, log *slog.Logger) *cloud {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	listening := make(chan []string, 1)
	ended := make(chan error, 1)
	cfg.Kubeconfig = c.limited
	cfg.Logger = log
	cfg.Listening = func(a []string) { listening <- a }
	go func() { ended <- server.Run(ctx, cfg) }()
	cl := &cloud{}
	stopped := false
	cl.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("server ended with: %v", err)
		}
	}
	select {
	case cl.addresses = <-listening:
	case err := <-ended:
		cancel()
		t.Fatalf("server did not start: %v", err)
	}
	t.Cleanup(cl.stop)
	return cl
}

var pumpModel = map[string]any{"protocol": "modbus", "properties": []any{
	map[string]any{"name": "speed", "type": "uint16", "unit": "%", "access": "rw", "max": int64(100),
		"modbus": map[string]any{"table": "holdingRegister", "address": int64(0)}},
	map[string]any{"name": "pressure", "type": "float32", "unit": "bar",
		"modbus": map[string]any{"table": "inputRegister", "address": int64(0)}},
}}

func pump(node string, desired map[string]any) map[string]any {
	spec := map[string]any{"nodeName": node, "model": "pump", "modbus": map[string]any{"address": "192.0.2.9:502"}}
	if desired != nil {
		spec["desired"] = desired
	}
	return spec
}

func (c *cluster) status(t *testing.T, ns, name string) device.Status {
	t.Helper()
	u, err := c.dyn.Resource(devices).Namespace(ns).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(u.Object["status"])
	if err != nil {
		t.Fatal(err)
	}
	var s device.Status
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func property(s device.Status, name string) device.PropertyStatus {
	for _, p := range s.Properties {
		if p.Name == name {
			return p
		}
	}
	return device.PropertyStatus{}
}

func (c *cluster) ready(t *testing.T, node string) (corev1.NodeCondition, bool) {
	t.Helper()
	n, err := c.kube.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
	if err != nil {
		return corev1.NodeCondition{}, false
	}
	for _, cond := range n.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			return cond, true
		}
	}
	return corev1.NodeCondition{}, false
}

func (n *node) wish(ns, dev, prop string) payload.Wish {
	var w payload.Wish
	if b, ok := n.has(topic.DesiredTwin(n.name, ns, dev, prop)); ok {
		_ = payload.Decode(b, &w)
	}
	return w
}

func makeToken(t *testing.T, c *cluster, node string) string {
	t.Helper()
	tok, err := token.Store{Kube: c.kube}.Rotate(t.Context(), node)
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// TestNodeEnrols: a node that comes with its token becomes a Node, Ready and
// with a Lease; when its link ends it is NotReady; its object may be deleted.
func TestNodeEnrols(t *testing.T) {
	c := control(t)
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n := newNode("enrol-1")
	tok := makeToken(t, c, n.name)
	eventually(t, "the token is known", func() bool { return login(t, cl.addresses[0], n.name, tok) == nil })
	n.connect(t, cl.addresses[0], tok)

	eventually(t, "the node is Ready", func() bool {
		r, ok := c.ready(t, n.name)
		return ok && r.Status == corev1.ConditionTrue && r.Reason == "EdgeLinkUp"
	})
	obj, err := c.kube.CoreV1().Nodes().Get(t.Context(), n.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := obj.Labels["node-role.kubernetes.io/edge"]; !ok || obj.Labels[corev1.LabelOSStable] != "linux" || obj.Labels[corev1.LabelArchStable] != "amd64" {
		t.Errorf("labels %v", obj.Labels)
	}
	if !slices.ContainsFunc(obj.Spec.Taints, func(x corev1.Taint) bool {
		return x.Key == "node-role.kubernetes.io/edge" && x.Effect == corev1.TaintEffectNoSchedule
	}) {
		t.Errorf("taints %v", obj.Spec.Taints)
	}
	if q := obj.Status.Capacity[corev1.ResourcePods]; !q.IsZero() {
		t.Errorf("an agent without pods has room for %s", q.String())
	}
	eventually(t, "the lease", func() bool {
		l, err := c.kube.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(t.Context(), n.name, metav1.GetOptions{})
		return err == nil && l.Spec.RenewTime != nil && *l.Spec.HolderIdentity == n.name
	})

	// Deleted while online: not created again until there is a reason.
	if err := c.kube.CoreV1().Nodes().Delete(t.Context(), n.name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	n.report(topic.ReportedNode(n.name), payload.Node{Agent: "v1", OS: "linux", Arch: "amd64", CPUs: 4, MemoryBytes: 1 << 30})
	eventually(t, "the node with its news", func() bool {
		obj, err := c.kube.CoreV1().Nodes().Get(t.Context(), n.name, metav1.GetOptions{})
		return err == nil && obj.Status.NodeInfo.KubeletVersion == "fairlead-v1"
	})

	n.c.Drop(errors.New("cable pulled")) // without a DISCONNECT of ours: see offline
	n.stop()
	offline(t, cl.addresses[0], n.name, tok)
	eventually(t, "the node is NotReady", func() bool {
		r, ok := c.ready(t, n.name)
		return ok && r.Status == corev1.ConditionUnknown && r.Reason == "EdgeLinkDown"
	})
}

// login connects once and gives the broker's answer.
func login(t *testing.T, url, user, password string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	up := make(chan struct{}, 1)
	down := make(chan error, 1)
	cl, err := client.New(client.Config{
		URL: url, ClientID: "login", Username: user, Password: password,
		OnUp:   func(context.Context) { up <- struct{}{} },
		Logger: slog.New(&firstWarning{out: down}),
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = cl.Run(ctx) }()
	defer func() { cancel(); <-done }()
	select {
	case <-up:
		return nil
	case err := <-down:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// firstWarning takes the client's reason for not connecting from its log line.
type firstWarning struct{ out chan error }

func (f *firstWarning) Enabled(context.Context, slog.Level) bool { return true }
func (f *firstWarning) WithAttrs([]slog.Attr) slog.Handler       { return f }
func (f *firstWarning) WithGroup(string) slog.Handler            { return f }
func (f *firstWarning) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok {
			select {
			case f.out <- err:
			default:
			}
		}
		return true
	})
	return nil
}

// offline plays the Will of a node that went without a word.
func offline(t *testing.T, url, name, tok string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	up := make(chan struct{}, 1)
	cl, err := client.New(client.Config{URL: url, ClientID: "will", Username: name, Password: tok, OnUp: func(context.Context) { up <- struct{}{} }})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = cl.Run(ctx) }()
	defer func() { cancel(); <-done }()
	<-up
	if err := cl.Publish(ctx, client.Message{Topic: topic.ReportedLink(name), QoS: 1, Retain: true, Payload: payload.Encode(payload.Link{Since: 1})}); err != nil {
		t.Fatal(err)
	}
}

// TestLogin: who may come in, and what the others are told.
func TestLogin(t *testing.T) {
	c := control(t)
	sock := filepath.Join(t.TempDir(), "s")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}, Local: []string{"unix://" + sock, "mqtt://127.0.0.1:0"}})
	store := token.Store{Kube: c.kube}
	tok, err := store.Create(t.Context(), "login-1")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Create(t.Context(), "login-1"); !errors.Is(err, token.ErrExists) {
		t.Errorf("a second token without force: %v", err)
	}
	sec, err := c.kube.CoreV1().Secrets("fairlead-system").Get(t.Context(), "fairlead-node-login-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for k, v := range sec.Data {
		if strings.Contains(string(v), tok) {
			t.Errorf("the Secret holds the token itself under %s", k)
		}
	}
	mqtt := cl.addresses[0]
	eventually(t, "the token is known", func() bool { return login(t, mqtt, "login-1", tok) == nil })
	for _, tc := range []struct{ what, user, password, want string }{
		{"another's token", "login-2", tok, "not known here"},
		{"a wrong token", "login-1", tok[1:] + "A", "not known here"},
		{"nothing", "", "", "wants credentials"},
		{"no password", "login-1", "", "wants credentials"},
	} {
		if err := login(t, mqtt, tc.user, tc.password); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.what, err, tc.want)
		}
	}
	for _, a := range cl.addresses[1:] {
		if err := login(t, a, "", ""); err != nil {
			t.Errorf("local client at %s: %v", a, err)
		}
	}
	fresh, err := store.Rotate(t.Context(), "login-1")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old token is refused", func() bool { return login(t, mqtt, "login-1", tok) != nil })
	if err := login(t, mqtt, "login-1", fresh); err != nil {
		t.Errorf("the new token: %v", err)
	}
	list, err := store.List(t.Context())
	if err != nil || !slices.ContainsFunc(list, func(e token.Entry) bool { return e.Node == "login-1" && !e.Rotated.IsZero() }) {
		t.Errorf("list %v, %v", list, err)
	}
	if err := store.Revoke(t.Context(), "login-1"); err != nil {
		t.Fatal(err)
	}
	if err := store.Revoke(t.Context(), "login-1"); !errors.Is(err, token.ErrNone) {
		t.Errorf("revoked twice: %v", err)
	}
	eventually(t, "the revoked token is refused", func() bool { return login(t, mqtt, "login-1", fresh) != nil })
}

// TestDevice: a device with its model goes to its node and no other, wishes
// get their revs, reports come back into the status.
func TestDevice(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-device")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}, DeviceStatusInterval: time.Second})
	a, b := newNode("dev-a"), newNode("dev-b")
	for _, n := range []*node{a, b} {
		tok := makeToken(t, c, n.name)
		n.connect(t, cl.addresses[0], tok)
	}
	dev := c.create(t, devices, ns, "p1", pump("dev-a", map[string]any{"speed": int64(40)}))
	eventually(t, "the status says that the model is missing", func() bool { return c.status(t, ns, "p1").State == device.StateModelMissing })
	c.create(t, models, ns, "pump", pumpModel)
	eventually(t, "the wish is at the node", func() bool { return string(a.wish(ns, "p1", "speed").V) == "40" })
	first := a.wish(ns, "p1", "speed")
	if first.UID != string(dev.GetUID()) || first.Rev == 0 {
		t.Errorf("wish %+v", first)
	}
	var resolved device.Device
	raw, _ := a.has(topic.DesiredDevice("dev-a", ns, "p1"))
	if err := payload.Decode(raw, &resolved); err != nil || resolved.Protocol != "modbus" || len(resolved.Properties) != 2 || resolved.Modbus.Address != "192.0.2.9:502" {
		t.Errorf("device %s: %v", raw, err)
	}

	// Up: state, value, ack.
	a.report(topic.ReportedTarget("dev-a", ns, "p1", "speed"), payload.Target{V: first.V, Rev: first.Rev, UID: first.UID, By: payload.ByCloud, T: 1790000000000})
	a.report(topic.ReportedTwin("dev-a", ns, "p1", "speed"), payload.Reading{V: json.RawMessage("40.0"), T: 1790000000123, Ack: first.Rev})
	a.report(topic.ReportedTwin("dev-a", ns, "p1", "pressure"), payload.Reading{V: json.RawMessage("null"), LV: json.RawMessage("3.25"), T: 1790000000456, Q: payload.QualityTimeout})
	a.report(topic.ReportedDevice("dev-a", ns, "p1"), payload.DeviceStatus{UID: first.UID, Rev: resolved.Rev, State: payload.DeviceError, Since: 1790000000000, Error: "no answer", Mapper: "m"})
	var s device.Status
	eventually(t, "the status with the ack", func() bool {
		s = c.status(t, ns, "p1")
		d := property(s, "speed").Desired
		return d != nil && d.Acked && s.State == device.StateError && property(s, "pressure").Quality == payload.QualityTimeout
	})
	speed, pressure := property(s, "speed"), property(s, "pressure")
	if string(speed.Value) != "40" || speed.Unit != "%" || speed.Desired.Rev != first.Rev || speed.Target.By != payload.ByCloud {
		t.Errorf("speed %+v %+v", speed, speed.Desired)
	}
	if pressure.Value != nil || string(pressure.LastValue) != "3.25" || !pressure.Time.Equal(device.At(1790000000456)) {
		t.Errorf("pressure %+v", pressure)
	}
	if s.Message != "no answer" || s.Protocol != "modbus" || s.ObservedGeneration != 1 || len(s.Conditions) != 1 || s.Conditions[0].Status != "False" {
		t.Errorf("status %+v", s)
	}

	// None of these writes goes back down.
	if now, _ := a.has(topic.DesiredDevice("dev-a", ns, "p1")); string(now) != string(raw) {
		t.Errorf("a status write changed the device's payload\n was %s\n is  %s", raw, now)
	}
	if now := a.wish(ns, "p1", "speed"); now.Rev != first.Rev {
		t.Errorf("a status write changed the wish: %d, was %d", now.Rev, first.Rev)
	}

	// A new wish is newer than what somebody wished at the node meanwhile.
	a.report(topic.ReportedTarget("dev-a", ns, "p1", "speed"), payload.Target{V: json.RawMessage("55"), Rev: first.Rev + 1_000_000, UID: first.UID, By: payload.ByLocal, Who: "node-red", T: 1790000000500})
	eventually(t, "the local target", func() bool {
		tg := property(c.status(t, ns, "p1"), "speed").Target
		return tg != nil && tg.By == payload.ByLocal && tg.Who == "node-red"
	})
	began := time.Now()
	c.patch(t, devices, ns, "p1", `{"spec":{"desired":{"speed":60}}}`)
	eventually(t, "the new wish", func() bool { return string(a.wish(ns, "p1", "speed").V) == "60" })
	t.Logf("patch to wish at the node: %s, of which up to 20ms are this test's", time.Since(began))
	if w := a.wish(ns, "p1", "speed"); w.Rev <= first.Rev+1_000_000 {
		t.Errorf("rev %d of the new wish is older than the local target's", w.Rev)
	}

	// A model change republishes its devices.
	c.patch(t, models, ns, "pump", `{"spec":{"properties":[{"name":"speed","type":"uint16","access":"rw","max":90,"modbus":{"table":"holdingRegister","address":0}}]}}`)
	eventually(t, "the changed model", func() bool {
		var d device.Device
		raw, _ := a.has(topic.DesiredDevice("dev-a", ns, "p1"))
		return payload.Decode(raw, &d) == nil && len(d.Properties) == 1 && d.Rev > resolved.Rev
	})

	// Moved: it disappears here and appears there.
	if got := b.holds(); len(got) > 0 {
		t.Errorf("node b was sent %v", got)
	}
	c.patch(t, devices, ns, "p1", `{"spec":{"nodeName":"dev-b"}}`)
	eventually(t, "the device is at b", func() bool { return len(b.holds()) == 2 && len(a.holds()) == 0 })
	eventually(t, "both are in step", func() bool { return a.inStep() && b.inStep() })

	// The model goes, and with it what the node has; the device goes.
	c.delete(t, models, ns, "pump")
	eventually(t, "the model's end", func() bool { return len(b.holds()) == 0 && c.status(t, ns, "p1").State == device.StateModelMissing })
	rev := b.wish(ns, "p1", "speed").Rev
	c.create(t, models, ns, "pump", pumpModel)
	eventually(t, "the device is back", func() bool { return len(b.holds()) == 2 })
	if rev != 0 && b.wish(ns, "p1", "speed").Rev != rev {
		t.Errorf("the wish lost its rev with the model")
	}
	c.delete(t, devices, ns, "p1")
	eventually(t, "the device's end", func() bool { return len(b.holds()) == 0 && b.inStep() })
}

// TestPod: a bound pod and the ConfigMaps it needs go to the node; what it does
// not need stays; a deleted pod does not hang.
func TestPod(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-pod")
	cl := start(t, c, server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}})
	n := newNode("pod-1")
	n.connect(t, cl.addresses[0], makeToken(t, c, n.name))
	eventually(t, "the node", func() bool { _, ok := c.ready(t, n.name); return ok })
	for _, name := range []string{"by-volume", "by-env", "unused"} {
		_, err := c.kube.CoreV1().ConfigMaps(ns).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"k": "v1"}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	automount := false
	p, err := c.kube.CoreV1().Pods(ns).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Labels: map[string]string{"app": "web"}, Annotations: map[string]string{"kubectl.kubernetes.io/last-applied-configuration": "{}", "note": "x"}},
		Spec: corev1.PodSpec{
			NodeName: n.name, AutomountServiceAccountToken: &automount,
			Containers: []corev1.Container{{
				Name: "c", Image: "busybox",
				EnvFrom: []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "by-env"}}}},
			}},
			Volumes: []corev1.Volume{
				{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "by-volume"}}}},
				{Name: "s", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "token"}}},
			},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"configmap/" + ns + "/by-env", "configmap/" + ns + "/by-volume", "pod/" + ns + "/web"}
	eventually(t, "the pod and its config", func() bool { return slices.Equal(n.holds(), want) })
	raw, _ := n.has(topic.DesiredPod(n.name, ns, "web"))
	var got struct {
		UID      string
		Rev      int64
		Metadata metav1.ObjectMeta
		Spec     corev1.PodSpec
	}
	if err := payload.Decode(raw, &got); err != nil {
		t.Fatal(err)
	}
	if got.UID != string(p.UID) || got.Rev == 0 || got.Metadata.Labels["app"] != "web" || got.Spec.NodeName != n.name || len(got.Metadata.Annotations) != 1 {
		t.Errorf("pod %s", raw)
	}

	_, err = c.kube.CoreV1().ConfigMaps(ns).Patch(t.Context(), "by-volume", types.MergePatchType, []byte(`{"data":{"k":"v2"}}`), metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the changed config", func() bool {
		b, _ := n.has(topic.DesiredConfigMap(n.name, ns, "by-volume"))
		return strings.Contains(string(b), `"k":"v2"`)
	})
	if err := c.kube.CoreV1().ConfigMaps(ns).Delete(t.Context(), "by-env", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the deleted config", func() bool { return len(n.holds()) == 2 })

	// The status that the node reports, for this pod and not for one before it.
	n.report(topic.ReportedPod(n.name, ns, "web"), map[string]any{"uid": "another", "rev": 1, "status": map[string]any{"phase": "Failed"}})
	n.report(topic.ReportedPod(n.name, ns, "web"), map[string]any{"uid": p.UID, "rev": 2, "status": map[string]any{"phase": "Running", "message": "from the node"}})
	eventually(t, "the pod's status", func() bool {
		p, err := c.kube.CoreV1().Pods(ns).Get(t.Context(), "web", metav1.GetOptions{})
		return err == nil && p.Status.Phase == corev1.PodRunning && p.Status.Message == "from the node"
	})
	if now, _ := n.has(topic.DesiredPod(n.name, ns, "web")); string(now) != string(raw) {
		t.Errorf("a status write went back down\n was %s\n is  %s", raw, now)
	}

	if err := c.kube.CoreV1().Pods(ns).Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is gone", func() bool {
		_, err := c.kube.CoreV1().Pods(ns).Get(t.Context(), "web", metav1.GetOptions{})
		return apierrors.IsNotFound(err) && len(n.holds()) == 0 && n.inStep()
	})
}

// TestRestartWithoutStore: the cloud dies, its broker's data is deleted, objects
// change and go meanwhile, the node goes on reporting. Both sides agree again,
// and a wish that did not change keeps its rev.
func TestRestartWithoutStore(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-restart")
	data := t.TempDir()
	cfg := server.Config{Data: data, MQTT: []string{"127.0.0.1:0"}, DeviceStatusInterval: time.Second}
	cl := start(t, c, cfg)
	n := newNode("restart-1")
	tok := makeToken(t, c, n.name)
	n.connect(t, cl.addresses[0], tok)
	c.create(t, models, ns, "pump", pumpModel)
	c.create(t, devices, ns, "kept", pump(n.name, map[string]any{"speed": int64(41)}))
	c.create(t, devices, ns, "changed", pump(n.name, map[string]any{"speed": int64(42)}))
	c.create(t, devices, ns, "deleted", pump(n.name, map[string]any{"speed": int64(43)}))
	eventually(t, "three devices", func() bool { return len(n.holds()) == 6 })
	kept := n.wish(ns, "kept", "speed")
	n.report(topic.ReportedTwin(n.name, ns, "kept", "speed"), payload.Reading{V: json.RawMessage("41"), T: 1790000000123, Ack: kept.Rev})
	eventually(t, "revs in the status", func() bool {
		d := property(c.status(t, ns, "kept"), "speed").Desired
		e := property(c.status(t, ns, "changed"), "speed").Desired
		return d != nil && d.Rev == kept.Rev && d.Acked && e != nil
	})
	changed := n.wish(ns, "changed", "speed")

	addr := strings.TrimPrefix(cl.addresses[0], "mqtt://")
	cl.stop()
	if err := os.RemoveAll(data); err != nil {
		t.Fatal(err)
	}
	c.patch(t, devices, ns, "changed", `{"spec":{"desired":{"speed":50}}}`)
	c.delete(t, devices, ns, "deleted")
	n.report(topic.ReportedTwin(n.name, ns, "changed", "pressure"), payload.Reading{V: json.RawMessage("1.5"), T: 1790000000999})

	cfg.MQTT = []string{addr}
	start(t, c, cfg)
	eventually(t, "the node is in step with what is", func() bool {
		return len(n.holds()) == 4 && n.inStep() && string(n.wish(ns, "changed", "speed").V) == "50"
	})
	if w := n.wish(ns, "kept", "speed"); w.Rev != kept.Rev {
		t.Errorf("the kept wish has rev %d, had %d", w.Rev, kept.Rev)
	}
	if w := n.wish(ns, "changed", "speed"); w.Rev <= changed.Rev {
		t.Errorf("the changed wish has rev %d, had %d", w.Rev, changed.Rev)
	}
	eventually(t, "what was reported meanwhile", func() bool {
		return string(property(c.status(t, ns, "changed"), "pressure").Value) == "1.5" &&
			string(property(c.status(t, ns, "kept"), "speed").Value) == "41"
	})
	eventually(t, "the node is Ready again", func() bool {
		r, ok := c.ready(t, n.name)
		return ok && r.Status == corev1.ConditionTrue
	})
}

// TestExternalBroker: the bridge is a client of a broker that it does not own,
// clears what is stale there, and publishes again what somebody overwrites.
func TestExternalBroker(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-external")
	dir := t.TempDir()
	ext, err := broker.Open(broker.Options{
		Dir: dir, Durability: broker.CloudDurability,
		Authenticate: func(ci broker.ConnectInfo) (access.Identity, error) {
			if ci.Username == "bridge" && string(ci.Password) == "secret" || ci.Listener == broker.InProcess {
				return access.Identity{Role: access.Cloud}, nil
			}
			return access.Identity{}, errors.New("no")
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ext.Close() })
	addr, err := ext.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	stale := topic.DesiredPod("ghost", "default", "old")
	secret := topic.DesiredSecret("ghost", "default", "old")
	for _, tp := range []topic.Topic{stale, secret, topic.DesiredDigest("ghost"), "fl/ghost/desired/nothing/of/ours"} {
		if err := ext.Publish(t.Context(), broker.Message{Topic: tp, Payload: []byte(`{"uid":"x"}`), QoS: 1, Retain: true}); err != nil {
			t.Fatal(err)
		}
	}
	pw := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(pw, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.create(t, models, ns, "pump", pumpModel)
	c.create(t, devices, ns, "p1", pump("elsewhere", map[string]any{"speed": int64(40)}))
	start(t, c, server.Config{Broker: addr, BrokerUsername: "bridge", BrokerPasswordFile: pw})

	wish := topic.DesiredTwin("elsewhere", ns, "p1", "speed")
	var was []byte
	eventually(t, "the wish is on the broker and the ghost is not", func() bool {
		var ok bool
		was, ok = ext.Retained(wish)
		_, old := ext.Retained(stale)
		_, sealed := ext.Retained(secret)
		return ok && !old && !sealed
	})
	if err := ext.Publish(t.Context(), broker.Message{Topic: wish, Payload: []byte(`{"v":1}`), QoS: 1, Retain: true}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the wish is healed", func() bool {
		is, _ := ext.Retained(wish)
		return string(is) == string(was)
	})
	var d payload.Digest
	eventually(t, "the digest", func() bool {
		b, _ := ext.Retained(topic.DesiredDigest("elsewhere"))
		return payload.Decode(b, &d) == nil && d.Count == 2
	})
}
