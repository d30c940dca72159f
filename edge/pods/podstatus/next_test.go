package podstatus

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// done says what has to be done, in one line.
func done(a Actions) string {
	var w []string
	add := func(format string, args ...any) { w = append(w, fmt.Sprintf(format, args...)) }
	if a.KillPod {
		add("kill pod")
	}
	for _, k := range a.Kill {
		add("kill %s (%s%s)", k.ID, k.Message, prefixed(" by ", k.Reason))
	}
	for _, r := range a.Reset {
		add("reset %s%s", r.ID, map[bool]string{true: " killed"}[r.Kill])
	}
	for _, id := range a.Prune {
		add("remove %s", id)
	}
	if a.CreateSandbox {
		add("sandbox %d", a.Attempt)
	}
	for _, c := range a.StartEphemeral {
		add("debug %s", c.Name)
	}
	for _, c := range a.StartInit {
		add("init %s", c.Name)
	}
	for _, c := range a.Start {
		add("start %s", c.Name)
	}
	return strings.Join(w, ", ")
}

func prefixed(p, s string) string {
	if s == "" {
		return ""
	}
	return p + s
}

func TestNext(t *testing.T) {
	always, onFailure, never := corev1.RestartPolicyAlways, corev1.RestartPolicyOnFailure, corev1.RestartPolicyNever
	one := []corev1.Container{container("a")}
	two := []corev1.Container{container("a"), container("b")}
	inits := []corev1.Container{container("i1"), container("i2")}
	mesh := []corev1.Container{container("i1"), container("mesh", sidecar, withProbes), container("i3")}
	for _, tc := range []struct {
		name   string
		policy corev1.RestartPolicy
		inits  []corev1.Container
		main   []corev1.Container
		do     func(*story)
		want   string
	}{
		// Sandboxes.
		{"new pod", always, nil, two, func(*story) {}, "sandbox 0, start a, start b"},
		{"new pod with init containers", always, inits, two, func(*story) {}, "sandbox 0, init i1"},
		{"sandbox is ready", always, nil, two, func(s *story) { s.sandbox() }, "start a, start b"},
		{"nothing to do", always, nil, two, func(s *story) { s.sandbox().runs("a", "b") }, ""},
		{"sandbox died", always, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("a", 255).exits("b", 255).sandboxEnds() }, "kill pod, sandbox 1, start a, start b"},
		{"sandbox died after initialization", always, inits, one, func(s *story) {
			s.sandbox().runs("i1").exits("i1", 0).runs("i2").exits("i2", 0).runs("a").exits("a", 255).sandboxEnds()
		}, "kill pod, remove i1-0, remove i2-1, sandbox 1, init i1"},
		{"sandbox died, one had succeeded", onFailure, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("a", 0).exits("b", 255).sandboxEnds() }, "kill pod, sandbox 1, start b"},
		{"sandbox died, all had succeeded", onFailure, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("a", 0).exits("b", 0).sandboxEnds() }, ""},
		{"sandbox died, never restart", never, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("a", 0).sandboxEnds() }, "kill pod"},
		{"sandbox died before any container, never restart", never, nil, one, func(s *story) { s.sandbox().sandboxEnds() }, "kill pod, sandbox 1, start a"},
		{"sandbox died, one had succeeded by its own policy", always, nil, []corev1.Container{container("a", rule(corev1.ContainerRestartPolicyOnFailure, corev1.ContainerRestartRuleActionRestart)), container("b")}, func(s *story) { s.sandbox().runs("a", "b").exits("a", 0).exits("b", 0).sandboxEnds() }, "kill pod, sandbox 1, start b"},
		{"sandbox died again", always, nil, one, func(s *story) { s.sandbox().sandbox().sandboxEnds() }, "kill pod, sandbox 2, start a"},
		{"two ready sandboxes", always, nil, one, func(s *story) { s.sandbox(); s.in.Sandboxes = append(s.in.Sandboxes, s.in.Sandboxes[0]) }, "kill pod, sandbox 1, start a"},

		// Regular containers.
		{"crashed", always, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("b", 1) }, "start b"},
		{"succeeded, always", always, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("b", 0) }, "start b"},
		{"succeeded, on failure", onFailure, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("b", 0) }, ""},
		{"failed, never", never, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("b", 1) }, ""},
		{"all ended, never", never, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("a", 0).exits("b", 1) }, "kill pod"},
		{"created but not started", always, nil, one, func(s *story) { s.sandbox().runs("a"); s.in.Containers[0].State = created }, "start a"},
		{"unknown", always, nil, one, func(s *story) { s.sandbox().runs("a"); s.in.Containers[0].State = unknown }, `kill a-0 (Container is in "unknown" state, try killing it before restart), start a`},
		{"image changed", never, nil, two, func(s *story) { s.sandbox().runs("a", "b").in.latest("a").Hash = "old" }, "kill a-0 (Container a definition changed, will be restarted), start a"},
		{"liveness", always, nil, two, func(s *story) { s.sandbox().runs("a", "b").probes.failed["b-1"] = LivenessProbe }, "kill b-1 (Container b failed liveness probe, will be restarted by LivenessProbe), start b"},
		{"startup", always, nil, two, func(s *story) { s.sandbox().runs("a", "b").probes.failed["b-1"] = StartupProbe }, "kill b-1 (Container b failed startup probe, will be restarted by StartupProbe), start b"},
		{"liveness, never", never, nil, two, func(s *story) { s.sandbox().runs("a", "b").probes.failed["b-1"] = LivenessProbe }, "kill b-1 (Container b failed liveness probe by LivenessProbe)"},
		{"liveness of the only one, never", never, nil, one, func(s *story) { s.sandbox().runs("a").probes.failed["a-0"] = LivenessProbe }, "kill pod"},
		{"own policy", never, nil, []corev1.Container{container("a"), container("b", sidecar)}, func(s *story) { s.sandbox().runs("a", "b").exits("b", 0) }, "start b"},
		{"debug", always, nil, one, func(s *story) {
			s.sandbox().runs("a")
			for _, n := range []string{"d1", "d2"} {
				s.in.Pod.Spec.EphemeralContainers = append(s.in.Pod.Spec.EphemeralContainers, corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon(container(n))})
			}
			s.runs("d1").exits("d1", 1)
		}, "debug d2"},

		// Init containers.
		{"first init", always, inits, one, func(s *story) { s.sandbox() }, "init i1"},
		{"init runs", always, inits, one, func(s *story) { s.sandbox().runs("i1") }, ""},
		{"init is done", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0) }, "init i2"},
		{"all init are done", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0).runs("i2").exits("i2", 0) }, "start a"},
		{"a removed one counts as done", always, inits, one, func(s *story) { s.sandbox().runs("i2").exits("i2", 0) }, "start a"},
		{"done and removed", always, inits, one, func(s *story) { s.sandbox().runs("a") }, ""},
		{"init failed", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 1) }, "init i1"},
		{"init failed, never", never, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 1) }, "kill pod"},
		{"init was killed for memory", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0).in.latest("i1").Reason = "OOMKilled" }, "init i1"},
		{"init failed more than once", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 1).runs("i1").exits("i1", 1) }, "remove i1-0, init i1"},
		{"init runs again", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 1).runs("i1") }, ""},
		{"init was created but not started", always, inits, one, func(s *story) { s.sandbox().runs("i1"); s.in.Containers[0].State = created }, "init i1"},
		{"an end of init does not matter any more", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 1).runs("a") }, ""},
		{"init is unknown, never by its own policy", always, []corev1.Container{container("i1", rule(corev1.ContainerRestartPolicyNever, corev1.ContainerRestartRuleActionRestart))}, one, func(s *story) { s.sandbox().runs("i1"); s.in.Containers[0].State = unknown }, "kill pod"},
		{"init is unknown", always, inits, one, func(s *story) { s.sandbox().runs("i1"); s.in.Containers[0].State = unknown }, `kill i1-0 (Init container is in "unknown" state, try killing it before restart), init i1`},
		{"init is unknown, never", never, inits, one, func(s *story) { s.sandbox().runs("i1"); s.in.Containers[0].State = unknown }, "kill pod"},
		{"init ran in another sandbox", always, inits, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0).runs("i2").exits("i2", 0).sandbox() }, "init i1"},

		// Sidecars.
		{"sidecar comes after init", always, mesh, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0) }, "init mesh"},
		{"sidecar has not started", always, mesh, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0).runs("mesh") }, ""},
		{"sidecar has started", always, mesh, one, func(s *story) { s.sandbox().runs("i1").exits("i1", 0).runs("mesh").probes.started["mesh-1"] = true }, "init i3"},
		{"sidecar failed to start", always, mesh, one, func(s *story) {
			s.sandbox().runs("i1").exits("i1", 0).runs("mesh").probes.failed["mesh-1"] = StartupProbe
		}, "kill mesh-1 (Init container mesh failed startup probe by StartupProbe), init mesh"},
		{"sidecar is dead", never, mesh, one, func(s *story) {
			s.sandbox().runs("mesh", "a").probes.started["mesh-0"] = true
			s.probes.failed["mesh-0"] = LivenessProbe
		}, "kill mesh-0 (Init container mesh failed liveness probe by LivenessProbe), init mesh"},
		{"sidecar changed", always, mesh, one, func(s *story) {
			s.sandbox().runs("mesh", "a").probes.started["mesh-0"] = true
			s.in.latest("mesh").Hash = "old"
		}, "kill mesh-0 (Init container mesh definition changed), init mesh"},
		{"sidecar ended beside a running pod", never, mesh, one, func(s *story) { s.sandbox().runs("mesh", "a").exits("mesh", 0) }, "init mesh"},
		{"sidecar ended before the next init", always, mesh, one, func(s *story) { s.sandbox().runs("mesh").exits("mesh", 0) }, "init mesh"},
		{"sidecar and crash", always, mesh, one, func(s *story) { s.sandbox().runs("mesh", "a").exits("mesh", 1).exits("a", 1) }, "init mesh, start a"},
		{"sidecar does not keep a pod", never, mesh, one, func(s *story) { s.sandbox().runs("mesh", "a").exits("a", 0) }, "kill pod"},
		{"sidecar was removed", always, mesh, one, func(s *story) { s.sandbox().runs("a") }, "init mesh"},
		{"last sidecar has started", always, mesh[:2], one, func(s *story) { s.sandbox().runs("mesh").probes.started["mesh-0"] = true }, "start a"},

		// Ends.
		{"deleted", always, nil, two, func(s *story) { s.sandbox().runs("a", "b").exits("b", 1).deleted() }, "kill pod"},
		{"deleted and stopped", always, nil, one, func(s *story) { s.sandbox().runs("a").exits("a", 1).sandboxEnds().deleted() }, ""},
		{"evicted", always, nil, one, func(s *story) { s.sandbox().runs("a"); s.in.Failed = &Failure{Reason: Evicted} }, "kill pod"},
		{"rejected", always, nil, one, func(s *story) { s.in.Failed = &Failure{Reason: "OutOfcpu", Rejected: true} }, ""},
		{"deadline", always, nil, one, func(s *story) {
			s.sandbox().runs("a").look()
			s.in.Pod.Spec.ActiveDeadlineSeconds = new(int64(5))
		}, "kill pod"},
		{"reported as failed", always, nil, one, func(s *story) {
			s.sandbox().runs("a")
			s.in.Previous.Phase = corev1.PodFailed
			s.in.Previous.ContainerStatuses = make([]corev1.ContainerStatus, 1)
		}, "kill pod"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStory(tc.policy, tc.inits, tc.main)
			tc.do(s)
			a := s.next()
			if got := done(a); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
			if n := len(s.in.Sandboxes); n > 0 && a.SandboxID != s.in.Sandboxes[0].Id {
				t.Errorf("sandbox %q", a.SandboxID)
			}
			if a.None() != (tc.want == "") {
				t.Errorf("None() is %v", a.None())
			}
		})
	}
}

func TestRestartAllContainers(t *testing.T) {
	reset := rule(corev1.ContainerRestartPolicyNever, corev1.ContainerRestartRuleActionRestartAllContainers)
	s := newStory(corev1.RestartPolicyNever, []corev1.Container{container("init")}, []corev1.Container{container("a", reset), container("b")})
	s.sandbox().runs("init").exits("init", 0).runs("a", "b")
	if c := conditionOf(s.look(), corev1.AllContainersRestarting); c != "False" {
		t.Errorf("before: %s", c)
	}
	got := s.exits("a", 42).look()
	if c := conditionOf(got, corev1.AllContainersRestarting); c != "True RestartAllContainersStarted: container exited with restart policy rule" || got.Phase != corev1.PodRunning {
		t.Errorf("begun: %s, %s", got.Phase, c)
	}
	if got := done(s.next()); got != "reset b-2 killed, reset init-0, reset a-1" {
		t.Errorf("to do: %s", got)
	}
	got = s.vanishes("b").vanishes("init").vanishes("a").look()
	checkSummary(t, got, "Running", "init: waiting(RestartingAllContainers) after RestartingAllContainers(137) restarts=1",
		"a: waiting(RestartingAllContainers) after RestartingAllContainers(137) restarts=1", "b: waiting(RestartingAllContainers) after RestartingAllContainers(137) restarts=1")
	checkConditions(t, got, map[corev1.PodConditionType]string{corev1.AllContainersRestarting: "False", inited: "True"})
	if got := done(s.next()); got != "init init" {
		t.Errorf("then: %s", got)
	}
	s.runs("init").exits("init", 0).runs("a", "b")
	checkSummary(t, s.look(), "Running", "init: Completed(0) after RestartingAllContainers(137) ready restarts=1",
		"a: running after RestartingAllContainers(137) started ready restarts=1", "b: running after RestartingAllContainers(137) started ready restarts=1")
	s.exits("a", 1) // no rule for this one
	if got := done(s.next()); got != "" {
		t.Errorf("after another exit code: %s", got)
	}
	s.exits("b", 0).sandboxEnds()
	s.in.Stopped = true
	checkConditions(t, s.look(), map[corev1.PodConditionType]string{corev1.AllContainersRestarting: "False PodFailed"})
}

func TestAttempt(t *testing.T) {
	s := newStory(corev1.RestartPolicyAlways, nil, []corev1.Container{container("a")}).sandbox()
	check := func(what string, want int32) {
		t.Helper()
		if got := Attempt(s.in, "a"); got != want {
			t.Errorf("%s: %d, want %d", what, got, want)
		}
	}
	check("new", 0)
	s.look()
	check("waiting", 0)
	s.runs("a").look()
	check("running", 1)
	s.vanishes("a")
	check("gone since it was reported as running", 1)
	s.look()
	check("gone, and reported so", 1)
	s.runs("a").exits("a", 1).look()
	s.vanishes("a")
	check("ended and gone", 2)
}

func TestRestartOnExit(t *testing.T) {
	restart := corev1.ContainerRestartRuleActionRestart
	not42 := func(c *corev1.Container) {
		rule(corev1.ContainerRestartPolicyNever, restart)(c)
		c.RestartPolicyRules[0].ExitCodes.Operator = corev1.ContainerRestartRuleOnExitCodesOpNotIn
	}
	for _, tc := range []struct {
		name  string
		pod   corev1.RestartPolicy
		c     corev1.Container
		codes map[int32]bool
	}{
		{"always", corev1.RestartPolicyAlways, container("a"), map[int32]bool{0: true, 1: true}},
		{"default", "", container("a"), map[int32]bool{0: true, 1: true}},
		{"on failure", corev1.RestartPolicyOnFailure, container("a"), map[int32]bool{0: false, 1: true}},
		{"never", corev1.RestartPolicyNever, container("a"), map[int32]bool{0: false, 1: false}},
		{"sidecar", corev1.RestartPolicyNever, container("a", sidecar), map[int32]bool{0: true, 1: true}},
		{"rule over never", corev1.RestartPolicyAlways, container("a", rule(corev1.ContainerRestartPolicyNever, restart)), map[int32]bool{0: false, 1: false, 42: true}},
		{"rule beside on failure", corev1.RestartPolicyNever, container("a", rule(corev1.ContainerRestartPolicyOnFailure, restart)), map[int32]bool{0: false, 1: true, 42: true}},
		{"rule for the others", corev1.RestartPolicyAlways, container("a", not42), map[int32]bool{0: true, 1: true, 42: false}},
		{"rule without exit codes does not count", corev1.RestartPolicyNever, container("a", rule(corev1.ContainerRestartPolicyNever, restart), func(c *corev1.Container) { c.RestartPolicyRules[0].ExitCodes = nil }), map[int32]bool{42: false}},
		{"rule without a policy does not count", corev1.RestartPolicyNever, container("a", not42, func(c *corev1.Container) { c.RestartPolicy = nil }), map[int32]bool{1: false}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for code, want := range tc.codes {
				if got := RestartOnExit(&corev1.PodSpec{RestartPolicy: tc.pod}, &tc.c, code); got != want {
					t.Errorf("exit code %d: %v", code, got)
				}
			}
		})
	}
}

func TestKillAfter(t *testing.T) {
	pod := &corev1.Pod{Spec: corev1.PodSpec{
		InitContainers: []corev1.Container{container("i"), container("s1", sidecar), container("s2", sidecar), container("s3", sidecar)},
		Containers:     []corev1.Container{container("a"), container("b")},
	}}
	got := KillAfter(pod, []string{"s1", "s3", "a", "debug", "i"})
	for name, want := range map[string]string{"s3": "a", "s1": "a s3", "a": "", "i": "", "debug": "", "s2": ""} {
		if g := strings.Join(got[name], " "); g != want {
			t.Errorf("%s goes after %q, want %q", name, g, want)
		}
	}
}

func TestGrace(t *testing.T) {
	c := container("a", func(c *corev1.Container) {
		c.LivenessProbe = &corev1.Probe{TerminationGracePeriodSeconds: new(int64(5))}
		c.StartupProbe = &corev1.Probe{}
	})
	pod := &corev1.Pod{Spec: corev1.PodSpec{TerminationGracePeriodSeconds: new(int64(30))}}
	for reason, want := range map[KillReason]int64{Unspecified: 30, LivenessProbe: 5, StartupProbe: 30} {
		if got := Grace(pod, &c, reason); got != want {
			t.Errorf("%s: %d s", reason, got)
		}
	}
	pod.DeletionGracePeriodSeconds = new(int64(1))
	if got := Grace(pod, &c, LivenessProbe); got != 1 {
		t.Errorf("deleted: %d s", got)
	}
	if got := Grace(&corev1.Pod{}, nil, Unspecified); got != 2 {
		t.Errorf("none: %d s", got)
	}
}
