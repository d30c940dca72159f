package podstatus

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var t0 = time.Date(2026, 11, 20, 8, 0, 0, 0, time.UTC)

const (
	created = runtimeapi.ContainerState_CONTAINER_CREATED
	running = runtimeapi.ContainerState_CONTAINER_RUNNING
	exited  = runtimeapi.ContainerState_CONTAINER_EXITED
	unknown = runtimeapi.ContainerState_CONTAINER_UNKNOWN
)

// story is a pod and what happens to it; each look is a Compute with the time of
// the story and what was reported before.
type story struct {
	in       Input
	seconds  int
	terminal bool
	probes   probes
}

// probes answers by container id. A missing id is not known.
type probes struct {
	started, ready map[string]bool
	failed         map[string]string
}

func (p probes) Started(id string) (bool, bool) { v, ok := p.started[id]; return v, ok }
func (p probes) Ready(id string) (bool, bool)   { v, ok := p.ready[id]; return v, ok }
func (p probes) Failed(id string) string        { return p.failed[id] }

func container(name string, change ...func(*corev1.Container)) corev1.Container {
	c := corev1.Container{Name: name, Image: "fairlead.test/" + name + ":1"}
	for _, f := range change {
		f(&c)
	}
	return c
}

func sidecar(c *corev1.Container) { c.RestartPolicy = new(corev1.ContainerRestartPolicyAlways) }

func withProbes(c *corev1.Container) {
	p := &corev1.Probe{}
	c.StartupProbe, c.ReadinessProbe, c.LivenessProbe = p, p, p
}

// rule gives the container a policy and a rule for exit code 42.
func rule(policy corev1.ContainerRestartPolicy, action corev1.ContainerRestartRuleAction) func(*corev1.Container) {
	return func(c *corev1.Container) {
		c.RestartPolicy = &policy
		c.RestartPolicyRules = []corev1.ContainerRestartRule{{Action: action, ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{
			Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42},
		}}}
	}
}

func newStory(policy corev1.RestartPolicy, inits, containers []corev1.Container) *story {
	s := &story{probes: probes{map[string]bool{}, map[string]bool{}, map[string]string{}}}
	s.in = Input{
		Pod: &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{UID: "uid-1", Name: "web", Namespace: "default", Generation: 2},
			Spec:       corev1.PodSpec{RestartPolicy: policy, InitContainers: inits, Containers: containers},
		},
		Runtime: "containerd", HostIPs: []string{"192.0.2.1"}, QOS: corev1.PodQOSBestEffort,
		Hash: func(c *corev1.Container) string { return c.Image }, Waiting: map[string]Waiting{}, Probes: s.probes,
	}
	return s
}

// sandbox adds a ready sandbox, and ends the ones before.
func (s *story) sandbox() *story {
	s.sandboxEnds()
	n := len(s.in.Sandboxes)
	s.in.Sandboxes = append([]*runtimeapi.PodSandboxStatus{{
		Id: fmt.Sprintf("box%d", n), Metadata: &runtimeapi.PodSandboxMetadata{Attempt: uint32(n)},
		Network: &runtimeapi.PodSandboxNetworkStatus{Ip: "10.0.0.9"},
	}}, s.in.Sandboxes...)
	return s
}

func (s *story) sandboxEnds() *story {
	for _, b := range s.in.Sandboxes {
		b.State = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return s
}

// runs adds a running container, as the next of its name.
func (s *story) runs(names ...string) *story {
	for _, name := range names {
		n := len(s.in.Containers)
		s.in.Containers = append([]Container{{
			Name: name, ID: fmt.Sprintf("%s-%d", name, n), SandboxID: s.in.Sandboxes[0].Id, State: running,
			Created: s.now().Add(time.Duration(n)), Started: s.now(), Image: "fairlead.test/" + name + ":1", ImageRef: "sha256:" + name,
			Hash: "fairlead.test/" + name + ":1", Restarts: Attempt(s.in, name),
		}}, s.in.Containers...)
	}
	return s
}

func (s *story) exits(name string, code int32) *story {
	c := s.in.latest(name)
	c.State, c.ExitCode, c.Finished, c.Reason = exited, code, s.now(), "Error"
	if code == 0 {
		c.Reason = "Completed"
	}
	return s
}

// vanishes removes all the containers of a name from the runtime.
func (s *story) vanishes(name string) *story {
	var left []Container
	for _, c := range s.in.Containers {
		if c.Name != name {
			left = append(left, c)
		}
	}
	s.in.Containers = left
	return s
}

func (s *story) deleted() *story {
	t := metav1.NewTime(s.now())
	s.in.Pod.DeletionTimestamp = &t
	return s
}

func (s *story) now() time.Time { return t0.Add(time.Duration(s.seconds) * time.Second) }

// look computes the status ten seconds later, and makes it what was reported.
func (s *story) look() corev1.PodStatus {
	s.seconds += 10
	s.in.Now = s.now()
	status, terminal := Compute(s.in)
	s.terminal = terminal
	// As it comes back from the bus.
	b, err := json.Marshal(status)
	if err != nil {
		panic(err)
	}
	s.in.Previous = corev1.PodStatus{}
	if err := json.Unmarshal(b, &s.in.Previous); err != nil {
		panic(err)
	}
	return status
}

func (s *story) next() Actions { return Next(s.in, s.look()) }

// brief says what counts in a container's status.
func brief(c corev1.ContainerStatus) string {
	w := []string{c.Name + ":", state(c.State)}
	if c.LastTerminationState != (corev1.ContainerState{}) {
		w = append(w, "after "+state(c.LastTerminationState))
	}
	if c.Started != nil && *c.Started {
		w = append(w, "started")
	}
	if c.Ready {
		w = append(w, "ready")
	}
	if c.RestartCount > 0 {
		w = append(w, fmt.Sprintf("restarts=%d", c.RestartCount))
	}
	return strings.Join(w, " ")
}

func state(s corev1.ContainerState) string {
	switch {
	case s.Running != nil:
		return "running"
	case s.Terminated != nil:
		return fmt.Sprintf("%s(%d)", s.Terminated.Reason, s.Terminated.ExitCode)
	case s.Waiting != nil:
		return "waiting(" + s.Waiting.Reason + ")"
	}
	return "-"
}

// summary is the phase and all the containers.
func summary(s corev1.PodStatus) string {
	lines := []string{string(s.Phase)}
	for _, list := range [][]corev1.ContainerStatus{s.InitContainerStatuses, s.ContainerStatuses, s.EphemeralContainerStatuses} {
		for _, c := range list {
			lines = append(lines, brief(c))
		}
	}
	return strings.Join(lines, "\n")
}

func checkSummary(t *testing.T, s corev1.PodStatus, want ...string) {
	t.Helper()
	if got := summary(s); got != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

// conditionOf is a condition as "True" or "False Reason: message".
func conditionOf(s corev1.PodStatus, t corev1.PodConditionType) string {
	c := condition(s.Conditions, t)
	if c == nil {
		return "none"
	}
	w := string(c.Status)
	if c.Reason != "" {
		w += " " + c.Reason
	}
	if c.Message != "" {
		w += ": " + c.Message
	}
	return w
}

func checkConditions(t *testing.T, s corev1.PodStatus, want map[corev1.PodConditionType]string) {
	t.Helper()
	for k, v := range want {
		if got := conditionOf(s, k); got != v {
			t.Errorf("%s: %s\nwant %s", k, got, v)
		}
	}
}
