package server_test

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-io/fairlead/cloudbridge/server"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// TestRuntimeClass: the handler of a pod's RuntimeClass goes down with the pod and
// stays; a class that is not there holds nothing up, and is found once it is.
func TestRuntimeClass(t *testing.T) {
	c := control(t)
	ns := c.namespace(t, "t-class")
	cfg := server.Config{Data: t.TempDir(), MQTT: []string{"127.0.0.1:0"}}
	cl := start(t, c, cfg)
	n, _ := enrol(t, c, cl, "class-1")
	classes := c.kube.NodeV1().RuntimeClasses()
	create := func(name, handler string) {
		t.Helper()
		if _, err := classes.Create(t.Context(), &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(name string) {
		t.Helper()
		if err := classes.Delete(context.WithoutCancel(t.Context()), name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Fatal(err)
		}
	}
	with := func(name, class string) *corev1.Pod {
		return c.pod(t, ns, n.name, func(p *corev1.Pod) { p.Name, p.Spec.RuntimeClassName = name, &class })
	}
	read := func(name string) (p payload.Pod) {
		if b, ok := n.has(topic.DesiredPod(n.name, ns, name)); ok {
			_ = payload.Decode(b, &p)
		}
		return p
	}
	a, b := ns+"-a", ns+"-b"
	create(a, "runsc")
	c.pod(t, ns, n.name, nil)
	with("stays", a)
	eventually(t, "the handler", func() bool { return read("stays").Handler == "runsc" })
	eventually(t, "a pod without a class", func() bool { return read("web").UID != "" && read("web").Handler == "" })
	before := read("stays").Rev
	remove(a)
	if _, err := c.kube.CoreV1().Pods(ns).Patch(t.Context(), "stays", types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the label", func() bool { return read("stays").Rev > before })
	if h := read("stays").Handler; h != "runsc" {
		t.Errorf("handler %q once the class is gone", h)
	}

	addr := strings.TrimPrefix(cl.addresses[0], "mqtt://")
	cl.stop()
	create(b, "kata")
	late := with("late", b)
	remove(b) // the API server admits no pod of a class that is not there
	cfg.MQTT = []string{addr}
	start(t, c, cfg)
	eventually(t, "the pod without its class", func() bool { return read("late").UID == string(late.UID) && n.inStep() })
	if h := read("late").Handler; h != "" {
		t.Errorf("handler %q of no class", h)
	}
	create(b, "kata")
	t.Cleanup(func() { remove(b) })
	n.report(topic.ReportedPod(n.name, ns, "late"), payload.ReportedPod{UID: string(late.UID), Rev: 1, Status: json.RawMessage(`{"phase":"Pending","reason":"x"}`)})
	eventually(t, "the class's handler", func() bool { return read("late").Handler == "kata" })
}
