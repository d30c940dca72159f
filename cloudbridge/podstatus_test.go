package cloudbridge

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/strategicpatch"

	"github.com/fairlead-io/fairlead/schemas/payload"
)

var then = metav1.NewTime(time.UnixMilli(at))

func condition(t corev1.PodConditionType, status corev1.ConditionStatus, reason string) corev1.PodCondition {
	return corev1.PodCondition{Type: t, Status: status, Reason: reason, LastTransitionTime: then}
}

// fullStatus has something in every field that a node writes.
func fullStatus() corev1.PodStatus {
	return corev1.PodStatus{
		ObservedGeneration: 3, Phase: corev1.PodRunning, Message: "m", Reason: "r", HostIP: "192.0.2.1", PodIP: "10.0.0.1", StartTime: &then,
		HostIPs: []corev1.HostIP{{IP: "192.0.2.1"}, {IP: "2001:db8::1"}}, PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "2001:db8::2"}},
		Conditions: []corev1.PodCondition{
			condition(corev1.PodReadyToStartContainers, "True", "a"), condition(corev1.PodInitialized, "True", "b"), condition(corev1.PodReady, "True", "c"),
			condition(corev1.ContainersReady, "True", "d"), condition(corev1.PodResizePending, "True", "e"), condition(corev1.AllContainersRestarting, "True", "f")},
		ContainerStatuses:          []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "x"}}, AllocatedResources: corev1.ResourceList{"cpu": resource.MustParse("1")}}},
		InitContainerStatuses:      []corev1.ContainerStatus{{Name: "i"}, {Name: "j"}},
		EphemeralContainerStatuses: []corev1.ContainerStatus{{Name: "e"}},
		AllocatedResources:         corev1.ResourceList{"cpu": resource.MustParse("1"), "memory": resource.MustParse("1Gi")},
		Resources:                  &corev1.ResourceRequirements{Limits: corev1.ResourceList{"cpu": resource.MustParse("1")}, Requests: corev1.ResourceList{"memory": resource.MustParse("1Gi")}},
	}
}

// TestPodPatch: applied to any status, the patch makes it the node's, but for
// what others write.
func TestPodPatch(t *testing.T) {
	lean := corev1.PodStatus{Phase: corev1.PodPending, Conditions: []corev1.PodCondition{condition(corev1.PodReady, "False", "")}}
	other := fullStatus()
	other.PodIPs, other.HostIPs = other.PodIPs[1:], []corev1.HostIP{{IP: "192.0.2.7"}}
	other.Conditions = append(other.Conditions[3:], condition(corev1.PodResizeInProgress, "False", ""))
	other.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: then}}}}
	other.AllocatedResources, other.Resources = corev1.ResourceList{"cpu": resource.MustParse("2")}, &corev1.ResourceRequirements{Limits: corev1.ResourceList{"memory": resource.MustParse("2Gi")}}
	theirs := corev1.PodStatus{QOSClass: corev1.PodQOSBurstable, NominatedNodeName: "x",
		ResourceClaimStatuses: []corev1.PodResourceClaimStatus{{Name: "claim"}},
		Conditions:            []corev1.PodCondition{condition(corev1.PodScheduled, "True", "s"), condition("example.com/gate", "True", "g"), condition(corev1.DisruptionTarget, "True", "PreemptionByScheduler")}}
	withTheirs := func(s corev1.PodStatus) corev1.PodStatus {
		s = *s.DeepCopy()
		s.QOSClass, s.NominatedNodeName, s.ResourceClaimStatuses = theirs.QOSClass, theirs.NominatedNodeName, theirs.ResourceClaimStatuses
		s.Conditions = append(s.Conditions, theirs.Conditions...)
		return s
	}
	sorted := func(s corev1.PodStatus) corev1.PodStatus {
		s = *s.DeepCopy()
		slices.SortFunc(s.Conditions, func(a, b corev1.PodCondition) int { return strings.Compare(string(a.Type), string(b.Type)) })
		return s
	}
	p := &corev1.Pod{Spec: corev1.PodSpec{ReadinessGates: []corev1.PodReadinessGate{{ConditionType: "example.com/gate"}}}, Status: theirs}
	states := map[string]corev1.PodStatus{"empty": {Phase: corev1.PodPending}, "lean": lean, "other": other, "full": fullStatus()}
	for from, was := range states {
		for to, want := range states {
			reported := *want.DeepCopy() // the node repeats what it saw of others'
			reported.Conditions = append(reported.Conditions, condition("example.com/gate", "False", "old"), condition(corev1.PodScheduled, "False", "old"))
			patch, err := json.Marshal(map[string]any{"status": podPatch(p, &reported, true)})
			if err != nil {
				t.Fatal(err)
			}
			original, err := json.Marshal(corev1.Pod{Status: withTheirs(was)})
			if err != nil {
				t.Fatal(err)
			}
			merged, err := strategicpatch.StrategicMergePatch(original, patch, corev1.Pod{})
			if err != nil {
				t.Fatal(err)
			}
			var got corev1.Pod
			if err := json.Unmarshal(merged, &got); err != nil {
				t.Fatal(err)
			}
			expected := withTheirs(want)
			if !equality.Semantic.DeepEqual(sorted(got.Status), sorted(expected)) {
				t.Errorf("from %s to %s\n got %s\nwant %s", from, to, payload.Encode(sorted(got.Status)), payload.Encode(sorted(expected)))
			}
			if a, b := stateOf(&got.Status), stateOf(&reported); a.digest != b.digest || !sameCondition(a.ready, b.ready) {
				t.Errorf("from %s to %s: the state is another than the report's", from, to)
			}
			a, b := stateOf(&was), stateOf(&reported)
			if same := a.digest == b.digest && sameCondition(a.ready, b.ready); same != (from == to) {
				t.Errorf("%s and %s have the same state: %t", from, to, same)
			}
		}
	}
}

// TestPodPatchLeavesReady: while the link may come back, Ready is not touched.
func TestPodPatchLeavesReady(t *testing.T) {
	s := fullStatus()
	b := string(payload.Encode(podPatch(&corev1.Pod{}, &s, false)))
	if strings.Contains(b, `"Ready"`) || !strings.Contains(b, `"ContainersReady"`) {
		t.Error(b)
	}
}

func TestTrimPodStatus(t *testing.T) {
	s := fullStatus()
	s.Conditions = append(s.Conditions, condition("example.com/gate", "True", ""), condition("example.com/other", "True", ""), condition(corev1.PodScheduled, "True", ""))
	want := stateOf(&s)
	p := &corev1.Pod{Spec: corev1.PodSpec{ReadinessGates: []corev1.PodReadinessGate{{ConditionType: "example.com/gate"}}}, Status: s}
	for range 2 { // a transform may meet its own result
		trimPodStatus(p)
		if got := stateOf(&p.Status); got.digest != want.digest || !sameCondition(got.ready, want.ready) {
			t.Errorf("%+v, want %+v", got, want)
		}
		if p.Status.Phase != corev1.PodRunning || p.Status.Reason != "r" || len(p.Status.Conditions) != 3 || p.Status.PodIP != "" {
			t.Errorf("%+v", p.Status)
		}
	}
}

// TestReportedPatch: when Kubernetes is written to, and with what.
func TestReportedPatch(t *testing.T) {
	running := corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{condition(corev1.PodReady, "True", "")}}
	marked := *running.DeepCopy()
	marked.Conditions[0].Status = "False"
	notReady := *marked.DeepCopy()
	notReady.Conditions[0].Reason = "ContainersNotReady"
	bound := *running.DeepCopy() // by whoever made the pod: no scheduler saw it
	bound.Conditions = append(bound.Conditions, condition(corev1.PodScheduled, "True", "byNode"))
	scheduled := *running.DeepCopy()
	scheduled.Conditions = append(scheduled.Conditions, condition(corev1.PodScheduled, "True", "byScheduler"))
	done := corev1.PodStatus{Phase: corev1.PodSucceeded, Conditions: []corev1.PodCondition{condition(corev1.PodReady, "False", "PodCompleted")}}
	away := time.UnixMilli(at + 60000)
	for _, tc := range []struct {
		name      string
		report    corev1.PodStatus
		has       corev1.PodStatus
		link      linkState
		away      time.Time
		want      string // part of the patch; empty is none
		wantReady bool   // the patch speaks of Ready
	}{
		{"new", running, corev1.PodStatus{Phase: corev1.PodPending}, linkUp, time.Time{}, `"phase":"Running"`, true},
		{"the same", running, running, linkUp, time.Time{}, "", false},
		{"bound without a scheduler", bound, running, linkUp, time.Time{}, `"byNode"`, true},
		{"bound by the scheduler", bound, scheduled, linkUp, time.Time{}, "", false},
		{"marked not ready by another", running, marked, linkUp, time.Time{}, `"status":"True"`, true},
		{"marked, and the link is unknown", running, marked, linkUnknown, time.Time{}, "", false},
		{"marked, and the link is down for a moment", running, marked, linkDown, time.Time{}, "", false},
		{"news while the link is down for a moment", done, marked, linkDown, time.Time{}, `"phase":"Succeeded"`, false},
		{"out of reach", running, running, linkDown, away, `"reason":"NodeLost"`, true},
		{"out of reach and not ready anyway", notReady, notReady, linkDown, away, `"reason":"ContainersNotReady"`, true},
		{"ended before", done, done, linkDown, away, "", false},
	} {
		p := &corev1.Pod{ObjectMeta: metaFor("web", "1"), Spec: corev1.PodSpec{NodeName: "n"}, Status: *tc.has.DeepCopy()}
		trimPodStatus(p)
		s := &status{}
		patch, err := s.reportedPatch(p, payload.ReportedPod{UID: "web-uid", Status: payload.Encode(tc.report)}, nodeView{state: tc.link}, tc.away)
		b := string(payload.Encode(patch))
		if err != nil || (patch != nil) != (tc.want != "") || !strings.Contains(b, tc.want) || strings.Contains(b, `"Ready"`) != tc.wantReady {
			t.Errorf("%s: %s, %v", tc.name, b, err)
		}
		if !tc.away.IsZero() && patch != nil && !strings.Contains(b, "unresponsive since "+away.UTC().Format(time.RFC3339)) {
			t.Errorf("%s: %s", tc.name, b)
		}
	}
}

func TestUnreportedPatch(t *testing.T) {
	pods, none := &payload.Node{Pods: true}, &payload.Node{}
	away := time.UnixMilli(at)
	lost := corev1.PodStatus{Phase: corev1.PodPending, Reason: offlineReason}
	for _, tc := range []struct {
		name string
		has  corev1.PodStatus
		v    nodeView
		away time.Time
		want string
	}{
		{"out of reach", corev1.PodStatus{}, nodeView{state: linkDown, node: pods}, away, "has reported nothing"},
		{"said already", lost, nodeView{state: linkDown, node: pods}, away, ""},
		{"back", lost, nodeView{state: linkUp, node: pods}, time.Time{}, `{"message":null,"reason":null}`},
		{"up", corev1.PodStatus{}, nodeView{state: linkUp, node: pods}, time.Time{}, ""},
		{"an agent without pods", corev1.PodStatus{}, nodeView{state: linkDown, node: none}, away, ""},
		{"somebody else's node", corev1.PodStatus{}, nodeView{state: linkDown}, away, ""},
		{"another's reason", corev1.PodStatus{Reason: "Evicted"}, nodeView{state: linkUp, node: pods}, time.Time{}, ""},
	} {
		p := &corev1.Pod{ObjectMeta: metaFor("web", "1"), Spec: corev1.PodSpec{NodeName: "n"}, Status: tc.has}
		trimPodStatus(p)
		patch := unreportedPatch(p, tc.v, tc.away)
		if b := string(payload.Encode(patch)); (patch != nil) != (tc.want != "") || !strings.Contains(b, tc.want) {
			t.Errorf("%s: %s", tc.name, b)
		}
	}
}
