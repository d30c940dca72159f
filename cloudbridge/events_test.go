package cloudbridge

import (
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

func newTestEvents(t *testing.T) (*events, *bench) {
	t.Helper()
	b := newBench(t)
	drops := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "drops"}, []string{"reason"})
	e := newEvents(b.kube, b.in, slog.New(slog.DiscardHandler), func(_ string, err error) error { return err }, drops)
	t.Cleanup(e.shutDown)
	return e, b
}

// dropped reads the counter.
func (e *events) dropped(t *testing.T, reason string) float64 {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(e.drops)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == reason {
				return m.GetCounter().GetValue()
			}
		}
	}
	return 0
}

func (e *events) tell(node string, ev payload.KubernetesEvent) {
	ns := ev.Namespace
	if ns == "" {
		ns = "default"
	}
	e.put(topic.Parsed{Node: node, Kind: topic.KindEventKubernetes, Namespace: ns, Regarding: ev.Kind, Name: ev.Name}, payload.Encode(ev))
}

func podEvent(id string) payload.KubernetesEvent {
	return payload.KubernetesEvent{ID: id, Kind: "Pod", Namespace: "default", Name: "p", UID: "p-uid", Reason: "Started", Message: "m", Type: "Normal", First: at, Last: at, Count: 1, Component: "kubelet"}
}

// TestEventsTaken: what a node may tell of, and what is dropped as what.
func TestEventsTaken(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*payload.KubernetesEvent)
		reason string // empty is taken
	}{
		{"its pod", func(*payload.KubernetesEvent) {}, ""},
		{"a pod that was before", func(e *payload.KubernetesEvent) { e.UID = "old" }, ""},
		{"a pod that nobody knows", func(e *payload.KubernetesEvent) { e.Name = "gone" }, ""},
		{"its static pod", func(e *payload.KubernetesEvent) { e.Name, e.UID = "static", "hash" }, ""},
		{"itself", func(e *payload.KubernetesEvent) { e.Kind, e.Namespace, e.Name = "Node", "", "n" }, ""},
		{"itself, with the namespace", func(e *payload.KubernetesEvent) { e.Kind, e.Name = "Node", "n" }, ""},
		{"another's pod", func(e *payload.KubernetesEvent) { e.Name, e.UID = "q", "q-uid" }, eventForeign},
		{"a pod of another's name that was here", func(e *payload.KubernetesEvent) { e.Name, e.UID = "q", "old" }, ""},
		{"a pod without a uid", func(e *payload.KubernetesEvent) { e.UID = "" }, eventForeign},
		{"another node", func(e *payload.KubernetesEvent) { e.Kind, e.Namespace, e.Name = "Node", "", "m" }, eventForeign},
		{"itself, in a namespace", func(e *payload.KubernetesEvent) { e.Kind, e.Namespace, e.Name = "Node", "plant", "n" }, eventForeign},
		{"another kind", func(e *payload.KubernetesEvent) { e.Kind = "Secret" }, eventForeign},
		{"an id that is no name", func(e *payload.KubernetesEvent) { e.ID = "a/b" }, eventMalformed},
		{"no id", func(e *payload.KubernetesEvent) { e.ID = "" }, eventMalformed},
		{"another type", func(e *payload.KubernetesEvent) { e.Type = "Error" }, eventMalformed},
		{"no reason", func(e *payload.KubernetesEvent) { e.Reason = "" }, eventMalformed},
		{"a long component", func(e *payload.KubernetesEvent) { e.Component = strings.Repeat("c", 129) }, eventMalformed},
	} {
		e, b := newTestEvents(t)
		static := podOn("n", "static", "1")
		static.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "hash"}
		b.add(t, podOn("n", "p", "1"), podOn("m", "q", "1"), static)
		ev := podEvent("p.1")
		tc.change(&ev)
		e.tell("n", ev)
		if taken := e.length() == 1; taken != (tc.reason == "") || !taken && e.dropped(t, tc.reason) != 1 {
			t.Errorf("%s: taken %t", tc.name, taken)
		}
	}
	e, _ := newTestEvents(t)
	e.put(topic.Parsed{Node: "n", Namespace: "default", Regarding: "Pod", Name: "other"}, payload.Encode(podEvent("p.1")))
	e.put(topic.Parsed{Node: "n", Namespace: "default", Regarding: "Pod", Name: "p"}, []byte("nonsense"))
	if got := e.dropped(t, eventMalformed); got != 2 || e.length() != 0 {
		t.Errorf("%g dropped, %d taken", got, e.length())
	}
}

// TestEventsBounds: a node that tells without end keeps nobody else out, and the
// same event again costs no place.
func TestEventsBounds(t *testing.T) {
	e, _ := newTestEvents(t)
	for i := range maxNodeEvents + 10 {
		e.tell("n", podEvent(fmt.Sprintf("p.%d", i)))
	}
	dropped := func() float64 { return e.dropped(t, eventFull) }
	if e.length() != maxNodeEvents || dropped() != 10 {
		t.Errorf("%d wait, %g dropped", e.length(), dropped())
	}
	again := podEvent("p.0")
	again.Count = 9
	e.tell("n", again)
	if ev, ok := e.take("default/p.0"); !ok || ev.Count != 9 || dropped() != 10 {
		t.Errorf("%+v, %t, %g dropped", ev, ok, dropped())
	}
	if _, ok := e.take("default/p.0"); ok {
		t.Error("taken twice")
	}
	e.tell("n", podEvent("p.next"))
	if e.length() != maxNodeEvents {
		t.Errorf("%d wait", e.length())
	}
	stolen := podEvent("p.1") // another node with the same id
	stolen.Message = "stolen"
	e.tell("m", stolen)
	if ev, _ := e.take("default/p.1"); ev.node != "n" || ev.Message != "m" || dropped() != 11 {
		t.Errorf("%+v, %g dropped", ev, dropped())
	}
	for n := 0; e.length() < maxEvents; n++ {
		for i := range maxNodeEvents {
			e.tell(fmt.Sprintf("node-%d", n), podEvent(fmt.Sprintf("p.%d.%d", n, i)))
		}
	}
	before := dropped()
	e.tell("late", podEvent("p.late"))
	if e.length() != maxEvents || dropped() != before+1 {
		t.Errorf("%d wait, %g dropped", e.length(), dropped()-before)
	}
}

// TestEventPutBack: what could not be written waits again, unless there is newer.
func TestEventPutBack(t *testing.T) {
	e, _ := newTestEvents(t)
	e.tell("n", podEvent("p.1"))
	ev, _ := e.take("default/p.1")
	e.putBack("default/p.1", ev)
	if e.length() != 1 || e.mu.nodes["n"] != 1 {
		t.Errorf("%d wait, %v", e.length(), e.mu.nodes)
	}
	ev, _ = e.take("default/p.1")
	newer := podEvent("p.1")
	newer.Count = 2
	e.tell("n", newer)
	e.putBack("default/p.1", ev)
	if got, _ := e.take("default/p.1"); got.Count != 2 || len(e.mu.nodes) != 0 {
		t.Errorf("%+v, %v", got, e.mu.nodes)
	}
}

func TestEventMessageIsCut(t *testing.T) {
	ev := podEvent("p.1")
	ev.Message = strings.Repeat("é", maxEventMessage)
	var got nodeEvent
	err := got.read(topic.Parsed{Node: "n", Namespace: "default", Regarding: "Pod", Name: "p"}, payload.Encode(ev))
	if err != nil || len(got.Message) > maxEventMessage || strings.Trim(got.Message, "é") != "" {
		t.Errorf("%d bytes, %v", len(got.Message), errors.Join(err))
	}
}
